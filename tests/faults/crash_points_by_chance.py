"""Kill stages that have more parts at a thousand file operations, drawn by chance, as `crash_points` does at all."""

from __future__ import annotations

import time
from pathlib import Path

from tests.faults import stage_cases
from tests.faults.crash_points import kill_everywhere, outcome
from tests.faults.outcome import Outcome, Size

STAGES = ("embed", "balance", "cluster", "train")


def drill(folder: Path, *, size: Size) -> list[Outcome]:
    """A thousand points of four stages; small: two of one."""
    started, small = time.monotonic(), size == "small"
    world = stage_cases.make(folder / "world", shards=10, rows=40, stages=STAGES[: 1 if small else 3])
    found = [kill_everywhere(world, name, at_most=2 if small else 250) for name in STAGES[: 1 if small else 4]]
    how = "Points drawn by chance in runs over ten shards of forty pairs."
    return [outcome("The same holds for larger runs.", how, found, started)]
