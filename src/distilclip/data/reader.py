"""Read parts of local and remote files, fetch them ahead, and limit how many files stay open."""

from __future__ import annotations

import io
import os
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

from distilclip import files

NUM_REQUESTS = 16
"""Requests that a process has under way at the same time for remote files."""


class Reader:
    """Reads ranges of a file, which is opened on first use and again in every other process.

    `sequential=True` suits a forward pass over a remote file: bytes are fetched ahead in large blocks, where otherwise
    each read is one request of exactly its range.
    """

    def __init__(self, path: str, *, sequential: bool = False) -> None:
        self.path, self.sequential, self._remote = path, sequential, files.is_url(path)
        self._file: Any = None
        self._ahead: dict[tuple[int, int], Future[bytes]] = {}
        self._process = 0

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None, "_ahead": {}}

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def size(self) -> int:
        """Number of bytes of the file."""
        return files.size(self.path)

    def prefetch(self, offset: int, length: int) -> None:
        """Begin to fetch a range that `read` will ask for soon, so that waiting for the storage overlaps."""
        if self._remote:
            request = _requests(os.getpid()).submit(files.read_range, self.path, offset, length)
            self._ahead[offset, length] = request
        elif hasattr(os, "posix_fadvise"):  # not on macOS
            os.posix_fadvise(self._open_file().fileno(), offset, length, os.POSIX_FADV_WILLNEED)

    def read(self, offset: int, length: int) -> bytes:
        """Return `length` bytes from `offset`; fewer only where the file ends."""
        if self._remote:
            request = self._ahead.pop((offset, length), None)
            if request is not None:
                return request.result()
            if not self.sequential:
                return files.read_range(self.path, offset, length)
        file = self._open_file()
        file.seek(offset)
        return file.read(length)

    def close(self) -> None:
        """Close the file; the next read opens it again."""
        self._ahead.clear()
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open_file(self) -> Any:
        if self._file is None or self._process != os.getpid():
            # Unbuffered, since a buffer would fetch 8 KiB for each tar header of 512 bytes.
            self._file = files.open_read(self.path) if self._remote else io.FileIO(self.path)
            self._process = os.getpid()
        return self._file


@runtime_checkable
class Closable(Protocol):
    """An open file, or an object that holds one."""

    def close(self) -> None:
        """Close the file."""


Key = TypeVar("Key", bound=Hashable)
File = TypeVar("File", bound=Closable)


class OpenFiles(Generic[Key, File]):
    """The files that a process has open, by key: at most `limit`; the one unused for the longest is closed first."""

    def __init__(self, open_file: Callable[[Key], File], *, limit: int) -> None:
        self.open_file, self.limit = open_file, limit
        self._open: OrderedDict[Key, File] = OrderedDict()
        self._process = os.getpid()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict(), "_process": 0}

    def __getitem__(self, key: Key) -> File:
        if self._process != os.getpid():  # forked: the parent's file positions are not ours to move
            self._open, self._process = OrderedDict(), os.getpid()
        file = self._open.pop(key, None) or self.open_file(key)
        self._open[key] = file
        if len(self._open) > self.limit:
            self._open.popitem(last=False)[1].close()
        return file


@lru_cache(maxsize=1)
def _requests(process: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(NUM_REQUESTS)  # one for each process: threads do not survive a fork
