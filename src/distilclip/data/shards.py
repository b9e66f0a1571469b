"""Open shards of samples, whole or only their texts: webdataset tars, Parquet with image bytes, or a CSV."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import UInt32, UInt64

from distilclip.data.reader import OpenFiles, Reader
from distilclip.data.samples import LABEL_EXTENSIONS, BadSample, Entry, Sample
from distilclip.data.tabular import CsvShard, ParquetShard
from distilclip.data.tars import CutError, TarShard, sample_of, walk
from distilclip.errors import InputError

MAX_OPEN_SHARDS = 128
TEXT_EXTENSIONS = LABEL_EXTENSIONS | {"txt", "json"}


@runtime_checkable
class Shard(Protocol):
    """A file of samples with random access."""

    uri: str
    truncated: bool

    def index(self) -> list[Entry]:
        """Return every sample in file order, unusable ones included."""

    def prefetch(self, offset: int, size: int) -> None:
        """Begin to fetch an entry that `read` will ask for soon, where that helps."""

    def read(self, offset: int, size: int) -> Sample:
        """Return the sample of an entry. Raises `BadSample` where it cannot be understood."""

    def close(self) -> None:
        """Close open files; reading opens them again."""


def open_shard(uri: str) -> Shard:
    """Return the shard in a file, by its suffix: .tar, .parquet, .csv or .tsv. Nothing is read yet."""
    suffix = uri.rsplit(".", 1)[-1].lower()
    if suffix == "tar":
        return TarShard(uri)
    if suffix == "parquet":
        return ParquetShard(uri)
    if suffix in ("csv", "tsv"):
        return CsvShard(uri)
    raise InputError(
        f"{uri}: data is read from .tar (webdataset), .parquet (with image bytes) and .csv or .tsv "
        f"(columns filepath, caption), not .{suffix}. Name such files, or a pattern as in 'data/{{00000..00012}}.tar'."
    )


class OpenShards(OpenFiles[str, Shard]):
    """The shards that a process has open, by URI."""

    def __init__(self, limit: int = MAX_OPEN_SHARDS) -> None:
        super().__init__(open_shard, limit=limit)


def key_digest(keys: Sequence[str]) -> str:
    """Return the SHA-256 of the keys in order, each followed by a zero byte: it ties a store to its shards."""
    return hashlib.sha256(b"".join(key.encode() + b"\0" for key in keys)).hexdigest()


def assert_key(found: str, expected: str, *, uri: str, row: int) -> None:
    """Raise `InputError` where a shard holds another key than the store says."""
    if found != expected:
        raise InputError(
            f"{uri}, row {row}: the key is {found!r} where the store has {expected!r}. It is not the file that "
            "was embedded: embed it again, or give the files that were."
        )


class TextReader:
    """Reads everything of a shard's samples but the image, which is None in all of them.

    Of a tar only headers and members with text are read; a row of a table is read whole.
    """

    def __init__(self, uri: str) -> None:
        self._table = None if uri.lower().endswith(".tar") else open_shard(uri)
        self._reader = Reader(uri, sequential=True)

    def close(self) -> None:
        """Close open files; reading opens them again."""
        self._reader.close()
        if self._table is not None:
            self._table.close()

    def read(self, offset: int, size: int) -> Sample:
        """Return the sample that the shard's index found at `offset`.

        Raises:
            BadSample: a member cannot be understood.
            CutError: there is no sample of `size` bytes, so the tar is not the one that was indexed.
        """
        if self._table is not None:
            return dataclasses.replace(self._table.read(offset, size), image=None)
        members = [m for m in walk(lambda start, length: self._reader.read(offset + start, length), size) if m.key]
        texts = [member for member in members if member.extension in TEXT_EXTENSIONS]
        key = members[0].key if members else ""
        return sample_of(key, texts, lambda m: self._reader.read(offset + m.data, m.size), uri=self._reader.path)


@dataclass(frozen=True)
class Text:
    """What a sample says in words: its caption, and the object in its `json` (or its row of a table)."""

    caption: str | None
    meta: dict[str, Any]


def read_texts(
    uri: str, key: Sequence[str], offset: UInt64[np.ndarray, " n"], size: UInt32[np.ndarray, " n"]
) -> Iterator[Text]:
    """Yield the texts of n samples of a shard, in order.

    Raises:
        InputError: a sample is not the one that was embedded: another key, or members that cannot be read.
    """
    texts = TextReader(uri)
    for name, start, length in zip(key, offset.tolist(), size.tolist(), strict=True):
        try:
            sample = texts.read(start, length)
        except (BadSample, CutError) as error:
            raise InputError(
                f"{uri}: {name} could be read when it was embedded, and now cannot ({error}). "
                "Embed the data again, or give the files that were embedded."
            ) from error
        assert_key(sample.key, name, uri=uri, row=start)
        yield Text(sample.caption, sample.meta)
    texts.close()
