"""Read samples of a tar at known offsets: the index is made from headers alone, and a sample is one range read.

The headers are parsed here and not by `tarfile`, which walks forward from the start and gives up at the first defect:
training needs single samples at known offsets, and of a damaged tar its good part.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

from distilclip.data.limits import Side
from distilclip.data.reader import Reader
from distilclip.data.samples import (
    IMAGE_EXTENSIONS,
    LABEL_EXTENSIONS,
    Entry,
    Sample,
    clean_caption,
    decode_meta,
    decode_text,
    first_caption,
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
        self._reader = Reader(uri)

    def close(self) -> None:
        """Close the file; the next read opens it again."""
        self._reader.close()

    def index(self, may_lack: Collection[Side] = ()) -> list[Entry]:
        """Return every sample in file order, unusable ones included; contents are skipped, not read.

        Where a tar is cut or damaged, the last entry stands for all that is lost: the sample that is cut, or an entry
        without key at the byte where the tar cannot be followed any more.

        Raises:
            InputError: the file is no tar, or holds no sample.
        """
        spans: list[_Span] = []
        lost: list[Entry] = []
        with Reader(self.uri, sequential=True) as reader:
            try:
                for member in walk(reader.read, reader.size):
                    if not member.key:
                        continue
                    if not spans or spans[-1].ends_before(member):
                        spans.append(_Span(member))
                    spans[-1].add(member)
            except CutError as error:
                if error.start == 0 and not spans:
                    raise InputError(f"{self.uri} is no tar file ({error}). {_remedy(reader.read(0, 4))}") from error
                if not spans or spans[-1].error != _CUT:
                    lost = [Entry("", error.start, 0, str(error))]
            end = reader.read(max(0, reader.size - BLOCK), BLOCK)
            self.truncated = bool(lost) or any(end) or reader.size % BLOCK != 0
        if not spans:
            raise InputError(
                f"{self.uri} holds no sample. Expected members such as 000000000.jpg and 000000000.txt; "
                "remove the file from the data, or fetch it again."
            )
        return _entries(spans) + lost

    def prefetch(self, offset: int, size: int) -> None:
        """Begin to fetch a sample that `read` will ask for soon."""
        self._reader.prefetch(offset, size)

    def read(self, offset: int, size: int) -> Sample:
        """Return the sample that the index found at `offset`, by one range read.

        Raises:
            BadSample: a member cannot be understood.
            InputError: there is no sample at `offset`, so the file is not the one that was indexed.
        """
        data = self._reader.read(offset, size)
        try:
            members = [m for m in walk(lambda start, length: data[start : start + length], len(data)) if m.key]
        except CutError:
            members = []
        if not members:
            raise InputError(
                f"{self.uri} has no sample at byte {offset}: the file is not the one that was indexed. "
                "Embed it again, or give the tars that the store was made from."
            )
        return sample_of(members[0].key, members, lambda m: data[m.data : m.data + m.size], uri=self.uri)


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
        """Position of the next header."""
        return self.data + _fill_block(self.size)


class CutError(Exception):
    """The tar cannot be followed any further; `start` is the header at which that shows."""

    def __init__(self, message: str, start: int) -> None:
        self.start = start
        super().__init__(message)


def walk(read: ReadAt, size: int) -> Iterator[Member]:
    """Yield the regular files of a tar of `size` bytes, in order; only headers are read.

    Understands ustar, GNU long names and sizes, and pax. Raises `CutError` at a defect, after yielding the member
    whose payload is cut.
    """
    start = offset = 0
    long_name, pax = b"", dict[bytes, bytes]()
    while offset < size:
        header = read(offset, BLOCK)
        if not any(header):
            return  # the end mark
        kind, length, data = header[156:157], _header_length(header, offset), offset + BLOCK
        if kind in (_LONG_NAME, _PAX):
            content = read(data, length)
            if len(content) < length:
                raise CutError(_CUT, start)
            if kind == _LONG_NAME:
                long_name = content.rstrip(b"\0")
            else:
                pax = _pax_records(content, start)
        elif kind not in _OTHER_EXTENDED:
            length = 0 if kind in _WITHOUT_PAYLOAD else _pax_length(pax, length, start)
            if kind in _REGULAR:
                name = pax.get(b"path") or long_name or _ustar_name(header)
                yield _member(name, start, data, length, error=_CUT if data + length > size else "")
            if data + length > size:
                raise CutError(_CUT, start)
            long_name, pax = b"", {}
        offset = data + _fill_block(length)
        if not long_name and not pax:
            start = offset


_REGULAR = (b"0", b"\0", b"7")
_WITHOUT_PAYLOAD = (b"1", b"2", b"3", b"4", b"5", b"6")  # links, devices, folders, pipes, whatever their size says
_LONG_NAME, _PAX = b"L", b"x"
_CUT = "tar cut"
_OTHER_EXTENDED = (b"K", b"g", b"X")  # long link names, global pax records


def _fill_block(length: int) -> int:
    return -(-length // BLOCK) * BLOCK


def _header_length(header: bytes, offset: int) -> int:
    """Return the size field of a header, once its checksum holds (POSIX.1-1988; base 256 as in GNU tar)."""
    if len(header) < BLOCK:
        raise CutError(_CUT, offset)
    try:
        checksum = int(header[148:156].strip(b"\0 "), 8)
        field_ = header[124:136]
        length = int.from_bytes(field_[1:], "big") if field_[0] == 0x80 else int(field_.strip(b"\0 ") or b"0", 8)
    except ValueError as error:
        raise CutError(f"tar damaged: no header at byte {offset}", offset) from error
    # The sum of all bytes, its own eight counted as spaces. The low half of Adler-32 is 1 + that sum modulo 65521, at a
    # tenth of the cost of `sum`.
    total = zlib.adler32(header[:148] + b" " * 8 + header[156:]) & 0xFFFF
    if (checksum + 1) % 65521 != total:
        raise CutError(f"tar damaged: wrong checksum at byte {offset}", offset)
    return length


def _pax_records(content: bytes, start: int) -> dict[bytes, bytes]:
    """Parse extended headers: `length key=value\\n`, repeated (POSIX.1-2001)."""
    records = {}
    position = 0
    while position < len(content):
        digits, space, _ = content[position : position + 20].partition(b" ")
        if not space or not digits.isdigit() or int(digits) <= len(digits) + 2:
            raise CutError(f"tar damaged: bad pax record at byte {start}", start)
        key, _, value = content[position + len(digits) + 1 : position + int(digits) - 1].partition(b"=")
        records[key] = value
        position += int(digits)
    return records


def _pax_length(pax: dict[bytes, bytes], length: int, start: int) -> int:
    text = pax.get(b"size")
    if text is None:
        return length
    if not text.isdigit():
        raise CutError(f"tar damaged: bad pax size at byte {start}", start)
    return int(text)


def _ustar_name(header: bytes) -> bytes:
    name = header[:100].partition(b"\0")[0]
    if header[257:263] == b"ustar\0":  # GNU's older magic keeps times where POSIX keeps the prefix
        prefix = header[345:500].partition(b"\0")[0]
        return prefix + b"/" + name if prefix else name
    return name


def _member(raw_name: bytes, start: int, data: int, size: int, *, error: str) -> Member:
    try:
        name = raw_name.decode("utf-8")
    except UnicodeDecodeError:
        name, error = raw_name.decode("utf-8", "backslashreplace"), error or "member name is not UTF-8"
    if name.startswith("/") or ".." in name.split("/"):
        error = error or "unsafe member name"
    match = _NAME.fullmatch(name)
    key, extension = (match[1], match[2].lower()) if match else ("", "")
    return Member(key, extension, start, data, size, error)


@dataclass
class _Span:
    """Adjacent members of one key while the index is being made."""

    first: Member
    end: int = 0
    error: str = ""
    extensions: set[str] = field(default_factory=set)

    def ends_before(self, member: Member) -> bool:
        """Return whether `member` begins another sample: another key, or this key's extension a second time."""
        return member.key != self.first.key or member.extension in self.extensions

    def add(self, member: Member) -> None:
        self.extensions.add(member.extension)
        self.end = member.end
        self.error = member.error or self.error


