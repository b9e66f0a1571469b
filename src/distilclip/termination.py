"""End in good order at SIGTERM, which schedulers send before they take a machine: as at Ctrl-C, but within seconds."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

from distilclip import folder_lock

SECONDS = 5.0
"""How long a process may take to leave its work. Then it ends where it is, which costs at most the part in work."""


class Terminated(KeyboardInterrupt):
    """Raised in the main thread of a process that got SIGTERM."""


@contextlib.contextmanager
def ending_in_order() -> Iterator[None]:
    """Raise `Terminated` at SIGTERM for the length of the block, so that temporary files and locks are removed.

    Nothing changes outside the main thread, and where the program has a handler of its own.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    process, is_ending = os.getpid(), False

    def end(number: int, frame: FrameType | None) -> None:
        nonlocal is_ending
        if os.getpid() != process:  # forked in the block: nobody there waits for it
            end_by_signal()
        if not is_ending:  # torchrun and schedulers send it twice
            is_ending = True
            hurry = threading.Timer(SECONDS, _end_now)
            hurry.daemon = True
            hurry.start()
            raise Terminated

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        if not is_ending:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def end_by_signal() -> None:
    """End this process by SIGTERM, as if nobody had handled it; 143 in a shell."""
    folder_lock.release_all()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.raise_signal(signal.SIGTERM)


def _end_now() -> None:
    folder_lock.release_all()
    print(f"distilclip: SIGTERM: ended after {SECONDS:.0f} s; the same command goes on from here", file=sys.stderr)
    sys.stderr.flush()
    os._exit(128 + signal.SIGTERM)
