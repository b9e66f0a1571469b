"""Show how far a stage is, on stderr: a bar on a terminal, plain lines in a log file."""

from __future__ import annotations

import contextlib
import itertools
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from distilclip.messages import progress_is_heard, say, speaks_json

T = TypeVar("T")

_shown = False  # whether a block is open that shows progress

FIRST_LINES = (5, 10, 20, 40)  # seconds after the start; then a line every minute

SUMMARIES = {
    "corpus": "{num_pairs:,} pairs, {removable_ratio:.1%} of them copies of others",
    "embed": "{num_valid:,} of {num_rows:,} pairs embedded, {num_invalid:,} could not be used",
    "import": "{num_valid:,} of {num_rows:,} rows imported, {num_normalised:,} of them scaled to unit length",
    "balance": "kept {num_kept:,} of {num_valid:,} images ({removed_ratio:.1%} removed)",
    "select": "kept {num_kept:,} of {num_scored:,} pairs, {description}",
    "cluster": "{num_labelled:,} images in {num_centers:,} clusters",
    "weigh": "{num_drawn:,} of {num_rows:,} rows are drawn; they vary as {effective_rows:,.0f} of equal weight",
    "pack": "{num_rows:,} pairs in {num_shards:,} shards, {num_resized:,} pictures made smaller",
    "train": "{num_samples_seen:,} samples seen, {num_parameters:,} parameters",
    "evaluate": "measured {models} models on {sets} sets",
    "export": "exported {what}",
    "report": "page with {figures} figures",
}


class Advance(Protocol):
    """What a loop calls after each part of its work."""

    def __call__(self, amount: float | int, num_samples: int, note: str = "") -> None:
        """Count `amount` of the total and `num_samples` more samples as done; `note` is shown until the next one."""


@contextlib.contextmanager
def progress(description: str, total: float | int) -> Iterator[Advance]:
    """Show progress for the length of the block; yields `advance(amount, num_samples)`, amounts summing to `total`.

    Inside another's block nothing is shown: a terminal has one bar at a time.
    """
    global _shown
    if _shown or not progress_is_heard():
        yield lambda amount, num_samples, note="": None
        return
    show = _bar if sys.stderr.isatty() and not speaks_json() else _lines
    _shown = True
    try:
        with show(description, total) as advance:
            yield advance
    finally:
        _shown = False


def track(
    items: Sequence[T], description: str, *, num_samples: int = 0, note: Callable[[], str] = lambda: ""
) -> Iterator[T]:
    """Yield the items and show progress; each stands for `num_samples` samples, and `note` says what it gave."""
    with progress(description, len(items)) as advance:
        for item in items:
            yield item
            advance(1, num_samples, note())


def summarise(result: Mapping[str, Any], *, seconds: float, out: str | None) -> str:
    """Return one line about a stage's result; empty for a stage that says it itself (`run`, whose `out` may be None).

    >>> result = {"stage": "cluster", "num_labelled": 7080, "num_centers": 400}
    >>> summarise(result, seconds=3.2, out="runs/cluster")
    'cluster: 7,080 images in 400 clusters, in 3 s, written to runs/cluster'
    """
    stage = result.get("stage", "")
    if stage not in SUMMARIES:
        return ""
    values = {name: len(value) if isinstance(value, list) else value for name, value in result.items()}
    return f"{stage}: {SUMMARIES[stage].format(**values)}, in {duration(seconds)}, written to {out}"


def duration(seconds: float) -> str:
    """Return seconds in the unit that people would use: `148 s` as `2.5 min`."""
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"


@contextlib.contextmanager
def _bar(description: str, total: float | int) -> Iterator[Advance]:
    """A bar that moves, with speed and time left."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[speed]}"),
        TimeRemainingColumn(elapsed_when_finished=True),
        TextColumn("{task.fields[note]}"),
    )
    started = time.perf_counter()
    num_done, last_note = 0, ""
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(description, total=total, speed="", note="")

        def advance(amount: float | int, num_samples: int, note: str = "") -> None:
            nonlocal num_done, last_note
            num_done += num_samples
            speed = f"{num_done / (time.perf_counter() - started):,.0f} samples/s" if num_done else ""
            last_note = note or last_note
            bar.update(task, advance=amount, speed=speed, note=last_note)

        yield advance


@contextlib.contextmanager
def _lines(description: str, total: float | int) -> Iterator[Advance]:
    """Plain lines, soon after the start and then every minute; none for a loop that is done before the first."""
    started = time.perf_counter()
    done, num_done, last_note, finished = 0.0, 0, "", threading.Event()

    def advance(amount: float | int, num_samples: int, note: str = "") -> None:
        nonlocal done, num_done, last_note
        done, num_done, last_note = done + amount, num_done + num_samples, note or last_note

    def show() -> None:
        seconds = time.perf_counter() - started
        words = [f"{done:,.6g} of {total:,} ({100 * done / total if total else 100:.0f}%)"]
        values: dict[str, Any] = {"task": description, "done": done, "total": total, "seconds": round(seconds, 1)}
        if num_done:
            values["samples_per_second"] = round(num_done / seconds, 1)
            words.append(f"{num_done / seconds:,.0f} samples/s")
        words.append(f"{duration(seconds)} so far")
        if 0 < done < total:
            values["seconds_left"] = round(seconds * (total - done) / done, 1)
            words.append(f"{duration(seconds * (total - done) / done)} left")
        if last_note:
            values["note"] = last_note
            words.append(last_note)
        say(f"{description}: {', '.join(words)}", **values)

    def watch() -> None:
        for due in itertools.chain(FIRST_LINES, itertools.count(60, 60)):
            if finished.wait(max(0.0, started + due - time.perf_counter())):
                return
            show()

    watcher = threading.Thread(target=watch, daemon=True)  # a thread: one part of the work can take an hour
    watcher.start()
    try:
        yield advance
    finally:
        finished.set()
        watcher.join()
        if time.perf_counter() - started >= FIRST_LINES[0]:
            show()
