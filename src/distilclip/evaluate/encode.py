"""Images and texts through a model, once per set: decoding in worker processes, batches in a fixed order."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from distilclip.data import files
from distilclip.data.loader import OpenShards
from distilclip.data.policy import ErrorPolicy
from distilclip.data.samples import MAX_PIXELS, BadSample, decode_image
from distilclip.errors import InputError
from distilclip.evaluate.dataset import ImageRef
from distilclip.models.clip import Clip
from distilclip.progress import progress

Output = Literal["embedding", "backbone"]


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """How features are computed: what changes them, and what only changes how fast they come."""

    batch_size: int = 64
    dtype: torch.dtype = torch.float32
    max_pixels: int = MAX_PIXELS
    num_workers: int = 0

    def autocast(self, device: torch.device) -> contextlib.AbstractContextManager[Any]:
        """The context that the towers run in."""
        return torch.autocast(device.type, self.dtype, enabled=self.dtype != torch.float32)


@dataclass(frozen=True, kw_only=True)
class ImageFeatures:
    """Features of the images that could be read, on the CPU; `rows` are their places among all that were asked for.

    `embedding` has unit rows; `backbone` is what lies before the projection, as it is. `num_unreadable` counts the
    images that are missing, `reasons` why.
    """

    rows: Int[Tensor, " n"]
    features: dict[Output, Float[Tensor, "n _"]]
    reasons: dict[str, int] = field(default_factory=dict)

    @property
    def num_unreadable(self) -> int:
        """How many images could not be read."""
        return sum(self.reasons.values())

    @property
    def embedding(self) -> Float[Tensor, "n dim"]:
        """Unit embeddings in the space shared with texts."""
        return self.features["embedding"]


def encode_images(
    clip: Clip,
    images: Sequence[ImageRef],
    *,
    outputs: Sequence[Output] = ("embedding",),
    encoding: Encoding | None = None,
    policy: ErrorPolicy | None = None,
    description: str = "images",
) -> ImageFeatures:
    """Encode images in order. `policy` decides what an unreadable one does; by default the first raises.

    Raises `InputError` for an unreadable image (or too many of them), and for a model whose features are not finite.
    """
    encoding = encoding or Encoding()
    policy = policy or ErrorPolicy()
    compute: dict[Output, Callable[[Tensor], Tensor]] = {
        "embedding": clip.encode_image,
        "backbone": clip.backbone_features,
    }
    buffers: dict[Output, Tensor] = {}
    rows: list[int] = []
    with progress(description, len(images)) as advance, torch.no_grad():
        for pixels, read, bad in _batches(clip, images, encoding):
            policy.seen(len(read) + len(bad))
            for row, error in bad:
                policy.bad(error, where=images[row].where)
            policy.check()
            advance(len(read) + len(bad), len(read))
            if not read:
                continue
            pixels = pixels.to(clip.device, non_blocking=True)
            for output in outputs:
                with encoding.autocast(clip.device):
                    features = compute[output](pixels).float().cpu()
                if output not in buffers:
                    buffers[output] = torch.empty(len(images), features.shape[1])
                buffers[output][len(rows) : len(rows) + len(read)] = features
            rows += read
    policy.check(final=True)
    if not rows:
        raise InputError(f"None of the {len(images)} images could be read; the first is {policy.first}.")
    features = {output: buffer[: len(rows)] for output, buffer in buffers.items()}
    if not all(torch.isfinite(x).all() for x in features.values()):
        raise InputError(f"{clip.name} gives NaN or infinite features: its weights are broken, or bf16 is too coarse.")
    return ImageFeatures(rows=torch.tensor(rows), features=features, reasons=dict(sorted(policy.reasons.items())))


def encode_texts(clip: Clip, texts: Sequence[str], *, encoding: Encoding | None = None) -> Float[Tensor, "n dim"]:
    """Unit text embeddings in order, on the CPU. Raises `InputError` for a model whose features are not finite."""
    encoding = encoding or Encoding()
    parts = []
    with torch.no_grad(), encoding.autocast(clip.device):
        for start in range(0, len(texts), encoding.batch_size):
            tokens = clip.tokenizer(list(texts[start : start + encoding.batch_size])).to(clip.device)
            parts.append(clip.encode_text(tokens).float().cpu())
    features = torch.cat(parts)
    if not torch.isfinite(features).all():
        raise InputError(f"{clip.name} gives NaN or infinite features: its weights are broken, or bf16 is too coarse.")
    return features


_Batch = tuple[Tensor, list[int], list[tuple[int, str]]]  # pixels; the rows they are of; the unreadable rows and why


def _batches(clip: Clip, images: Sequence[ImageRef], encoding: Encoding) -> Iterator[_Batch]:
    parallel: dict[str, Any] = {}
    if encoding.num_workers > 0:
        parallel = {"multiprocessing_context": "fork" if sys.platform == "linux" else "spawn"}
    loader = DataLoader(
        _Images(images, clip.preprocess, encoding.max_pixels),
        batch_size=encoding.batch_size,
        num_workers=encoding.num_workers,
        collate_fn=_collate,
        pin_memory=clip.device.type == "cuda",
        generator=torch.Generator(),  # else the loader draws its base seed from the global random state
        **parallel,
    )
    for batch in loader:
        if isinstance(batch, InputError):
            raise batch
        yield batch


class _Images(Dataset):
    """Decoded and preprocessed images by row. Errors are returned: raised in a worker, they would lose their type."""

    def __init__(self, images: Sequence[ImageRef], preprocess: Callable[..., Tensor], max_pixels: int) -> None:
        self.images, self.preprocess, self.max_pixels = images, preprocess, max_pixels
        uris = list(dict.fromkeys(image.uri for image in images if image.key))
        self.number = {uri: number for number, uri in enumerate(uris)}
        self.shards = OpenShards(uris)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> tuple[int, Tensor | str | InputError]:
        image = self.images[row]
        try:
            picture = decode_image(self._read(image), max_pixels=self.max_pixels, where=image.where)
            return row, self.preprocess(picture)
        except BadSample as error:
            return row, error.error
        except InputError as error:
            return row, error

    def _read(self, image: ImageRef) -> bytes:
        if image.error:
            raise BadSample(*image.error.split(": ", 1)[:1], detail=image.error.partition(": ")[2], where=image.where)
        if not image.key:
            return files.read_bytes(image.uri)
        sample = self.shards[self.number[image.uri]].read(image.offset, image.size)
        if sample.key != image.key:
            raise InputError(f"{image.where}: found {sample.key!r} in its place; the file was changed during the run.")
        if sample.image is None:
            raise BadSample("no image", where=image.where)
        return sample.image


def _collate(items: list[tuple[int, Tensor | str | InputError]]) -> _Batch | InputError:
    for _, item in items:
        if isinstance(item, InputError):
            return item
    pixels = [item for _, item in items if isinstance(item, Tensor)]
    read = [row for row, item in items if isinstance(item, Tensor)]
    bad = [(row, item) for row, item in items if isinstance(item, str)]
    return (torch.stack(pixels) if pixels else torch.empty(0)), read, bad
