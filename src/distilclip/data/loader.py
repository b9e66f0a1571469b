"""What a loader process does: read, decode, augment and join the rows of one batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, Int64, UInt8
from torch import Tensor
from torch.utils.data import Dataset

from distilclip.data.decode import Augmentation, Crop, decode_crop
from distilclip.data.embeddings import Embeddings
from distilclip.data.pairs import PairTable, assert_key
from distilclip.data.reader import OpenFiles
from distilclip.data.samples import MAX_PIXELS, BadSample
from distilclip.data.shards import Shard, open_shard
from distilclip.data.store import Store
from distilclip.data.views import caption_in, view_in
from distilclip.errors import InputError

Tokenize = Callable[[list[str]], Tensor]

MAX_OPEN_SHARDS = 128
MAX_REPLACEMENTS = 16
READ_AHEAD = 64  # samples under way at once: more than a disk's queue, fewer than MAX_OPEN_SHARDS


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One rank's n rows of a global batch.

    `pixels` are the student's, `teacher_pixels` the same crop at a live teacher's size; the models subtract their means
    on their own device. `ids` are sample ids. `teacher_image` and `teacher_text` hold the embeddings of every store
    that is joined, `labels` the clusters. `bad` lists, as (where, error), the samples in whose place other rows stand
    here.
    """

    ids: Int64[Tensor, " n"]
    pixels: UInt8[Tensor, "n 3 size size"]
    tokens: Int[Tensor, "n context"]
    captions: list[str]
    teacher_pixels: UInt8[Tensor, "n 3 other other"] | None = None
    teacher_image: tuple[Float[Tensor, "n _"], ...] = ()
    teacher_text: tuple[Float[Tensor, "n _"], ...] = ()
    labels: Int64[Tensor, " n"] | None = None
    bad: list[tuple[str, str]] = dataclasses.field(default_factory=list)

    def __len__(self) -> int:
        return len(self.ids)

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory, from which a copy to a GPU keeps no process waiting."""
        pinned: dict[str, Any] = {}
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                pinned[name] = value.pin_memory()
            elif isinstance(value, tuple):
                pinned[name] = tuple(tensor.pin_memory() for tensor in value)
        return dataclasses.replace(self, **pinned)


class OpenShards(OpenFiles[str, Shard]):
    """The shards a process has open, by URI."""

    def __init__(self, limit: int = MAX_OPEN_SHARDS) -> None:
        super().__init__(open_shard, limit=limit)


@dataclass(frozen=True)
class _Drawn:
    """A row as it stands in a batch: its caption, one of `num_captions`, and its crop at every size asked for."""

    index: int
    caption: str
    pixels: list[UInt8[Tensor, "3 _ _"]]
    view: int
    caption_number: int
    num_captions: int


class PairLoader(Dataset):
    """Maps (epoch, rows of the table) to their batch. Picklable; opens files in the process that reads them.

    Each picture is shown as one crop, at each of `sizes`: a stored view, the epoch's of `num_views`, or one that
    `augmentation` draws from (seed, epoch, sample).
    """

    def __init__(
        self,
        table: PairTable,
        stores: Sequence[Store],
        *,
        sizes: Sequence[int],
        tokenize: Tokenize,
        augmentation: Augmentation,
        num_views: int,
        seed: int,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self.table, self.sizes, self.tokenize = table, tuple(sizes), tokenize
        self.embeddings = [Embeddings(store) for store in stores]
        self.augmentation, self.num_views = augmentation, num_views
        self.views = stores[0].views if num_views else None
        self.seed, self.max_pixels = seed, max_pixels
        self._shards = OpenShards()

    def __getitem__(self, task: tuple[int, Int64[np.ndarray, " n"]]) -> Batch | InputError:
        """The batch of (epoch, rows of the table). An `InputError` is returned: raised here, it would lose its type."""
        try:
            return self._batch(*task)
        except InputError as error:
            return error

    def _batch(self, epoch: int, wanted: Int64[np.ndarray, " n"]) -> Batch:
        bad: list[tuple[str, str]] = []
        drawn = [self._usable(epoch, index, bad) for index in self._read_ahead(wanted)]
        rows = np.array([sample.index for sample in drawn])
        captions = [sample.caption for sample in drawn]
        pixels = [torch.stack(of_one_size) for of_one_size in zip(*(sample.pixels for sample in drawn), strict=True)]
        shard, row = self.table.shard[rows], self.table.row[rows]
        view = caption = None
        if self.views is not None:
            view = np.array([sample.view for sample in drawn])
            caption = np.array([sample.caption_number for sample in drawn])
            self._check_captions(rows, np.array([sample.num_captions for sample in drawn]))
        embedded = [embeddings.rows(shard, row, view, caption) for embeddings in self.embeddings]
        return Batch(
            ids=torch.from_numpy(self.table.ids(rows).astype(np.int64)),
            pixels=pixels[0],
            teacher_pixels=pixels[1] if len(pixels) > 1 else None,
            tokens=self.tokenize(captions),
            captions=captions,
            teacher_image=tuple(image for image, _ in embedded),
            teacher_text=tuple(text for _, text in embedded),
            labels=None if self.table.cluster is None else torch.from_numpy(self.table.cluster[rows].astype(np.int64)),
            bad=bad,
        )

    def _read_ahead(self, rows: Int64[np.ndarray, " n"]) -> Iterator[int]:
        """The rows, the bytes of each asked for `READ_AHEAD` rows before its turn."""
        table = self.table
        for place in range(len(rows) + READ_AHEAD):
            if place < len(rows):
                index = rows[place]
                shard = self._shards[table.uris[int(table.shard[index])]]
                shard.prefetch(int(table.offset[index]), int(table.size[index]))
            if place >= READ_AHEAD:
                yield int(rows[place - READ_AHEAD])

    def _usable(self, epoch: int, index: int, bad: list[tuple[str, str]]) -> _Drawn:
        """A row as it is shown; another row, drawn by (seed, epoch, row), where `index` cannot be used."""
        for attempt in range(1, MAX_REPLACEMENTS + 1):
            try:
                return self._read(epoch, index)
            except BadSample as error:
                bad.append((error.where, error.error))
                index = int(self._generator(epoch, index, attempt).integers(len(self.table)))
        raise InputError(
            f"{MAX_REPLACEMENTS} samples drawn in a row cannot be used, the last {bad[-1][0]}: {bad[-1][1]}. "
            "Check the data with `distilclip embed`."
        )

    def _read(self, epoch: int, index: int) -> _Drawn:
        table = self.table
        uri, shard, row = table.uris[int(table.shard[index])], int(table.shard[index]), int(table.row[index])
        sample = self._shards[uri].read(int(table.offset[index]), int(table.size[index]))
        assert_key(sample.key, table.key[index].as_py(), uri=uri, row=row)
        where = f"{uri}: {sample.key}"
        if sample.caption is None:
            raise BadSample("no caption", where=where)
        if sample.image is None:
            raise BadSample("no image", where=where)
        captions, view, number = [sample.caption], 0, 0
        if self.views is not None:
            view = view_in(epoch, shard, row, num_views=self.num_views)
            captions = sample.captions
            number = caption_in(epoch, shard, row, num_views=self.num_views, num_captions=len(captions))

        def draw(width: int, height: int) -> Crop:
            if self.views is not None:
                return self.views.crop(width, height, shard=shard, row=row, view=view)
            return self.augmentation.draw(width, height, self._generator(epoch, index))

        pixels = decode_crop(sample.image, self.sizes, draw=draw, max_pixels=self.max_pixels, where=where)
        return _Drawn(index, captions[number], pixels, view, number, len(captions))

    def _check_captions(self, rows: Int64[np.ndarray, " n"], num_captions: Int64[np.ndarray, " n"]) -> None:
        """Raise `InputError` where a sample has more or fewer captions than the store."""
        shard, row = self.table.shard[rows], self.table.row[rows]
        other = np.flatnonzero(num_captions != self.embeddings[0].num_captions(shard, row))
        if len(other):
            first = other[0]
            raise InputError(
                f"{self.table.uris[int(shard[first])]}: {self.table.key[rows[first]]} has other captions than when it "
                "was embedded. Embed the data again."
            )

    def _generator(self, epoch: int, index: int, attempt: int = 0) -> np.random.Generator:
        """The random numbers of one sample in one epoch, the same in whatever batch, process or run it stands."""
        shard, row = int(self.table.shard[index]), int(self.table.row[index])
        return np.random.Generator(np.random.PCG64([self.seed, epoch, shard, row, attempt]))
