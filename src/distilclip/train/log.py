"""Write the lines of metrics.jsonl: means over the steps since the line before, and where the time went."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from distilclip import distributed, stage_folder
from distilclip.train.trackers import Writer


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
        """Return the seconds since the last reading, and the share of them in every part; begin anew."""
        if self._cuda:
            torch.cuda.synchronize()
        for name, begin, end in self._events:
            self._seconds[name] = self._seconds.get(name, 0.0) + begin.elapsed_time(end) / 1000
        now = time.perf_counter()
        elapsed = now - self._started
        shares = {name: seconds / elapsed for name, seconds in self._seconds.items()}
        self._seconds, self._events, self._started = {}, [], now
        return elapsed, shares


class Log:
    """Sums of the last few steps' values, kept on the device: one transfer per line, not one per value and step.

    `carried` is the `state` that a run had when it was interrupted between two lines.
    """

    def __init__(self, device: torch.device, carried: Mapping[str, Any] | None = None) -> None:
        self.stopwatch = Stopwatch(device)
        self._device = device
        carried = carried or {"parts": {}, "wholes": {}, "num_steps": 0}
        # Each process has its rows' part of a value, or the whole of it; the sums on rank 0 hold what was carried over.
        first = distributed.rank() == 0
        self._parts = {name: self._tensor(value if first else 0.0) for name, value in carried["parts"].items()}
        self._wholes = {name: self._tensor(value) for name, value in carried["wholes"].items()}
        self._num_steps = int(carried["num_steps"])
        self._num_samples = 0

    def add(self, parts: Mapping[str, Tensor], gradient_norm: Tensor, num_samples: int) -> None:
        """Count a step of `num_samples` rows on all processes; `parts` are what the rows here add to each value."""
        for name, value in parts.items():
            self._parts[name] = self._parts.get(name, 0) + value.detach()
        self._wholes["gradient_norm"] = self._wholes.get("gradient_norm", 0) + gradient_norm.detach()
        self._num_steps += 1
        self._num_samples += num_samples

    def line(self) -> dict[str, float]:
        """Return means, speed and shares of time since the last line; begin anew. Every process must call it."""
        means = {name: value / self._num_steps for name, value in {**self._sum_parts(), **self._read_wholes()}.items()}
        elapsed, shares = self.stopwatch.read()
        values = {
            **means,
            "samples_per_second": round(self._num_samples / elapsed, 1),
            **{f"{part}_share": round(share, 4) for part, share in shares.items()},
        }
        self._parts, self._wholes, self._num_steps, self._num_samples = {}, {}, 0, 0
        return values

    def state(self) -> dict[str, Any]:
        """Return the sums, exact in JSON. Every process must call it."""
        return {"parts": self._sum_parts(), "wholes": self._read_wholes(), "num_steps": self._num_steps}

    def _sum_parts(self) -> dict[str, float]:
        if not self._parts:
            return {}
        summed = distributed.reduce_(torch.stack(list(self._parts.values()))).tolist()
        return dict(zip(self._parts, summed, strict=True))

    def _read_wholes(self) -> dict[str, float]:
        return {name: float(value) for name, value in self._wholes.items()}

    def _tensor(self, value: float) -> Tensor:
        return torch.tensor(value, device=self._device)


class Lines:
    """metrics.jsonl and the trackers, written by the first process."""

    def __init__(self, folder: stage_folder.Folder, trackers: Sequence[Writer], *, start: int) -> None:
        self._trackers = trackers
        first = distributed.rank() == 0
        self._metrics = stage_folder.Metrics(folder.child("metrics.jsonl"), resume_at=start + 1) if first else None
        self._latest: dict[str, float] = {}

    def describe(self, names: Iterable[str]) -> str:
        """Return these values of the latest line in words: `loss 2.31, task 1.02`; empty before the first line."""
        return ", ".join(f"{name} {self._latest[name]:.4g}" for name in names if name in self._latest)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Write one line."""
        self._latest = values
        if self._metrics is not None:
            self._metrics.write(step=step, **values)
        for tracker in self._trackers:
            tracker.write(step, values)

    def close(self) -> None:
        """Close the trackers."""
        for tracker in self._trackers:
            tracker.close()
