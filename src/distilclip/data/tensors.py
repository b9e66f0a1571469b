"""Write safetensors files with the same bytes each time, and read them through a memory map or in parts."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import xxhash

from distilclip import files
from distilclip.data.reader import Reader
from distilclip.errors import InputError

_DTYPES: dict[str, np.dtype[Any]] = {
    "F16": np.dtype("<f2"),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
    "I8": np.dtype("<i1"),
    "I16": np.dtype("<i2"),
    "I32": np.dtype("<i4"),
    "I64": np.dtype("<i8"),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_MAX_HEADER = 100_000_000  # the format's own limit
HEADER_BYTES = 4096  # of the first read; the headers of a store's files are shorter


class FileDigests(NamedTuple):
    """The digests of a file that was written, in hex: SHA-256, and the quicker XXH3 of 128 bits."""

    sha256: str
    xxh3: str


def write_tensors(path: str, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> FileDigests:
    """Write arrays in the given order with string metadata; return the digests of the file.

    The `safetensors` package writes metadata in another order in every run, so its files have no stable digest.
    """
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    offset = 0
    for name, array in arrays.items():
        header[name] = {
            "dtype": _NAMES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [offset, offset + array.nbytes],
        }
        offset += array.nbytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * ((56 - len(encoded)) % 64)  # 8 bytes of length before it: the data begins at a multiple of 64
    digest, quick = hashlib.sha256(), xxhash.xxh3_128()
    pieces: list[Any] = [len(encoded).to_bytes(8, "little"), encoded, *(_flat(a) for a in arrays.values())]
    with files.atomic_write(path) as file:
        for piece in pieces:
            digest.update(piece)
            quick.update(piece)
            file.write(piece)
    return FileDigests(digest.hexdigest(), quick.hexdigest())


def read_metadata(path: str) -> dict[str, str]:
    """Read the metadata of a safetensors file; only the header is read."""
    with Reader(path) as reader:
        return _read_header(reader)[0].get("__metadata__", {})


def read_tensors(path: str) -> dict[str, np.ndarray]:
    """Read the arrays of a safetensors file: views of a memory map where it is local, copies where it is a URL.

    Raises:
        InputError: the file is no safetensors file, is cut, or holds a dtype that no distilclip file has.
    """
    with Reader(path) as reader:
        header = read_header(reader)
    if files.size(path) != header.end:
        raise InputError(
            f"{path} has {files.size(path)} bytes where its header says {header.end}: it is cut. Write it again."
        )
    content = np.frombuffer(files.read_bytes(path), np.uint8) if files.is_url(path) else np.memmap(path, mode="r")
    return {
        name: content[place.start : place.start + place.num_bytes].view(place.dtype).reshape(place.shape)
        for name, place in header.places.items()
    }


def read_rows(path: str, name: str, start: int, stop: int) -> np.ndarray:
    """Read the rows from `start` to before `stop` of one array of a safetensors file, and nothing else but its header.

    Raises:
        InputError: the file is no safetensors file, or is cut.
    """
    with Reader(path) as reader:
        place = read_header(reader).places[name]
        offset, length = place.row(start)
        content = reader.read(offset, (stop - start) * length)
    if len(content) != (stop - start) * length:
        raise InputError(f"{path} ends within the rows {start} to {stop} of {name}: it is cut. Write it again.")
    return np.frombuffer(content, place.dtype).reshape(stop - start, *place.shape[1:])


@dataclass(frozen=True)
class TensorPlace:
    """Where a tensor lies in its file: `start` is its first byte."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    start: int
    num_bytes: int

    def row(self, row: int) -> tuple[int, int]:
        """Return where a row lies in the file: its first byte, and its number of bytes."""
        length = self.num_bytes // self.shape[0]
        return self.start + row * length, length


@dataclass(frozen=True)
class Header:
    """The header of a safetensors file: string metadata, the places of the tensors, and the bytes of the whole file."""

    metadata: dict[str, str]
    places: dict[str, TensorPlace]
    end: int

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors, by name."""
        return {name: place.shape for name, place in self.places.items()}


def read_header(reader: Reader) -> Header:
    """Read the header of a safetensors file, in one read where it is no longer than `HEADER_BYTES`.

    Raises:
        InputError: the file is no safetensors file, or holds a dtype that no distilclip file has.
    """
    header, start = _read_header(reader)
    places = {name: _place(reader.path, name, spec, start) for name, spec in header.items() if name != "__metadata__"}
    end = max((place.start + place.num_bytes for place in places.values()), default=start)
    return Header(header.get("__metadata__", {}), places, end)


def _place(path: str, name: str, spec: Any, start: int) -> TensorPlace:
    """Return where a tensor lies by what the header says of it; the data begin at `start`."""
    try:
        kind, shape, (first, last) = spec["dtype"], tuple(spec["shape"]), spec["data_offsets"]
        is_sound = all(type(number) is int and number >= 0 for number in (*shape, first, last))
    except (KeyError, TypeError, ValueError):
        is_sound = False
    if not is_sound:
        raise InputError(f"{path} does not say where {name} lies: its header is damaged. Write it again.")
    if not isinstance(kind, str) or kind not in _DTYPES:
        raise InputError(f"{path}: {name} has dtype {kind}, which no distilclip file has.")
    dtype = _DTYPES[kind]
    if math.prod(shape) * dtype.itemsize != last - first:
        raise InputError(f"{path}: the shape {shape} of {name} disagrees with its {last - first} bytes.")
    return TensorPlace(dtype, shape, start + first, last - first)


def _read_header(reader: Reader) -> tuple[dict[str, Any], int]:
    """Return the header, and the position after it, where the data begin."""
    head = reader.read(0, HEADER_BYTES)
    length = int.from_bytes(head[:8], "little")
    try:
        if len(head) < 8 or not 0 < length <= _MAX_HEADER:
            raise ValueError(f"a header of {length} bytes")
        if 8 + length > len(head):
            head += reader.read(len(head), 8 + length - len(head))
        header = json.loads(head[8 : 8 + length])
        metadata = header.get("__metadata__", {})
        if not all(isinstance(text, str) for item in metadata.items() for text in item):
            raise ValueError("metadata that are no text")
    except (ValueError, AttributeError, RecursionError) as error:
        raise InputError(f"{reader.path} is no safetensors file ({error}). Write it again.") from error
    return header, 8 + length


def _flat(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)
