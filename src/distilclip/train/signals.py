"""Note signals that ask to save: SIGUSR1 saves and goes on, SIGTERM (a preemption) saves and ends the process."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any, NoReturn

from distilclip import folder_lock

REPEAT_SECONDS = 5
"""A SIGTERM this long after the first ends the process at once. Sooner it may be the same: torchrun passes it on."""
DATA_SECONDS = 10.0
"""How long a process that is to end still waits for data: schedulers kill after 30 s, and it has to save."""


class OverdueError(Exception):
    """Raised in a process that is to end, and waits for data that does not come."""


class Signals:
    """Notes SIGTERM and SIGUSR1 for the length of a `with` block; a second SIGTERM ends the process.

    Outside the main thread, where Python takes no handlers, and on systems without SIGUSR1, nothing is noted.
    """

    def __init__(self) -> None:
        self.stop = False
        """whether the process is to end"""
        self._stop_asked = 0.0  # when
        self._waiting = False
        self._num_asked = self._num_taken = 0  # two counts, so that no signal is lost between reading and resetting
        self._before: dict[int, Any] = {}
        self._process = os.getpid()

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            wanted = [signal.SIGTERM, *([signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else [])]
            self._before = {number: signal.signal(number, self._note) for number in wanted}
            if hasattr(signal, "SIGALRM"):
                self._before[signal.SIGALRM] = signal.signal(signal.SIGALRM, self._end_wait)
        return self

    def __exit__(self, *exception: object) -> None:
        self._limit_wait(0.0)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def take(self) -> bool:
        """Say whether a checkpoint was asked for since this was last called."""
        num_asked = self._num_asked
        asked = num_asked > self._num_taken
        self._num_taken = num_asked
        return asked

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Mark a block that waits for data. It raises `OverdueError` when `DATA_SECONDS` pass there after a SIGTERM."""
        self._waiting = True
        try:
            if self.stop:
                self._limit_wait(DATA_SECONDS)
            yield
        finally:
            self._waiting = False
            if self.stop:
                self._limit_wait(0.0)

    def _note(self, number: int, frame: FrameType | None) -> None:
        again = self.stop and time.monotonic() - self._stop_asked > REPEAT_SECONDS
        if os.getpid() != self._process or again:  # another process, forked in the block: nobody there takes note
            if number == signal.SIGTERM:
                signal.signal(number, signal.SIG_DFL)
                signal.raise_signal(number)
            return
        self._num_asked += 1
        if number == signal.SIGTERM and not self.stop:
            self.stop, self._stop_asked = True, time.monotonic()
            if self._waiting:
                self._limit_wait(DATA_SECONDS)

    def _limit_wait(self, seconds: float) -> None:
        if signal.SIGTERM in self._before and hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, seconds)

    def _end_wait(self, number: int, frame: FrameType | None) -> None:
        if self._waiting:
            raise OverdueError


def terminate() -> NoReturn:
    """End the process, as the noted SIGTERM would have done, but first give its folder back for the next one."""
    folder_lock.release_all()
    signal.raise_signal(signal.SIGTERM)
    raise SystemExit(128 + signal.SIGTERM)  # where the caller's own handler returns