def _entries(spans: list[_Span]) -> list[Entry]:
    entries = []
    seen: set[str] = set()
    for span in spans:
        key, start, size = span.first.key, span.first.start, span.end - span.first.start
        error = span.error
        if not error and key in seen:
            error = "duplicate key"
        elif not error and size > MAX_SPAN:
            error = "sample larger than 4 GiB"
        elif not error and not span.extensions & IMAGE_EXTENSIONS:
            error = "no image"
        seen.add(key)
        entries.append(Entry(key, start, min(size, MAX_SPAN), error))
    return entries


def sample_of(key: str, members: list[Member], read: Callable[[Member], bytes], *, uri: str) -> Sample:
    """Return the sample that these members make; `read` returns their contents. Raises `BadSample` for nonsense."""
    where = f"{uri}: {key}"
    image = caption = label = None
    meta: dict[str, Any] = {}
    for member in members:
        content = read(member)
        if member.extension in IMAGE_EXTENSIONS:
            image = content if image is None else image
        elif member.extension == "txt":
            caption = clean_caption(decode_text(content, name="caption", where=where))
        elif member.extension == "json":
            meta = decode_meta(content, where=where)
        elif member.extension in LABEL_EXTENSIONS:
            label = decode_text(content, name="label", where=where)
    if caption is None:
        caption = first_caption(meta.get("caption"), meta.get("captions"), where=where)
    return Sample(key, image, caption, meta, label)


def _remedy(magic: bytes) -> str:
    if magic[:2] == b"\x1f\x8b" or magic[:4] == b"\x28\xb5\x2f\xfd" or magic[:3] == b"BZh":
        return "It is compressed, and compressed tars have no random access: decompress it first."
    return "Remove it from the data, or fetch it again."
