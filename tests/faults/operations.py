"""Count the file operations of a process, and end it or let one fail at the n-th.

An audit hook of Python sees every opening, renaming, linking, removing and making of folders, also those of other
packages. Files that are opened for writing are replaced by ones that count their writes, as they reach the system.
"""

from __future__ import annotations

import builtins
import io
import os
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

Fault = Literal["none", "kill", "tear", "fail once", "fail from here"]
CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate"}
ALL = frozenset({"read", "open", "write", "fsync", *CHANGES})
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


@dataclass(frozen=True, kw_only=True)
class Trap:
    """What is to happen, and at which operation.

    Attributes:
        at: the number of the operation, from 1; 0 for none.
        fault: `kill` ends the process before the operation, `tear` in the middle of it where it is a write; the other
            two let it fail.
        error: what a failing operation raises, as one of errno's numbers.
        kinds: the operations that count: `read` (opening to read), `open` (to write), `write`, `fsync`, and CHANGES.
    """

    at: int = 0
    fault: Fault = "none"
    error: int = 0
    kinds: frozenset[str] = ALL


class Operations:
    """Watches the files below some folders for the rest of this process; `log` gets a line for every operation."""

    def __init__(self, trap: Trap, folders: tuple[str, ...], log: int) -> None:
        self._trap, self._folders, self._log = trap, folders, log
        self._count = 0
        self._lock = threading.RLock()
        self._open: Callable[..., Any] = builtins.open

    def watch(self) -> None:
        """Begin. There is no end: an audit hook stays as long as its process."""
        sys.addaudithook(self._hear)
        builtins.open = io.open = self._open_watched  # type: ignore[assignment]
        fsync = os.fsync

        def fsync_watched(descriptor: int) -> None:
            self.meet("fsync", os.readlink(f"/proc/self/fd/{descriptor}"))
            fsync(descriptor)

        os.fsync = fsync_watched  # type: ignore[assignment]

    def is_watched(self, path: Any) -> bool:
        """Whether an operation on this path counts."""
        if not isinstance(path, str | bytes | os.PathLike):
            return False
        return os.path.abspath(os.fsdecode(path)).startswith(self._folders)

    def meet(self, kind: str, path: Any, tear: Callable[[], object] = lambda: None, source: Any = None) -> None:
        """Count one operation before it is done; end the process or raise where the trap says so."""
        if kind not in self._trap.kinds or not self.is_watched(path):
            return
        with self._lock:
            self._count += 1
            number = self._count
            os.write(self._log, f"{number}\t{kind}\t{os.path.abspath(os.fsdecode(path))}\n".encode())
        trap = self._trap
        if (trap.fault == "fail from here" and trap.at and number > trap.at) or number == trap.at:
            if trap.fault in ("tear", "fail once", "fail from here"):
                tear()
            if trap.fault in ("kill", "tear"):
                os.kill(os.getpid(), signal.SIGKILL)
            if trap.error:
                self._raise(kind, path, source)

    def _raise(self, kind: str, path: Any, source: Any) -> None:
        said = self._trap.error, os.strerror(self._trap.error)
        if kind in ("write", "fsync"):  # those know a number, and no name
            raise OSError(*said)
        raise OSError(*said, path) if source is None else OSError(*said, source, None, path)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if isinstance(flags, int) and self.is_watched(path):
                self.meet("open" if flags & _WRITING else "read", path)
        elif event == "os.mkdir" and os.path.isdir(arguments[0]):  # `exist_ok`: it changes nothing
            return
        elif event in CHANGES:
            if event in ("os.rename", "os.link"):
                self.meet(event, arguments[1], source=arguments[0])
            else:
                self.meet(event, arguments[0])

    def _open_watched(self, file: Any, mode: str = "r", buffering: int = -1, *rest: Any, **options: Any) -> Any:
        if not set(mode) & set("wax+") or not self.is_watched(file) or options.get("opener"):
            return self._open(file, mode, buffering, *rest, **options)
        raw = _WatchedFile(file, mode.replace("b", "").replace("t", ""))
        raw.meet = self.meet
        if buffering == 0:
            return raw
        buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, *rest, **options)


class _WatchedFile(io.FileIO):
    meet: Callable[..., None]

    def write(self, content: Any) -> int:
        piece = memoryview(content).cast("B")
        self.meet("write", self.name, lambda: super(_WatchedFile, self).write(piece[: len(piece) // 2]))
        return super().write(piece)
