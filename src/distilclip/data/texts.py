"""Samples without their pictures: of a tar, only headers and the members with text are read."""

from __future__ import annotations

import dataclasses

from distilclip.data.reader import Reader
from distilclip.data.samples import LABEL_EXTENSIONS, Sample
from distilclip.data.shards import open_shard
from distilclip.data.tars import sample_of, walk

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
