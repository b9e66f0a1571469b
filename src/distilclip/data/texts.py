"""Samples without their pictures: of a tar, only headers and the members with text are read."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import UInt32, UInt64

from distilclip.data.pairs import assert_key
from distilclip.data.reader import Reader
from distilclip.data.samples import LABEL_EXTENSIONS, BadSample, Sample
from distilclip.data.shards import open_shard
from distilclip.data.tars import CutError, sample_of, walk
from distilclip.errors import InputError

TEXT_EXTENSIONS = LABEL_EXTENSIONS | {"txt", "json"}


class TextReader:
    """Reads everything of a shard's samples but the image, which is None in all of them.

    A row of a table is read whole.
    """

    def __init__(self, uri: str) -> None:
        self._table = None if uri.lower().endswith(".tar") else open_shard(uri)
        self._reader = Reader(uri, sequential=True)

    def close(self) -> None:
        """Let go of open files; reading opens them again."""
        self._reader.close()
        if self._table is not None:
            self._table.close()

    def read(self, offset: int, size: int) -> Sample:
        """The sample that the shard's index found at `offset`.

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
    """The texts of n samples of a shard, in order. Of a tar only headers and text members are read.

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
