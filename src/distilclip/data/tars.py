"""Random access into tar files: an index of samples made from the headers alone, one range read per sample.

The headers are parsed here and not by `tarfile`, which walks forward from the start and gives up at the first defect:
training needs single samples at known offsets, and of a damaged tar its good part.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from distilclip.data import files
from distilclip.data.samples import (
    IMAGE_EXTENSIONS,
    LABEL_EXTENSIONS,
    Entry,
    Sample,
    clean_caption,
    decode_meta,
    decode_text,
)
from distilclip.errors import InputError

BLOCK = 512
MAX_SPAN = 2**32 - 1  # a store keeps the size of a sample in 32 bits

# webdataset's rule: the key is the path up to the first dot of the base name, the extension all that follows.
_NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)", re.DOTALL)

ReadAt = Callable[[int, int], bytes]  # (offset, length) -> bytes, fewer only where the file ends


class TarShard:
    """A webdataset tar: members `key.ext`, those of one sample side by side.

    After `index`, `truncated` says that the file ends inside a sample or lacks the end mark that tar writes last.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.truncated = False
        self._reader = files.Reader(uri)

    def close(self) -> None:
        """Close the file; the next read opens it again."""
        self._reader.close()

    def index(self) -> list[Entry]:
        """Every sample in file order, unusable ones included; payloads are skipped, not read.

        Raises:
            InputError: the file is no tar, or holds no sample.
        """
        spans: list[_Span] = []
        cut = ""
        with files.Reader(self.uri, sequential=True) as reader:
            try:
                for member in walk(reader.read, reader.size):
                    if not member.key:
                        continue
                    if not spans or spans[-1].ends_before(member):
                        spans.append(_Span(member))
                    spans[-1].add(member)
            except _CutError as error:
                if error.start == 0:
                    raise InputError(f"{self.uri} is no tar file ({error}). {_remedy(reader.read(0, 4))}") from error
                cut = str(error)
            self.truncated = bool(cut) or (bool(spans) and not any(reader.read(spans[-1].end, BLOCK)))
        if not spans:
            raise InputError(
                f"{self.uri} holds no sample. Expected members such as 000000000.jpg and 000000000.txt; "
                "remove the file from the data, or fetch it again."
            )
        return _entries(spans, cut)

    def read(self, offset: int, size: int) -> Sample:
        """The sample that the index found at `offset`, by one range read.

        Raises:
            BadSample: a member cannot be understood.
            InputError: there is no sample at `offset`, so the file is not the one that was indexed.
        """
        data = self._reader.read(offset, size)
        try:
            members = [m for m in walk(lambda start, length: data[start : start + length], len(data)) if m.key]
        except _CutError:
            members = []
        if not members:
            raise InputError(
                f"{self.uri} has no sample at byte {offset}: the file is not the one that was indexed. "
                "Embed it again, or give the tars that the store was made from."
            )
        return _sample(members, data, self.uri)


@dataclass(frozen=True)
class Member:
    """A regular file in a tar. `start` is its first header block, extended headers included; `data` its first byte.

    `key` and `extension` are webdataset's parts of its name, empty for a name that belongs to no sample.
    """

    key: str
    extension: str
    start: int
    data: int
    size: int
    error: str = ""

    @property
    def end(self) -> int:
        """Where the next header lies."""
        return self.data + _padded(self.size)


class _CutError(Exception):
    """The tar cannot be followed any further; `start` is the header at which that shows."""

    def __init__(self, message: str, start: int) -> None:
        self.start = start
        super().__init__(message)


def walk(read: ReadAt, size: int) -> Iterator[Member]:
    """The regular files of a tar of `size` bytes, in order, reading only headers.

    Understands ustar, GNU long names and sizes, and pax. Raises `_CutError` at a defect, after yielding the member
    whose payload is cut.
    """
    offset = start = 0
    long_name, records = b"", dict[bytes, bytes]()
    while offset < size:
        header = read(offset, BLOCK)
        if not any(header):
            return  # the end mark
        length, kind = _length(header, offset), header[156:157]
        data = offset + BLOCK
        if kind in b"Lxg":
            content = read(data, length)
            if len(content) < length:
                raise _CutError("tar cut", start)
            if kind == b"L":
                long_name = content.rstrip(b"\0")
            elif kind == b"x":
                records = _pax_records(content, start)
        elif kind not in b"K":
            length = int(records.get(b"size", length))
            if kind in b"\x007" or kind == b"0":
                name = records.get(b"path") or long_name or _short_name(header)
                yield _member(name, start, data, length)
            elif kind in b"123456":
                length = 0  # links, devices, folders and pipes have no payload, whatever their size field says
            if data + length > size:
                raise _CutError("tar cut", start)
            long_name, records = b"", {}
        offset = data + _padded(length)
        if not long_name and not records:
            start = offset


