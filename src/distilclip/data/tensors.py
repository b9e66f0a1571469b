"""Safetensors files: written with the same bytes each time, read through memory maps."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from distilclip.data import files
from distilclip.errors import InputError

_DTYPES: dict[str, np.dtype[Any]] = {
    "F16": np.dtype("<f2"),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
    "I8": np.dtype("<i1"),
    "I32": np.dtype("<i4"),
    "I64": np.dtype("<i8"),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_MAX_HEADER = 100_000_000  # the format's own limit


def write_tensors(path: str, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> str:
    """Write arrays in the given order with string metadata; the SHA-256 of the file, as 64 hex digits.

    The `safetensors` package keeps metadata in a hash map, so that its files differ from run to run; hence this writer.
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
    digest = hashlib.sha256()
    pieces: list[Any] = [len(encoded).to_bytes(8, "little"), encoded, *(_flat(a) for a in arrays.values())]
    with files.atomic_write(path) as file:
        for piece in pieces:
            digest.update(piece)
            file.write(piece)
    return digest.hexdigest()


def read_metadata(path: str) -> dict[str, str]:
    """The metadata of a safetensors file; of the file only the header is read."""
    return _read_header(path)[0].get("__metadata__", {})


def read_tensors(path: str) -> dict[str, np.ndarray]:
    """The arrays of a safetensors file: read-only memory maps where the file is local, copies where it is a URL.

    Raises:
        InputError: the file is no safetensors file, is cut, or holds a dtype that no distilclip file has.
    """
    header, start = _read_header(path)
    tensors = {name: spec for name, spec in header.items() if name != "__metadata__"}
    end = start + max((spec["data_offsets"][1] for spec in tensors.values()), default=0)
    if files.size(path) != end:
        raise InputError(f"{path} has {files.size(path)} bytes where its header says {end}: it is cut. Write it again.")
    content = np.frombuffer(files.read_bytes(path), np.uint8) if files.is_url(path) else np.memmap(path, mode="r")
    arrays = {}
    for name, spec in tensors.items():
        if spec["dtype"] not in _DTYPES:
            raise InputError(f"{path}: {name} has dtype {spec['dtype']}, which no distilclip file has.")
        first, last = spec["data_offsets"]
        dtype, shape = _DTYPES[spec["dtype"]], tuple(spec["shape"])
        if math.prod(shape) * dtype.itemsize != last - first:
            raise InputError(f"{path}: the shape {shape} of {name} disagrees with its {last - first} bytes.")
        arrays[name] = content[start + first : start + last].view(dtype).reshape(shape)
    return arrays


def _read_header(path: str) -> tuple[dict[str, Any], int]:
    length = int.from_bytes(files.read_range(path, 0, 8), "little")
    try:
        if not 0 < length <= min(_MAX_HEADER, files.size(path) - 8):
            raise ValueError(f"a header of {length} bytes")
        header = json.loads(files.read_range(path, 8, length))
    except ValueError as error:
        raise InputError(f"{path} is no safetensors file ({error}). Write it again.") from error
    return header, 8 + length


def _flat(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)
