"""Copy the selected samples of webdataset tars into new tars, each byte for byte as in its source.

A sample is copied as the span of the source that holds its members, headers included, so nothing is decoded or
encoded again. Tars are made apart from each other; each is followed by its index, whose presence says that the tar is
finished.
"""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from distilclip import files
from distilclip.data.columns import read_column_metadata, write_columns
from distilclip.data.reader import Reader
from distilclip.data.samples import IMAGE_EXTENSIONS
from distilclip.data.shards import assert_key
from distilclip.data.store import sample_id
from distilclip.data.tars import BLOCK, CutError, Member, walk
from distilclip.errors import InputError
from distilclip.export.selection import SelectedRows, Selection

INDEX_SCHEMA = pa.schema(
    [("sample", pa.uint64()), ("key", pa.string()), ("offset", pa.uint64()), ("size", pa.uint32())]
)


@dataclass(frozen=True)
class Piece:
    """Some of the selected rows of a shard, from the `start`-th up to the `stop`-th; to the end where it is None."""

    shard: int
    start: int = 0
    stop: int | None = None


@dataclass(frozen=True)
class TarPart:
    """One tar to write, and what goes into it."""

    number: int
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class FinishedTar:
    """A finished tar. `num_renamed` samples got a new key, since theirs was in the tar already."""

    num_samples: int
    num_bytes: int
    num_renamed: int


def tar_path(folder: str, number: int) -> str:
    """Return the path of a tar; the file is missing where its part has no selected sample."""
    return files.join(folder, "tars", f"{number:05d}.tar")


def index_path(folder: str, number: int) -> str:
    """Return the path of the index of a tar: its samples, where they come from, and where they lie in it."""
    return files.join(folder, "index", f"{number:05d}.parquet")


def plan_tars(selection: Selection, *, samples_per_tar: int | None) -> list[TarPart]:
    """Plan one tar per shard, or, with `samples_per_tar`, tars of that many samples (the last has the rest).

    Raises:
        InputError: the store was not made from tars.
    """
    selection.store.require_pictures()
    for uri in selection.uris:
        if not uri.lower().endswith(".tar"):
            raise InputError(f"{uri} is no tar: --what tars copies tars only. Use --what keys or subset.")
    num_shards = selection.store.num_shards
    if samples_per_tar is None:
        return [TarPart(shard, (Piece(shard),)) for shard in range(num_shards)]
    ends = np.cumsum([0, *(selection.count(shard) for shard in range(num_shards))])
    parts = []
    for number, first in enumerate(range(0, int(ends[-1]), samples_per_tar)):
        last = min(first + samples_per_tar, int(ends[-1]))
        shards = range(int(np.searchsorted(ends, first, "right")) - 1, int(np.searchsorted(ends, last, "left")))
        cuts = [
            (s, max(first, int(ends[s])) - int(ends[s]), min(last, int(ends[s + 1])) - int(ends[s])) for s in shards
        ]
        parts.append(TarPart(number, tuple(Piece(*cut) for cut in cuts if cut[1] < cut[2])))
    return parts


@dataclass(frozen=True)
class TarWriter:
    """Writes the tars of a selection into a folder; picklable, called with one part after another in any process."""

    selection: Selection
    folder: str

    def __call__(self, part: TarPart) -> FinishedTar:
        """Write a tar, then its index; a finished one is left as it is."""
        index = index_path(self.folder, part.number)
        if files.exists(index):
            found = read_column_metadata(index)
            return FinishedTar(int(found["num_samples"]), int(found["num_bytes"]), int(found["num_renamed"]))
        pieces = [(piece.shard, self._rows(piece)) for piece in part.pieces]
        columns: dict[str, list[Any]] = {name: [] for name in INDEX_SCHEMA.names}
        position = num_renamed = 0
        if any(len(rows) for _, rows in pieces):
            with files.atomic_write(tar_path(self.folder, part.number)) as file:
                for sample in _samples(pieces):
                    line = (sample.sample, sample.key, position, len(sample.span))
                    for name, value in zip(INDEX_SCHEMA.names, line, strict=True):
                        columns[name].append(value)
                    num_renamed += sample.renamed
                    position += file.write(sample.span)
                position += file.write(bytes(2 * BLOCK))  # the end mark
        written = FinishedTar(len(columns["sample"]), position, num_renamed)
        write_columns(index, INDEX_SCHEMA, columns, {name: str(value) for name, value in vars(written).items()})
        return written

    def _rows(self, piece: Piece) -> SelectedRows:
        return self.selection.rows(piece.shard).part(piece.start, piece.stop)


@dataclass(frozen=True)
class _Sample:
    """A sample as it is written: the bytes of its members, headers included."""

    sample: int
    key: str
    span: bytes
    renamed: bool


def _samples(pieces: list[tuple[int, SelectedRows]]) -> Iterator[_Sample]:
    seen: set[str] = set()
    for shard, rows in pieces:
        with Reader(rows.uri, sequential=True) as reader:
            for i, key in enumerate(rows.key):
                row = int(rows.row[i])
                span = reader.read(int(rows.offset[i]), int(rows.size[i]))
                _check(span, key, rows.image_sha256[i].tobytes(), uri=rows.uri, row=row)
                name = key
                while name in seen:  # two samples of a key in one tar cannot be told apart by any reader
                    name = f"{name}-{shard:06d}-{row:06d}"
                seen.add(name)
                span = span if name == key else _rename_sample(span, key, name)
                yield _Sample(int(sample_id(shard, row)), name, span, name != key)


def _check(span: bytes, key: str, image_sha256: bytes, *, uri: str, row: int) -> None:
    """Raise `InputError` where a span does not hold the sample that was embedded, to the last bit of its picture."""
    try:
        members = [m for m in walk(lambda start, length: span[start : start + length], len(span)) if m.key]
    except CutError:
        members = []
    assert_key(members[0].key if members else "", key, uri=uri, row=row)
    image = next((m for m in members if m.extension in IMAGE_EXTENSIONS), None)
    if image is None or hashlib.sha256(_content(span, image)).digest() != image_sha256:
        raise InputError(
            f"{uri}, row {row} ({key}): its picture is not the one that was embedded (SHA-256 differs). "
            "Embed the data again, or give the files that were embedded."
        )


def _content(span: bytes, member: Member) -> memoryview:
    return memoryview(span)[member.data : member.data + member.size]


def _rename_sample(span: bytes, key: str, name: str) -> bytes:
    """Return the sample with `name` in place of `key` in the names of its members: new headers, the same contents."""
    written = io.BytesIO()
    with (
        tarfile.open(fileobj=io.BytesIO(span + bytes(2 * BLOCK))) as source,
        tarfile.open(fileobj=written, mode="w") as target,
    ):
        for member in source:
            if member.name.startswith(f"{key}."):
                member.pax_headers = {k: v for k, v in member.pax_headers.items() if k != "path"}
                member.name = name + member.name[len(key) :]
            target.addfile(member, source.extractfile(member) if member.isreg() else None)
        length = target.offset  # before the end mark
    return written.getvalue()[:length]
