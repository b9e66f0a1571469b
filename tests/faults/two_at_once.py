"""Start several processes on one folder at the same moment: one works, the others are told who holds it."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tests.faults import stage_cases
from tests.faults.children import control_of, differences, run_here, run_stage, snapshot, speak_into
from tests.faults.crash_points import outcome, run_undisturbed, tell
from tests.faults.outcome import Outcome, Size
from tests.faults.stage_cases import StageCase, World

AT_ONCE = 3
RACED = ("embed", "balance", "cluster", "train", "evaluate", "export tars", "run")


def drill(folder: Path, *, size: Size) -> list[Outcome]:
    """Races of three processes in all stages; small: one race of two stages. Full: shared on purpose, too."""
    started = time.monotonic()
    small = size == "small"
    world = stage_cases.make(folder / "world", **({"stages": ("embed",)} if small else {}))
    names = (
        ("embed", "balance") if small else ("embed", "balance", "cluster", "train", "evaluate", "export tars", "run")
    )
    found = [race_in(world, name, num_races=1 if small else 5) for name in names]
    promise = (
        "Of several processes that begin in one folder at once, one completes it; each other ends at once and names "
        "the process that holds it, or finds it finished. The bytes are those of one process alone."
    )
    how = f"{AT_ONCE} processes are let go at the same moment, in {len(names)} stages."
    outcomes = [outcome(promise, how, found, started)]
    return outcomes if small else [*outcomes, share_on_purpose(world)]


def race_in(world: World, name: str, *, num_races: int) -> tuple[int, list[str]]:
    """Race several times in one stage; how many races, and what went wrong."""
    case = stage_cases.cases(world)[name]
    _, before = run_undisturbed(world, case)
    problems = [f"{name}: {problem}" for _ in range(num_races) if (problem := race(world, case, before))]
    tell(name, num_races, problems)
    return num_races, problems


def race(world: World, case: StageCase, before: dict[str, str]) -> str:
    """Start processes at one moment; what went wrong, empty for nothing."""
    case.clear()
    start = time.monotonic() + 0.3
    places = [control_of(world.folder) / f"racer-{i}.txt" for i in range(AT_ONCE)]
    racers = {start_racer(case, place, start): place for place in places}
    ended = {pid: os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in racers}
    said = {pid: racers[pid].read_text() for pid in racers}
    for pid, code in ended.items():
        holder = re.search(r"is held by process (\d+) on|was begun by another process just now", said[pid])
        if code not in (0, 2) or (code == 2 and holder is None):
            return f"gave {code}: {said[pid][-500:]}"
        if code == 2 and holder and holder.group(1) and int(holder.group(1)) not in racers:
            return f"named another process than one of the racers: {holder.group()}"
    if 0 not in ended.values():
        return f"nobody finished: {said}"
    changes = differences(before, snapshot(case.out))
    return ", ".join(changes)


def start_racer(case: StageCase, said: Path, start: float) -> int:
    """Fork a process that waits for the moment, then runs a stage; its number."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        speak_into(said)
        time.sleep(max(0.0, start - time.monotonic()))
        code = run_here(case.argv)
    finally:
        sys.stderr.flush()
        os._exit(code)


def share_on_purpose(world: World) -> Outcome:
    """Let processes share a store: `--engine processes`, as it is and with a worker killed."""
    started = time.monotonic()
    case = stage_cases.cases(world)["embed"]
    _, before = run_undisturbed(world, case)
    problems: list[str] = []
    case.clear()
    shared: Sequence[str] = (*case.argv, "--engine", "processes", "--engine-workers", "2")
    ended = run_stage(shared, world.folder)
    changes = {line for line in differences(before, snapshot(case.out)) if not line.startswith("config.json")}
    if ended.code or changes:
        problems.append(f"embed in processes: {ended.code} {', '.join(sorted(changes))} {ended.said[-500:]}")
    tell("embed --engine processes", 1, problems)
    promise = "Processes that share a store on purpose, by --engine processes, neither double nor miss a shard."
    return outcome(promise, "Two workers embed the shards of one store; all files compared.", [(1, problems)], started)
