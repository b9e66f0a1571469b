"""Define what a fault drill gives back, keep it as JSON, and write docs/reliability.md from all of them.

A drill is a function `drill(folder, *, size)` in a module of its own in this folder. It brings faults about and returns
one outcome for each promise that it tests.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

Size = Literal["small", "full"]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one promise: of `num_cases` faults, `num_survived` were survived as promised."""

    promise: str
    """one plain sentence, as "A stage killed at any file operation and run again gives the same bytes." """
    how: str
    """one plain sentence: how it is tested"""
    num_cases: int
    num_survived: int
    seconds: float
    notes: str = ""
    """what did not hold, and numbers"""


Drill = Callable[..., list[Outcome]]
"""`drill(folder: Path, *, size: Size)`: small in a few seconds for `make test`, full for `make torture`."""


def write_outcomes(path: Path, outcomes: Sequence[Outcome]) -> None:
    """Keep the outcomes of one drill, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps({"machine": machine(), "outcomes": [asdict(o) for o in outcomes]}, indent=2) + "\n")
    os.replace(temporary, path)


def read_outcomes(path: Path) -> list[Outcome]:
    """Return the outcomes that a drill gave."""
    return [Outcome(**values) for values in json.loads(path.read_text())["outcomes"]]


def machine() -> str:
    """Return where the drills ran, without the name of the host or the user."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{platform.system()} {platform.machine()}, {cores} cores, Python {platform.python_version()}"


def page(drills: Mapping[str, Sequence[Outcome]], *, missing: Sequence[str] = ()) -> str:
    """Return docs/reliability.md: one line for every promise, then what did not hold.

    `missing` are the drills that gave no outcome.
    """
    rows = [(name, outcome) for name, outcomes in drills.items() for outcome in outcomes]
    num_cases, num_survived = sum(o.num_cases for _, o in rows), sum(o.num_survived for _, o in rows)
    lines = [
        "# Faults, brought about on purpose",
        "",
        "`make torture` writes this page. `make test` and `make test-slow` run a small part of every drill.",
        "",
        f"Machine: {machine()}. {num_survived:,} of {num_cases:,} faults were survived as promised, in "
        f"{sum(o.seconds for _, o in rows) / 60:.0f} minutes.",
        "",
        "| promise | how it is tested | cases | survived | seconds | drill |",
        "|---|---|---:|---:|---:|---|",
    ]
    for name, o in rows:
        cells = (o.promise, o.how, f"{o.num_cases:,}", f"{o.num_survived:,}", f"{o.seconds:.0f}", f"`{name}`")
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    notes = [f"- **{o.promise}** {o.notes}" for _, o in rows if o.notes]
    lines += ["", "## Notes", "", *notes] if notes else []
    if missing:
        lines += ["", f"Without an outcome: {', '.join(f'`{name}`' for name in missing)}."]
    return "\n".join(lines) + "\n"
