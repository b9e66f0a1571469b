"""Let one process at a time write a folder: its lock.json says which, on which machine and since when.

The lock of a dead process is taken over. On one machine the process table tells. From another machine only silence
does: a holder touches lock.json every 15 seconds. Finished folders have no lock, and many may read them.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import platform
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from distilclip import files
from distilclip.errors import InputError
from distilclip.messages import say

NAME = "lock.json"
BEAT_SECONDS = 15.0
"""How often a holder touches its lock."""
SILENT_SECONDS = 300.0
"""A holder on another machine that was silent for this long is dead."""


@dataclass(frozen=True, kw_only=True)
class Holder:
    """The process that holds a folder. `machine` tells apart boots and containers that share a host name."""

    host: str
    machine: str
    pid: int
    started: str
    since: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"


_held: dict[str, Holder] = {}
_beating = threading.Event()


def hold(path: str) -> None:
    """Take a folder for this process until `release`, or until the process ends. Creates the folder.

    Raises `InputError` where another process holds it, and says which. The lock of another machine is watched first,
    for at most `SILENT_SECONDS`.
    """
    place = files.absolute(path)
    if _is_ours(place):
        return
    if not files.is_url(place):
        os.makedirs(place, exist_ok=True)
    lock, holder = files.join(place, NAME), _this_process()
    content = _content(holder)
    silent: Holder | None = None
    while True:
        with _one_at_a_time(place):
            taken = files.create_bytes(lock, content)
            before = None if taken else _read(lock)
            if before is not None and (before == silent or _is_gone(before)):
                files.write_bytes(lock, content)
                taken = True
            if taken and not files.is_url(place):  # here, where no other process is writing one
                _remove_temporaries(place)
        if taken and _read(lock) == holder:  # where storage cannot create exclusively, the last to write has it
            break
        before = before or _read(lock)
        if before is None:
            continue
        if _is_here(before) or _gives_sign(lock, before):
            raise InputError(_explain(path, lock, before))
        silent = before
    _held[place] = holder
    _begin_beating()


def release(path: str) -> None:
    """Give a folder back. Does nothing where this process does not hold it."""
    place = files.absolute(path)
    if not _is_ours(place):
        return
    holder, lock = _held.pop(place), files.join(place, NAME)
    with contextlib.suppress(OSError):
        if _read(lock) == holder:
            files.remove(lock)


def remove_stale(path: str) -> None:
    """Remove the lock of a process that was killed between finishing a folder and giving it back, if there is one."""
    lock = files.join(files.absolute(path), NAME)
    with contextlib.suppress(OSError):  # it harms nobody, and the folder may be read-only
        before = _read(lock)
        if before is not None and _is_gone(before):
            files.remove(lock)


def release_all() -> None:
    """Give back every folder that this process holds, before it ends."""
    for place in list(_held):
        release(place)


@contextlib.contextmanager
def held_for_block() -> Iterator[None]:
    """Give back after the block what was taken in it, also after an error."""
    before = set(_held)
    try:
        yield
    finally:
        for place in set(_held) - before:
            release(place)


def _is_ours(place: str) -> bool:
    return place in _held and _held[place].pid == os.getpid()  # a forked process inherits the table, not the locks


def _explain(path: str, lock: str, holder: Holder) -> str:
    after = "" if _is_here(holder) else f" If that process is dead, remove {lock}."
    return f"{path} is held by {holder}, which writes it. Wait until it ends, or choose another --out.{after}"


def _content(holder: Holder) -> bytes:
    return (json.dumps(asdict(holder), indent=2) + "\n").encode()


def _this_process() -> Holder:
    return Holder(
        host=platform.node(),
        machine=_machine(),
        pid=os.getpid(),
        started=_start_of(os.getpid()) or "",
        since=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    )


def _machine() -> str:
    """Return what tells apart two boots, and two containers with process tables of their own; empty if unknown."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _is_here(holder: Holder) -> bool:
    return os.name == "posix" and (holder.host, holder.machine) == (platform.node(), _machine())


def _is_gone(holder: Holder) -> bool:
    """Whether the process was on this machine and has ended, or its number now belongs to another."""
    if not _is_here(holder):
        return False
    started = _start_of(holder.pid)
    if started is not None:
        return started != holder.started
    try:
        os.kill(holder.pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # of another user
        return False
    return os.path.isdir("/proc/self")  # it is a zombie there; without /proc, it runs


def _start_of(pid: int) -> str | None:
    """Return when a process started, in the ticks of Linux; None for one that has ended, and without /proc."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            words = file.read().rpartition(b")")[2].split()
    except OSError:
        return None
    return None if words[0] in (b"Z", b"X") else words[19].decode()


def _read(lock: str) -> Holder | None:
    """Return who holds a folder; None where nobody does. A damaged lock is one of an unknown machine."""
    try:
        content = files.read_bytes(lock)
    except FileNotFoundError:
        return None
    try:
        values = json.loads(content)
        return Holder(**{**values, "pid": int(values["pid"])})
    except (ValueError, TypeError, KeyError):
        return Holder(host="an unknown machine", machine="", pid=0, started="", since="an unknown time")


def _gives_sign(lock: str, holder: Holder) -> bool:
    """Watch the lock of another machine: whether it is touched, or changes, before it was silent for too long."""
    first = files.modified(lock)
    if first is None:
        return True  # released: whoever asked looks again
    say(f"{os.path.dirname(lock)} is held by {holder}; waiting for a sign of life from there")
    # Clocks of machines differ, hence two beats at least.
    wait = min(SILENT_SECONDS, max(2 * BEAT_SECONDS, SILENT_SECONDS - (time.time() - first)))
    end = time.monotonic() + wait
    while time.monotonic() < end:
        time.sleep(min(1.0, BEAT_SECONDS / 4))
        if files.modified(lock) != first:
            return True
    return False


@contextlib.contextmanager
def _one_at_a_time(folder: str) -> Iterator[None]:
    """Keep others on this machine from judging the same lock at once, where the system can."""
    try:
        import fcntl

        descriptor = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):
        yield
        return
    try:
        with contextlib.suppress(OSError):  # network file systems may lack it
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _remove_temporaries(folder: str) -> None:
    """Remove what processes that were killed while they wrote a lock left of it."""
    for name in os.listdir(folder):
        if name.startswith(f"{NAME}.") and files.is_temporary(name):
            with files.naming(folder):
                os.remove(os.path.join(folder, name))


def _begin_beating() -> None:
    if not _beating.is_set():
        _beating.set()
        threading.Thread(target=_beat, name="folder locks", daemon=True).start()


def _beat() -> None:
    while True:
        time.sleep(BEAT_SECONDS)
        for place, holder in list(_held.items()):
            with contextlib.suppress(OSError, InputError):
                _touch(files.join(place, NAME), holder)


def _touch(lock: str, holder: Holder) -> None:
    if files.is_url(lock):
        if _read(lock) == holder:
            files.write_bytes(lock, _content(holder))
    else:
        os.utime(lock)


def _forget() -> None:
    """In a forked process: it holds nothing, and no thread beats there."""
    _held.clear()
    _beating.clear()


atexit.register(release_all)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
