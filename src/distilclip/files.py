"""List, read and write files at local paths and fsspec URLs alike. Imports no torch."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import os
import re
import secrets
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import fsspec

from distilclip.errors import InputError


def is_url(path: str) -> bool:
    """Return whether a path is `scheme://...`; a local path has no scheme."""
    return "://" in path


def join(base: str, *names: str) -> str:
    """Return `base/name/name`, for paths and URLs."""
    return "/".join([base.rstrip("/") or "/", *names])


def absolute(path: str) -> str:
    """Return an absolute local path, or the URL as it is, so that a place has one spelling."""
    return path.rstrip("/") if is_url(path) else os.path.abspath(path)


def filesystem(path: str) -> tuple[Any, str]:
    """Return the fsspec file system of a path or URL, and the path inside it."""
    return fsspec.core.url_to_fs(path)


def exists(path: str) -> bool:
    """Return whether a file or folder exists."""
    if not is_url(path):
        return os.path.exists(path)
    fs, inner = filesystem(path)
    return bool(fs.exists(inner))


def size(path: str) -> int:
    """Return the number of bytes of a file."""
    if not is_url(path):
        return os.path.getsize(path)
    fs, inner = filesystem(path)
    return int(fs.size(inner))


def open_read(path: str) -> Any:
    """Open a seekable binary file for reading."""
    if not is_url(path):
        return open(path, "rb")
    fs, inner = filesystem(path)
    return fs.open(inner, "rb")


def read_bytes(path: str) -> bytes:
    """Read a whole file."""
    with open_read(path) as file:
        return file.read()


def read_range(path: str, offset: int, length: int) -> bytes:
    """Read `length` bytes from `offset`; fewer only where the file ends."""
    if not is_url(path):
        with open(path, "rb") as file:
            file.seek(offset)
            return file.read(length)
    fs, inner = filesystem(path)
    return fs.cat_file(inner, start=offset, end=offset + length)


def sha256(path: str) -> str:
    """Return the SHA-256 of a file, as 64 hex digits."""
    digest = hashlib.sha256()
    with open_read(path) as file:
        while piece := file.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()


@contextlib.contextmanager
def local_copy(path: str) -> Iterator[str]:
    """Yield the path itself where it is local, else a temporary download, removed after the block."""
    if not is_url(path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="distilclip-") as folder:
        copy = os.path.join(folder, os.path.basename(path))
        fs, inner = filesystem(path)
        fs.get_file(inner, copy)
        yield copy


@contextlib.contextmanager
def atomic_write(path: str) -> Iterator[Any]:
    """Write a file that appears whole or not at all: temporary name, flush, fsync, rename.

    Object stores publish an object when it is closed, so there it is written under a temporary name and moved. A
    failure inside the block removes it again.
    """
    if is_url(path):
        fs, inner = filesystem(path)
        fs.makedirs(os.path.dirname(inner), exist_ok=True)
        temporary = f"{inner}.{secrets.token_hex(4)}.tmp"
        try:
            with fs.open(temporary, "wb") as file:
                yield file
            fs.mv(temporary, inner)
        except BaseException:
            if fs.exists(temporary):
                fs.rm(temporary)
            raise
        return
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    temporary = f"{path}.{os.getpid()}.{secrets.token_hex(4)}.tmp"
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        if os.path.exists(temporary):
            os.remove(temporary)
        raise


def write_bytes(path: str, content: bytes) -> None:
    """Write a whole file atomically."""
    with atomic_write(path) as file:
        file.write(content)


def remove_folder(path: str) -> None:
    """Remove a folder with everything in it, if it exists."""
    system, inner = filesystem(path)
    if system.exists(inner):
        system.rm(inner, recursive=True)


def expand_braces(pattern: str) -> list[str]:
    """Expand `{00000..00012}` and `{a,b}`; zero padding is kept, as webdataset writes shard patterns."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if not match:
        return [pattern]
    body = match.group(1)
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)", body)
    if numbers:
        first, last = numbers.groups()
        if int(last) < int(first):
            raise InputError(f"{pattern!r}: the range {{{body}}} runs backwards; write {{{last}..{first}}}.")
        width = len(first) if first.startswith("0") or len(first) == len(last) else 0
        options = [str(i).zfill(width) for i in range(int(first), int(last) + 1)]
    elif "," in body:
        options = body.split(",")
    else:
        raise InputError(f"{pattern!r}: {{{body}}} is neither a range {{000..123}} nor a list {{a,b}}.")
    return [rest for o in options for rest in expand_braces(pattern[: match.start()] + o + pattern[match.end() :])]


def expand(patterns: str | Sequence[str]) -> list[str]:
    """Return every file that the patterns name (braces, then globs), each once, in the order given, globs sorted.

    Raises `InputError` for a pattern that matches nothing.
    """
    found: dict[str, None] = {}
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        for path in expand_braces(str(pattern)):
            if not any(c in path for c in "*?["):
                matches = [path] if exists(path) else []
            elif is_url(path):
                fs, inner = filesystem(path)
                matches = sorted(fs.unstrip_protocol(p) for p in fs.glob(inner))
            else:
                matches = sorted(glob.glob(path))
            if not matches:
                raise InputError(
                    f"No file matches {path!r} (from {pattern!r}). Check the path and the shell's quoting."
                )
            found.update(dict.fromkeys(matches))
    return list(found)
