"""Requests from outside to save: SIGUSR1 saves and goes on, SIGTERM (a preemption) saves and ends the process."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any


class Signals:
    """Notes SIGTERM and SIGUSR1 for the length of a `with` block; `save` and `stop` say what was asked for.

    Outside the main thread, where Python takes no handlers, and on systems without SIGUSR1, nothing is noted.
    """

    def __init__(self) -> None:
        self.save = self.stop = False
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

    def end(self) -> None:
        """Let the SIGTERM that was held back do what it would have done without this block."""
        self.__exit__()
        signal.raise_signal(signal.SIGTERM)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a loader process, forked in the block: the signal was meant to end it
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.save = True
        self.stop = self.stop or number == signal.SIGTERM
