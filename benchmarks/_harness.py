"""Measures two sides of each case in one process: times alternate, peak memory in a fresh child, equality of results.

Every benchmark builds a list of `Case` and hands it to `compare`, which prints a table for people and, last, one line
of JSON for `make bench`, with one entry per case.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

SLOW_SECONDS = 20.0  # a run longer than this is repeated three times, not five


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row of the table.

    `setup` builds the inputs from a fixed seed; `ours` and `peer` take them. `peer` is None where it does not fit into
    memory. `equal` judges the two results; None where the two sides compute different things on purpose. `result_mb` is
    what either side must return (gradients, say): it is subtracted from the measured peak, so that the table shows
    working memory only.
    """

    name: str
    setup: Callable[[], Any]
    ours: Callable[[Any], Any]
    peer: Callable[[Any], Any] | None
    equal: Callable[[Any, Any], bool] | None
    result_mb: float = 0.0


def is_quick(description: str) -> bool:
    """Read the command line shared by all benchmarks: `--quick` asks for sizes that end within a minute."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="small sizes, under 60 s in all")
    return bool(parser.parse_args().quick)


def compare(name: str, cases: Sequence[Case]) -> None:
    """Measure all cases and print the table and the JSON line."""
    # Memory first: a child forked after OpenMP has started threads here would hang in its first parallel region.
    peaks = [(_peak_mb(case, case.ours), _peak_mb(case, case.peer) if case.peer else None) for case in cases]
    rows = [_measure(case, *peak) for case, peak in zip(cases, peaks, strict=True)]
    _print_table(name, rows)
    print(json.dumps({"name": name, "cases": rows, "machine": _machine()}))


def _measure(case: Case, ours_peak: float | None, peer_peak: float | None) -> dict[str, Any]:
    inputs = case.setup()
    start = time.perf_counter()
    ours = case.ours(inputs)
    repeats = 3 if time.perf_counter() - start > SLOW_SECONDS else 5
    equal = case.equal(ours, case.peer(inputs)) if case.peer and case.equal else None
    del ours
    ours_seconds, peer_seconds = [], []
    for _ in range(repeats):
        ours_seconds.append(_seconds(case.ours, inputs))
        if case.peer:
            peer_seconds.append(_seconds(case.peer, inputs))
    ours_s = statistics.median(ours_seconds)
    peer_s = statistics.median(peer_seconds) if peer_seconds else None
    return {
        "case": case.name,
        "ours_s": ours_s,
        "peer_s": peer_s,
        "ratio": ours_s / peer_s if peer_s else None,
        "ours_peak_mb": ours_peak,
        "peer_peak_mb": peer_peak,
        "equal": equal,
    }


def _seconds(function: Callable[[Any], Any], inputs: Any) -> float:
    start = time.perf_counter()
    function(inputs)
    return time.perf_counter() - start


def _peak_mb(case: Case, function: Callable[[Any], Any]) -> float | None:
    """Most memory `function` holds beyond its inputs and results, in MB (10^6 bytes); None where /proc is missing."""
    if not Path("/proc/self/clear_refs").exists():
        return None
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        inputs = case.setup()
        Path("/proc/self/clear_refs").write_text("5")  # forgets the high-water mark of the set-up
        before = _status_kb("VmRSS")
        _result = function(inputs)
        peak = (_status_kb("VmHWM") - before) * 1024 / 1e6 - case.result_mb
        os.write(write_end, repr(peak).encode())
        os._exit(0)  # no interpreter shutdown: the parent's open files are not this child's to flush
    os.close(write_end)
    with os.fdopen(read_end) as pipe:
        answer = pipe.read()
    os.waitpid(child, 0)
    if not answer:
        raise RuntimeError(f"the memory measurement of {case.name!r} died: not enough memory?")
    return float(answer)


def _status_kb(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1])
    raise KeyError(field)


def _machine() -> dict[str, Any]:
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        model = names[0].split(":", 1)[1].strip() if names else model
    versions = {}
    for package in ("torch", "numpy", "faiss-cpu", "scikit-learn", "open_clip_torch"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {"cpu": model, "cores": os.cpu_count(), "python": platform.python_version(), "versions": versions}


def _print_table(name: str, rows: Sequence[dict[str, Any]]) -> None:
    def show(value: float | None, digits: int) -> str:
        return "-" if value is None else f"{value:,.{digits}f}"

    width = max(len(row["case"]) for row in rows)
    print(f"\n{name}: {' '.join(sys.argv)}")
    print(f"{'case':{width}}  {'ours s':>9} {'peer s':>9} {'ratio':>7} {'ours MB':>9} {'peer MB':>9}  equal")
    for row in rows:
        seconds = f"{show(row['ours_s'], 4):>9} {show(row['peer_s'], 4):>9} {show(row['ratio'], 3):>7}"
        memory = f"{show(row['ours_peak_mb'], 1):>9} {show(row['peer_peak_mb'], 1):>9}"
        equal = {True: "yes", False: "NO", None: "-"}[row["equal"]]
        print(f"{row['case']:{width}}  {seconds} {memory}  {equal}")
