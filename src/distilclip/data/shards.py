"""Shards of samples: webdataset tars, Parquet with image bytes, or a folder with a CSV, through one interface."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from distilclip.data.samples import Entry, Sample
from distilclip.data.tabular import CsvShard, ParquetShard
from distilclip.data.tars import TarShard
from distilclip.errors import InputError


@runtime_checkable
class Shard(Protocol):
    """A file of samples with random access."""

    uri: str
    truncated: bool

    def index(self) -> list[Entry]:
        """Every sample in file order, unusable ones included."""

    def prefetch(self, offset: int, size: int) -> None:
        """Begin to fetch an entry that `read` will ask for soon, where that helps."""

    def read(self, offset: int, size: int) -> Sample:
        """The sample of an entry. Raises `BadSample` where it cannot be understood."""

    def close(self) -> None:
        """Let go of open files; reading opens them again."""


def open_shard(uri: str) -> Shard:
    """The shard in a file, by its suffix: .tar, .parquet, .csv or .tsv. Nothing is read yet."""
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


def key_digest(keys: Sequence[str]) -> str:
    """SHA-256 of the keys in order, each followed by a zero byte: what ties a store to the shards it was made from."""
    return hashlib.sha256(b"".join(key.encode() + b"\0" for key in keys)).hexdigest()
