"""Read the image embeddings of all shards of a store as one matrix; its rows are counted through the shards."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float16, Int, UInt8, UInt64

from distilclip.data.side_files import kept_images, kept_rows
from distilclip.data.store import Store, sample_id, split_id
from distilclip.errors import InputError

DIGEST_BYTES = 16  # of the SHA-256 of an image file, kept in memory; enough to tell 2^60 images apart


_BLOCK = 65_536  # rows


def check_points(embeddings: Float16[np.ndarray, "n dim"], valid: Bool[np.ndarray, " n"], *, where: str) -> None:
    """Raise `InputError` naming the first valid row that is not finite, or that is zero and so has no direction.

    The bits are looked at, in blocks: it takes less time than the digest of the file.
    """
    for start in range(0, len(embeddings), _BLOCK):
        bits = np.asarray(embeddings[start : start + _BLOCK]).view(np.uint16)
        wrong = ((bits & 0x7C00) == 0x7C00).any(1) | ~(bits & 0x7FFF).any(1)
        wrong &= valid[start : start + _BLOCK]
        if wrong.any():
            raise InputError(
                f"{where}, row {start + int(np.argmax(wrong))}: not a finite unit vector. Embed the data again, into a "
                "new folder."
            )


@dataclass(frozen=True)
class ImageMatrix:
    """Reads ranges and rows in half precision; what lies in one shard of a local store stays a memory map."""

    store: Store
    groups: str | None = None
    """folder of `balance` or `select`: only rows that it keeps count as valid"""

    def __len__(self) -> int:
        return self.store.num_rows

    @cached_property
    def starts(self) -> Int[np.ndarray, " shards1"]:
        """The first row of every shard, then the number of all rows."""
        return np.cumsum([0, *(shard.num_rows for shard in self.store.shards)])

    def read(self, start: int, stop: int) -> Float16[np.ndarray, "n dim"]:
        """Read the rows from `start` to before `stop`."""
        pieces = [self._image(shard)[within] for shard, within in self._cut(start, stop)]
        if len(pieces) == 1:
            return pieces[0]
        rows = np.empty((stop - start, self.store.dim), np.float16)
        filled = 0
        for piece in pieces:  # one at a time: pages of the map that were read may go again
            rows[filled : filled + len(piece)] = piece
            filled += len(piece)
        return rows

    def take(self, rows: Int[np.ndarray, " m"]) -> Float16[np.ndarray, "m dim"]:
        """Read rows in any order."""
        taken = np.empty((len(rows), self.store.dim), np.float16)
        order = np.argsort(rows, kind="stable")
        bounds = np.searchsorted(rows[order], self.starts)
        for shard, (first, last) in enumerate(itertools.pairwise(bounds)):
            if first < last:
                here = order[first:last]
                taken[here] = self._image(shard)[rows[here] - self.starts[shard]]
        return taken

    def valid(self, start: int = 0, stop: int | None = None) -> Bool[np.ndarray, " n"]:
        """Return which rows have an image embedding and are kept by `groups`."""
        stop = len(self) if stop is None else stop
        pieces = [kept_images(self.store, shard, self.groups)[within] for shard, within in self._cut(start, stop)]
        return np.concatenate([np.empty(0, bool), *pieces])

    def usable(self, shard: int) -> Bool[np.ndarray, " r"]:
        """Return which rows of a shard are valid and kept by `groups`, with a picture or without."""
        return kept_rows(self.store, shard, self._column(shard, "valid").to_numpy(), self.groups)

    def count_pictureless(self, *, stage: str) -> int:
        """Count the rows that can be used, are kept by `groups` and have no picture; `InputError` where no row has one.

        `stage` is what needs pictures, for the message.
        """
        there = self.valid()
        usable = np.concatenate([self.usable(shard) for shard in range(self.store.num_shards)])
        if usable.any() and not there.any():
            raise InputError(f"{self.store.path}: no row has a picture, and {stage} compares pictures.")
        return int((usable & ~there).sum())

    def digests(self) -> UInt8[np.ndarray, "n 16"]:
        """Return the first 16 bytes of each image file's SHA-256, zeros where it is not known."""
        digests = np.zeros((len(self), DIGEST_BYTES), np.uint8)
        for shard, (start, stop) in enumerate(itertools.pairwise(self.starts.tolist())):
            column = self._column(shard, "image_sha256").combine_chunks().fill_null(bytes(32))
            whole = np.frombuffer(column.buffers()[1], np.uint8).reshape(-1, 32)
            digests[start:stop] = whole[column.offset : column.offset + len(column), :DIGEST_BYTES]
        return digests

    def ids(self, rows: Int[np.ndarray, " m"]) -> UInt64[np.ndarray, " m"]:
        """Return the sample ids of rows."""
        shard = np.searchsorted(self.starts, rows, side="right") - 1
        return sample_id(shard, rows - self.starts[shard])

    def rows(self, ids: UInt64[np.ndarray, " m"]) -> Int[np.ndarray, " m"]:
        """Return the rows of sample ids."""
        shard, row = split_id(ids)
        return self.starts[shard.astype(np.int64)] + row.astype(np.int64)

    @cached_property
    def _checked(self) -> set[int]:
        return set()

    def _image(self, shard: int) -> Float16[np.ndarray, "n dim"]:
        """Return the embeddings of a shard, which are looked at when they are first read."""
        image = self.store.image(shard)
        if shard not in self._checked:
            valid = self._column(shard, "has_image").to_numpy()
            check_points(image, valid, where=f"{self.store.payload_path(shard)}, shard {shard}")
            self._checked.add(shard)
        return image

    def _cut(self, start: int, stop: int) -> list[tuple[int, slice]]:
        """Return the shards that hold the rows of a range, and which of their rows these are."""
        return [
            (shard, slice(max(start - first, 0), min(stop, last) - first))
            for shard, (first, last) in enumerate(zip(self.starts[:-1].tolist(), self.starts[1:].tolist(), strict=True))
            if first < stop and last > start
        ]

    def _column(self, shard: int, name: str) -> pa.ChunkedArray:
        return self.store.columns(shard, name).column(name)
