"""Draw reproducible views of every sample, and store the teacher's embeddings of them beside each shard.

A view is a crop, perhaps mirrored, drawn from (seed, shard, row, view) alone, so that training shows the student the
very view that the teacher embedded. Of a sample with several captions each has its embedding. Source: dataset
reinforcement (Faghri et al. 2023, "Reinforce Data, Multiply Impact"; Vasu et al. 2024, MobileCLIP).
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float16, Int64

from distilclip import files
from distilclip.data.columns import FORMAT_VERSION
from distilclip.data.crops import Augmentation, Crop
from distilclip.data.reader import Reader
from distilclip.data.tensors import Header, read_header, read_tensors, write_tensors
from distilclip.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Views:
    """`num` views of every sample, drawn from `seed`."""

    num: int
    seed: int
    augmentation: Augmentation

    def __post_init__(self) -> None:
        if self.num < 1 or self.seed < 0:
            raise InputError(
                f"There must be at least one view, not {self.num}, and its seed 0 or more, not {self.seed}."
            )

    def crop(self, width: int, height: int, *, shard: int, row: int, view: int) -> Crop:
        """Return what view `view` shows of a picture of `width` x `height` pixels."""
        generator = np.random.Generator(np.random.PCG64([self.seed, shard, row, view]))
        return self.augmentation.draw(width, height, generator)

    def to_json(self) -> str:
        """Return the views as JSON, for the metadata of a store."""
        return json.dumps({"num": self.num, "seed": self.seed, **dataclasses.asdict(self.augmentation)})

    @classmethod
    def from_json(cls, text: str) -> Views:
        """Read what `to_json` wrote."""
        values = json.loads(text)
        num, seed = values.pop("num"), values.pop("seed")
        return cls(num=num, seed=seed, augmentation=Augmentation(**values))


def view_in(epoch: int, shard: int, row: int, *, num_views: int) -> int:
    """Return the view of a sample in an epoch: each in turn, and samples begin with different ones."""
    return (epoch + shard + row) % num_views


def caption_in(epoch: int, shard: int, row: int, *, num_views: int, num_captions: int) -> int:
    """Return the caption of a sample in an epoch; over the epochs, every view meets every caption."""
    rounds = epoch // math.lcm(num_views, num_captions)  # after so many epochs the same pairs would come again
    return (epoch + rounds + shard + row) % num_captions


@dataclass(frozen=True)
class ViewEmbeddings:
    """A shard's r rows, m views each, and t captions besides each row's first. Zeros where the row is not valid.

    The captions of row i after its first are `text[text_first[i] : text_first[i + 1]]`.
    """

    image: Float16[np.ndarray, "r m dim"]
    text: Float16[np.ndarray, "t dim"]
    text_first: Int64[np.ndarray, " r1"]


def views_path(store: str, shard: int) -> str:
    """Return the path of the views of a shard in a store."""
    return files.join(store, "views", f"{shard:06d}.safetensors")


def write_views(store: str, shard: int, embeddings: ViewEmbeddings, metadata: Mapping[str, str]) -> None:
    """Write the views of a shard, beside its payload."""
    write_tensors(views_path(store, shard), vars(embeddings), {"format": FORMAT_VERSION, **metadata})


def read_views(store: str, shard: int, *, num_rows: int, num_views: int, dim: int, teacher: str) -> ViewEmbeddings:
    """Read the views of a shard, as memory maps where the store is local; `teacher` is the digest that they must have.

    Raises:
        InputError: the file is missing, or not of this store.
    """
    path = views_path(store, shard)
    if not files.exists(path):
        raise InputError(f"{path} is missing. Embed the data again, into a new folder, with --views {num_views}.")
    with Reader(path) as reader:
        header = read_header(reader)
    check_views(store, shard, header, num_rows=num_rows, num_views=num_views, dim=dim, teacher=teacher)
    found = ViewEmbeddings(**read_tensors(path))
    if len(found.text) != found.text_first[-1]:
        raise InputError(_foreign(store, shard))
    return found


def check_views(
    store: str, shard: int, header: Header, *, num_rows: int, num_views: int, dim: int, teacher: str
) -> None:
    """Raise `InputError` unless a file with this header holds the views of a shard of this store."""
    num_texts = header.shapes.get("text", ())[:1]
    expected = {"image": (num_rows, num_views, dim), "text": (*num_texts, dim), "text_first": (num_rows + 1,)}
    if header.metadata.get("teacher_digest") != teacher or header.shapes != expected:
        raise InputError(_foreign(store, shard))


def _foreign(store: str, shard: int) -> str:
    path = views_path(store, shard)
    return f"{path} does not belong to the store {store}. Embed the data again, into a new folder."
