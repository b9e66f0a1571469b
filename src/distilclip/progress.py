"""Progress bars on stderr: done, total, samples per second, time left. Silent where nobody is watching."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")

Advance = Callable[[float | int, int], None]


@contextlib.contextmanager
def progress(description: str, total: float | int) -> Iterator[Advance]:
    """A bar for the length of the block; yields `advance(amount, num_samples)`, amounts summing to `total`.

    Shown on a terminal only; the environment variable `DISTILCLIP_PROGRESS` (1 or 0) decides otherwise.
    """
    if not _watched():
        yield lambda amount, num_samples: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[speed]}"),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    started = time.perf_counter()
    num_done = 0
    with Progress(*columns, console=Console(stderr=True, force_terminal=True)) as bar:
        task = bar.add_task(description, total=total, speed="")

        def advance(amount: float | int, num_samples: int) -> None:
            nonlocal num_done
            num_done += num_samples
            speed = f"{num_done / (time.perf_counter() - started):,.0f} samples/s" if num_done else ""
            bar.update(task, advance=amount, speed=speed)

        yield advance


def say(text: str) -> None:
    """A line on stderr for whoever is watching."""
    if _watched():
        print(text, file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """Seconds in the unit that people would use."""
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"


def _watched() -> bool:
    return os.environ.get("DISTILCLIP_PROGRESS", "1" if sys.stderr.isatty() else "0") == "1"


def track(items: Sequence[T], description: str, *, num_samples: int = 0) -> Iterator[T]:
    """The items, behind a bar; each stands for `num_samples` samples."""
    with progress(description, len(items)) as advance:
        for item in items:
            yield item
            advance(1, num_samples)
