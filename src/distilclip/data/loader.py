"""What a loader process does: read, decode, augment and join the rows of one batch."""

from __future__ import annotations

import dataclasses
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32, Int, Int64, Num, UInt32
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from distilclip.data.pairs import PairTable, assert_key
from distilclip.data.samples import MAX_PIXELS, BadSample, decode_image
from distilclip.data.shards import Shard, open_shard
from distilclip.data.store import Store, not_unit
from distilclip.errors import InputError

Transform = Callable[[Image.Image, np.random.Generator], Tensor]
Tokenize = Callable[[list[str]], Tensor]

MAX_OPEN_SHARDS = 128
MAX_REPLACEMENTS = 16
READ_AHEAD = 64  # samples under way at once: more than a disk's queue, fewer than MAX_OPEN_SHARDS


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One rank's n rows of a global batch.

    `pixels` is the first transform's view of each image, `teacher_pixels` the second's. `ids` are sample ids. The
    teacher's embeddings are there when a store is joined, `labels` when clusters are. `bad` lists, as (where, error),
    the samples in whose place other rows stand here.
    """

    ids: Int64[Tensor, " n"]
    pixels: Num[Tensor, "n 3 h w"]
    tokens: Int[Tensor, "n context"]
    captions: list[str]
    teacher_pixels: Num[Tensor, "n 3 height width"] | None = None
    teacher_image: Float[Tensor, "n dim"] | None = None
    teacher_text: Float[Tensor, "n dim"] | None = None
    labels: Int64[Tensor, " n"] | None = None
    bad: list[tuple[str, str]] = dataclasses.field(default_factory=list)

    def __len__(self) -> int:
        return len(self.ids)

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory, for copies to a GPU that overlap with its work."""
        tensors: dict[str, Any] = {name: t.pin_memory() for name, t in vars(self).items() if isinstance(t, Tensor)}
        return dataclasses.replace(self, **tensors)


class OpenShards:
    """The shards a process has open, by URI: at most `limit`, the longest unused closed first."""

    def __init__(self, limit: int = MAX_OPEN_SHARDS) -> None:
        self.limit = limit
        self._open: OrderedDict[str, Shard] = OrderedDict()
        self._process = os.getpid()

    def __getstate__(self) -> dict[str, Any]:
        return {"limit": self.limit, "_open": OrderedDict(), "_process": 0}

    def __getitem__(self, uri: str) -> Shard:
        if self._process != os.getpid():  # forked: the parent's file positions are not ours to move
            self._open, self._process = OrderedDict(), os.getpid()
        shard = self._open.pop(uri, None) or open_shard(uri)
        self._open[uri] = shard
        if len(self._open) > self.limit:
            self._open.popitem(last=False)[1].close()
        return shard


