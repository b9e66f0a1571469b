"""Where the time of a step goes: data, teacher, student, objective, optimizer."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import torch


class Stopwatch:
    """Seconds in named parts of the work. On CUDA by events in the stream, so that measuring stops nothing."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._seconds: dict[str, float] = {}
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._started = time.perf_counter()

    @contextlib.contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Count the block's time for `name`."""
        if self._cuda:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            yield
            end.record()
            self._events.append((name, begin, end))
            return
        started = time.perf_counter()
        yield
        self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - started

    def read(self) -> tuple[float, dict[str, float]]:
        """Seconds since the last reading, and the share of them in every part; begins anew."""
        if self._cuda:
            torch.cuda.synchronize()
        for name, begin, end in self._events:
            self._seconds[name] = self._seconds.get(name, 0.0) + begin.elapsed_time(end) / 1000
        now = time.perf_counter()
        elapsed = now - self._started
        shares = {name: seconds / elapsed for name, seconds in self._seconds.items()}
        self._seconds, self._events, self._started = {}, [], now
        return elapsed, shares
