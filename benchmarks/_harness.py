"""Measures two sides of each case in one process: times alternate, peak memory in a fresh child, equality of results.

Every benchmark builds a list of `Case` and hands it to `compare`, which prints a table for people and, last, one line
of JSON for `make bench`, with one entry per case.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

SLOW_SECONDS = 20.0  # a run longer than this is repeated three times, not five
VERY_SLOW_SECONDS = 60.0  # and one longer than this is not repeated: noise of seconds does not change its ratio


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row of the table.

    `setup` builds the inputs from a fixed seed; `ours` and `peer` take them. `peer` is None where it does not fit into
    memory. `equal` judges the two results; None where the two sides compute different things on purpose. `result_mb`
    says of the inputs what either side must return (gradients, say): it is subtracted from the measured peak, so that
    the table shows working memory only.
    """

    name: str
    setup: Callable[[], Any]
    ours: Callable[[Any], Any]
    peer: Callable[[Any], Any] | None
    equal: Callable[[Any, Any], bool] | None
    result_mb: Callable[[Any], float] = lambda inputs: 0.0
    peer_memory: bool = True  # False where a second run of the peer, for its memory, would take minutes


def is_quick(description: str) -> bool:
    """Read the command line shared by all benchmarks: `--quick` asks for sizes that end within a minute."""
    return bool(_arguments(description).quick)


def given_store() -> str | None:
    """The folder of `embed` that `--store` names, for benchmarks that can take real embeddings."""
    store: str | None = _arguments("").store
    return store


def compare(name: str, cases: Sequence[Case], notes: Mapping[str, Callable[[], list[str]]] | None = None) -> None:
    """Measure the cases that `--only` names and print the table and the JSON line.

    `notes` compute, by name, sentences that no ratio can say; they are printed with the table.
    """
    only = _arguments("").only
    cases = [case for case in cases if re.search(only, case.name)]
    rows = []
    # Memory first: a child forked after OpenMP has started threads here would hang in its first parallel region.
    peaks = [
        (_peak_mb(case, case.ours), _peak_mb(case, case.peer) if case.peer and case.peer_memory else None)
        for case in cases
    ]
    for case, peak in zip(cases, peaks, strict=True):
        rows.append(_measure(case, *peak))
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    said = {what: note() for what, note in (notes or {}).items() if re.search(only, what)}
    _print_table(name, rows)
    print("\n".join(line for lines in said.values() for line in lines))
    print(json.dumps({"name": name, "cases": rows, "notes": said, "machine": machine()}))


def _arguments(description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="small sizes, under 60 s in all")
    parser.add_argument("--only", default="", help="regular expression: cases and notes to run")
    parser.add_argument("--store", help="folder of `embed` with embeddings to measure on too, where that makes sense")
    return parser.parse_args()


def _measure(case: Case, ours_peak: float | None, peer_peak: float | None) -> dict[str, Any]:
    inputs = case.setup()
    ours, ours_first = _timed(case.ours, inputs)
    peer, peer_first = _timed(case.peer, inputs) if case.peer else (None, 0.0)
    equal = case.equal(ours, peer) if case.peer and case.equal else None
    del ours, peer
    ours_seconds, peer_seconds = [], []
    for turn in range(5):
        if turn < _repeats(ours_first):
            ours_seconds.append(_timed(case.ours, inputs)[1])
        if case.peer and turn < _repeats(peer_first):
            peer_seconds.append(_timed(case.peer, inputs)[1])
    if case.peer and not peer_seconds:
        peer_seconds = [peer_first]
    ours_seconds = ours_seconds or [ours_first]
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


def _repeats(first: float) -> int:
    """How often to run again what took that long the first time, when it may have been compiled."""
    return 0 if first > VERY_SLOW_SECONDS else 3 if first > SLOW_SECONDS else 5


def _timed(function: Callable[[Any], Any], inputs: Any) -> tuple[Any, float]:
    start = time.perf_counter()
    result = function(inputs)
    return result, time.perf_counter() - start


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
        peak = (_status_kb("VmHWM") - before) * 1024 / 1e6 - case.result_mb(inputs)
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


def machine() -> dict[str, Any]:
    """Processor, Python and packages of this machine."""
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

    width = max((len(row["case"]) for row in rows), default=0)
    print(f"\n{name}: {' '.join(sys.argv)}")
    print(f"{'case':{width}}  {'ours s':>9} {'peer s':>9} {'ratio':>7} {'ours MB':>9} {'peer MB':>9}  equal")
    for row in rows:
        seconds = f"{show(row['ours_s'], 4):>9} {show(row['peer_s'], 4):>9} {row['ratio'] or 0:>7.3g}"
        memory = f"{show(row['ours_peak_mb'], 1):>9} {show(row['peer_peak_mb'], 1):>9}"
        equal = {True: "yes", False: "NO", None: "-"}[row["equal"]]
        print(f"{row['case']:{width}}  {seconds} {memory}  {equal}")
