"""Read parts of local and remote files, fetch them ahead, copy what is read often, and limit how many stay open."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import os
import queue
import shutil
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

from distilclip import digests, files
from distilclip.errors import InputError
from distilclip.messages import say

NUM_REQUESTS = 16
"""Requests that a process has under way at the same time for remote files."""
COPY_AFTER = 32
"""Reads of a remote file, by one process, after which it is worth a local copy: far fewer than an epoch has."""
FREE_SHARE = 0.2
"""Share of the disk that copies leave free."""
COPIES_VARIABLE = "DISTILCLIP_COPIES"


class Reader:
    """Reads ranges of a file, which is opened on first use and again in every other process.

    `sequential=True` suits a forward pass over a remote file: bytes are fetched ahead in large blocks, where otherwise
    each read is one request of exactly its range. `copied=True` suits many small reads of a remote file: it is copied
    to this machine's disk meanwhile, and then read there (see `_request_copy`), which compares it with `digest`.
    """

    def __init__(self, path: str, *, sequential: bool = False, copied: bool = False, digest: str | None = None) -> None:
        self.path, self.sequential, self.digest = path, sequential, digest
        self._remote = files.is_url(path)
        self._file: Any = None
        self._ahead: dict[tuple[int, int], Future[bytes]] = {}
        self._process = 0
        self._reads_to_copy = COPY_AFTER if copied and self._remote else -1
        self._copy: _CopyRequest | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None, "_ahead": {}, "_copy": None}

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
        self._use_copy()
        if self._remote:
            request = _requests(os.getpid()).submit(files.read_range, self.path, offset, length)
            self._ahead[offset, length] = request
        elif hasattr(os, "posix_fadvise"):  # not on macOS
            os.posix_fadvise(self._open_file().fileno(), offset, length, os.POSIX_FADV_WILLNEED)

    def read(self, offset: int, length: int) -> bytes:
        """Return `length` bytes from `offset`; fewer only where the file ends."""
        self._use_copy()
        request = self._ahead.pop((offset, length), None)
        if request is not None:
            return request.result()
        if self._remote and not self.sequential:
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

    def _use_copy(self) -> None:
        """Read from the copy from now on, if there is one; ask for it when the file was read often enough."""
        if self._reads_to_copy < 0:
            return
        if self._reads_to_copy:
            self._reads_to_copy -= 1
            return
        self._copy = self._copy or _request_copy(self.path, self.digest)
        if self._copy.fault:
            raise InputError(self._copy.fault)
        if self._copy.done:
            self._reads_to_copy = -1
            if self._copy.path is not None:
                self.path, self._remote = self._copy.path, False

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


@dataclass
class _CopyRequest:
    """A file that is to be copied. When it is `done`, `path` is its copy, or None where there is no room for one.

    `fault` says that the file has not the digest it must have.
    """

    uri: str
    digest: str | None
    fault: str = ""
    done: bool = False
    path: str | None = None


def _request_copy(uri: str, digest: str | None) -> _CopyRequest:
    """Ask for a copy of a remote file, which a thread of this process makes, unless another process has made it.

    Training reads two small rows of embeddings for each picture: without copies, two of three requests to the storage.
    Their order is random, so that neighbours share no block, and a cache of blocks in memory would help nobody.

    Copies lie in the folder that `DISTILCLIP_COPIES` names (0: none are made), else in one of this user's in the
    temporary folder. They are named by what the storage says of the file (its address and ETag, or the like), so that
    a file that has changed is another one. Removing the folder does no harm.
    """
    return _Copier.of_process(os.getpid()).request(uri, digest)


class _Copier:
    def __init__(self) -> None:
        self._requests: dict[str, _CopyRequest] = {}
        self._todo: queue.SimpleQueue[_CopyRequest] = queue.SimpleQueue()
        self._lock = threading.Lock()
        threading.Thread(target=self._work, daemon=True).start()  # a process does not wait for its copies to end

    @staticmethod
    @lru_cache(maxsize=1)
    def of_process(process: int) -> _Copier:
        return _Copier()  # threads do not survive a fork

    def request(self, uri: str, digest: str | None) -> _CopyRequest:
        with self._lock:
            if uri not in self._requests:
                self._requests[uri] = _CopyRequest(uri, digest)
                self._todo.put(self._requests[uri])
            return self._requests[uri]

    def _work(self) -> None:
        folder = _open_folder()
        while True:
            request = self._todo.get()
            try:
                request.path = None if folder is None else _copy(request.uri, folder, request.digest)
            except InputError as error:
                request.fault = str(error)
            except Exception as error:  # of any storage's library; the file is then read where it lies
                say(f"{request.uri} could not be copied to {folder} ({error}); it is read where it lies.")
            request.done = True


def shared_copy(uri: str) -> str | None:
    """Return the path of a copy of a remote file that all processes of this machine share; None where there is no room.

    It lies where the copies of `_request_copy` lie.
    """
    folder = _open_folder()
    return None if folder is None else _copy(uri, folder, None)


def _open_folder() -> str | None:
    """Return the folder of copies, which belongs to this user alone."""
    named = os.environ.get(COPIES_VARIABLE)
    if named == "0":
        return None
    folder = named or os.path.join(tempfile.gettempdir(), f"distilclip-copies-{os.getuid()}")
    os.makedirs(folder, mode=0o700, exist_ok=True)
    return folder if os.stat(folder).st_uid == os.getuid() else None


def _copy(uri: str, folder: str, digest: str | None) -> str | None:
    """Return the path of a copy, made now or before; None where the disk has no room.

    Raises `InputError`, and leaves no copy, where the file has another digest than `digest`.
    """
    system, inner = files.filesystem(uri)
    path = os.path.join(folder, hashlib.sha256(f"{uri} {system.ukey(inner)}".encode()).hexdigest())
    if os.path.exists(path):
        return path
    with open(f"{path}.part", "ab") as part:
        fcntl.flock(part, fcntl.LOCK_EX)  # one process copies a file, the others wait; a dead one holds no lock
        if os.path.exists(path):
            return path
        part.truncate(0)
        disk = shutil.disk_usage(folder)
        if disk.free - files.size(uri) < FREE_SHARE * disk.total:
            with contextlib.suppress(FileNotFoundError):
                os.remove(part.name)
            return None
        with files.open_read(uri) as source:
            shutil.copyfileobj(source, part, 1 << 22)
        part.flush()
        if digest is not None and not files.has_digest(part.name, digest):
            os.remove(part.name)
            remedy = "`distilclip verify` on its folder says what else is damaged, and repairs it with --repair."
            raise InputError(digests.describe_change(uri, remedy))
        os.replace(part.name, path)
    return path
