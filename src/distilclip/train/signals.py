"""Note signals that ask to save: SIGUSR1 saves and goes on, SIGTERM (a preemption) saves and ends the process."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any, NoReturn


class Signals:
    """Notes SIGTERM and SIGUSR1 for the length of a `with` block.

    Outside the main thread, where Python takes no handlers, and on systems without SIGUSR1, nothing is noted.
    """

    def __init__(self) -> None:
        self.stop = False
        """whether the process is to end"""
        self._num_asked = self._num_taken = 0  # two counts, so that no signal is lost between reading and resetting
        self._before: dict[int, Any] = {}
        self._process = os.getpid()

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            wanted = [signal.SIGTERM, *([signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else [])]
            self._before = {number: signal.signal(number, self._note) for number in wanted}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def take(self) -> bool:
        """Say whether a checkpoint was asked for since this was last called."""
        num_asked = self._num_asked
        asked = num_asked > self._num_taken
        self._num_taken = num_asked
        return asked

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # another process, forked in the block: nobody there takes note
            if number == signal.SIGTERM:
                signal.signal(number, signal.SIG_DFL)
                signal.raise_signal(number)
            return
        self._num_asked += 1
        self.stop = self.stop or number == signal.SIGTERM


def terminate() -> NoReturn:
    """End the process, as the noted SIGTERM would have done."""
    signal.raise_signal(signal.SIGTERM)
    raise SystemExit(128 + signal.SIGTERM)  # where the caller's own handler returns