class PairLoader(Dataset):
    """Maps (epoch, rows of the table) to their batch. Picklable; opens files in the process that reads them."""

    def __init__(
        self,
        table: PairTable,
        store: Store | None,
        *,
        transforms: tuple[Transform, ...],
        tokenize: Tokenize,
        seed: int,
        max_pixels: int = MAX_PIXELS,
        draft: tuple[int, int] | None = None,
    ) -> None:
        self.table, self.store = table, store
        self.transforms, self.tokenize = transforms, tokenize
        self.seed, self.max_pixels, self.draft = seed, max_pixels, draft
        self._shards = OpenShards()
        self._embeddings: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_embeddings": {}}

    def __getitem__(self, task: tuple[int, Int64[np.ndarray, " n"]]) -> Batch | InputError:
        """The batch of (epoch, rows of the table). An `InputError` is returned: raised here, it would lose its type."""
        try:
            return self._batch(*task)
        except InputError as error:
            return error

    def _batch(self, epoch: int, wanted: Int64[np.ndarray, " n"]) -> Batch:
        bad: list[tuple[str, str]] = []
        samples = [self._usable(epoch, index, bad) for index in self._read_ahead(wanted)]
        rows = np.array([index for index, _, _ in samples])
        captions = [caption for _, caption, _ in samples]
        views = [
            torch.stack([transform(image, self._generator(epoch, index)) for index, _, image in samples])
            for transform in self.transforms
        ]
        teacher_image, teacher_text = self._teacher_rows(self.table.shard[rows], self.table.row[rows])
        return Batch(
            ids=torch.from_numpy(self.table.ids(rows).astype(np.int64)),
            pixels=views[0],
            teacher_pixels=views[1] if len(views) > 1 else None,
            tokens=self.tokenize(captions),
            captions=captions,
            teacher_image=teacher_image,
            teacher_text=teacher_text,
            labels=None if self.table.cluster is None else torch.from_numpy(self.table.cluster[rows]),
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

    def _usable(self, epoch: int, index: int, bad: list[tuple[str, str]]) -> tuple[int, str, Image.Image]:
        """Row, caption and image; of another row, drawn by (seed, epoch, row), where those of `index` are unusable."""
        for attempt in range(1, MAX_REPLACEMENTS + 1):
            try:
                return index, *self._read(index)
            except BadSample as error:
                bad.append((error.where, error.error))
                index = int(self._generator(epoch, index, attempt).integers(len(self.table)))
        raise InputError(
            f"{MAX_REPLACEMENTS} samples drawn in a row cannot be used, the last {bad[-1][0]}: {bad[-1][1]}. "
            "Check the data with `distilclip embed`."
        )

    def _read(self, index: int) -> tuple[str, Image.Image]:
        table = self.table
        uri = table.uris[int(table.shard[index])]
        sample = self._shards[uri].read(int(table.offset[index]), int(table.size[index]))
        assert_key(sample.key, table.key[index].as_py(), uri=uri, row=int(table.row[index]))
        where = f"{uri}: {sample.key}"
        if sample.caption is None:
            raise BadSample("no caption", where=where)
        if sample.image is None:
            raise BadSample("no image", where=where)
        return sample.caption, decode_image(sample.image, max_pixels=self.max_pixels, draft=self.draft, where=where)

    def _generator(self, epoch: int, index: int, attempt: int = 0) -> np.random.Generator:
        """The random numbers of one sample in one epoch, the same in whatever batch, process or run it stands."""
        shard, row = int(self.table.shard[index]), int(self.table.row[index])
        return np.random.Generator(np.random.PCG64([self.seed, epoch, shard, row, attempt]))

    def _teacher_rows(
        self, shard: UInt32[np.ndarray, " n"], row: UInt32[np.ndarray, " n"]
    ) -> tuple[Float[Tensor, "n dim"] | None, Float[Tensor, "n dim"] | None]:
        if self.store is None:
            return None, None
        image = np.empty((len(row), self.store.dim), np.float32)
        text = np.empty_like(image)
        order = np.argsort(shard, kind="stable")
        for part in np.split(order, np.flatnonzero(np.diff(shard[order])) + 1):
            number = int(shard[part[0]])
            if number not in self._embeddings:
                self._embeddings[number] = self.store.image(number), self.store.text(number)
            stored_image, stored_text = self._embeddings[number]
            image[part], text[part] = stored_image[row[part]], stored_text[row[part]]
        self._check_unit(image, shard, row)
        self._check_unit(text, shard, row)
        return torch.from_numpy(image), torch.from_numpy(text)

    def _check_unit(
        self, embeddings: Float32[np.ndarray, "n dim"], shard: UInt32[np.ndarray, " n"], row: UInt32[np.ndarray, " n"]
    ) -> None:
        wrong = not_unit(embeddings)
        if wrong.any():
            first = int(np.argmax(wrong))
            raise InputError(
                f"{self.store.path if self.store else ''}: the embedding of shard {shard[first]}, row {row[first]} is "
                "not a finite unit vector. The store is damaged: embed the data again, into a new folder."
            )
