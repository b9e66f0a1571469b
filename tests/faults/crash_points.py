"""Kill every stage at every file operation, run it again, and compare its folder with that of an undisturbed run."""

from __future__ import annotations

import random
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tests.faults import stage_cases
from tests.faults.children import Ended, differences, import_as_children, plain, run_stage, snapshot
from tests.faults.operations import CHANGES, Trap
from tests.faults.outcome import Outcome, Size
from tests.faults.stage_cases import StageCase, World

KINDS = frozenset({"open", "write", *CHANGES})
"""Operations after which the disk holds something else. What a killed process wrote is not lost, so fsync is none."""
BOOKS = {"env.json", "inputs.json", "lock.json", "metrics.jsonl", "cache.json", "fit.json"}
"""Files that every run writes."""
AS_ONE = {
    r"/rounds/(rows|projection|sketches-\d+|labels-\d+|\d+/begun|\d+/(centers|sums|tally)-[\d-]*)$": "/rounds/part",
    r"/(checkpoints/step-\d+)/.*": r"/\1",
    r"/(clip_benchmark/.*|table)$": "/tables",
    r"/(figures/.*|index)$": "/page",
    r"/eval/[^/]*/(classnames|templates)$": "/texts",
    r"/model/.*": "/model",
    r"/(img_emb/img_emb|text_emb/text_emb|metadata/metadata)_(\d+)$": r"/partition-\2",
}
"""Files that are made together, and what they are counted as."""


def drill(folder: Path, *, size: Size) -> list[Outcome]:
    """Every point of all stages; small: three points of three stages."""
    started = time.monotonic()
    small = size == "small"
    world = stage_cases.make(folder / "world", **({"stages": ("embed", "balance")} if small else {}))
    names = ("embed", "balance", "export keys") if small else tuple(stage_cases.cases(world))
    found = [kill_everywhere(world, name, at_most=3 if small else None) for name in names]
    return [
        outcome(
            "A stage that is killed at any file operation and run again leaves the bytes of an undisturbed run, no "
            "other file, and makes at most one part twice.",
            f"SIGKILL before each operation that changes the disk, and in the middle of each write, of {len(names)} "
            "stages and kinds of export; then the same command; all files compared.",
            found,
            started,
        )
    ]


def outcome(promise: str, how: str, found: Sequence[tuple[int, list[str]]], started: float) -> Outcome:
    """One outcome of the cases of several stages: how many, and what went wrong in which."""
    num_cases, problems = sum(num for num, _ in found), [line for _, lines in found for line in lines]
    return Outcome(
        promise=promise,
        how=how,
        num_cases=num_cases,
        num_survived=num_cases - len(problems),
        seconds=time.monotonic() - started,
        notes="; ".join(problems[:20]),
    )


def kill_everywhere(world: World, name: str, *, at_most: int | None) -> tuple[int, list[str]]:
    """Kill a stage at its operations, or at some; how many cases, and a line for each that did not survive."""
    case = stage_cases.cases(world)[name]
    whole, before = run_undisturbed(world, case)
    points = choose_points(sum(kind in KINDS for kind, _ in whole.operations), at_most)
    problems = [problem for at in points if (problem := kill_once(world, case, at, before))]
    tell(name, len(points), problems)
    return len(points), problems


def tell(name: str, num_cases: int, problems: Sequence[str]) -> None:
    """Say on stderr how far a drill is, and what did not survive."""
    print(f"  {name}: {num_cases - len(problems)} of {num_cases}", *problems, sep="\n    ", file=sys.stderr, flush=True)


def run_undisturbed(world: World, case: StageCase) -> tuple[Ended, dict[str, str]]:
    """Run a stage from the beginning; what it did, and what its folder holds."""
    case.clear()
    ended = run_stage(case.argv, world.folder)
    if ended.code:
        raise AssertionError(f"{case.argv} gave {ended.code}: {ended.said}")
    import_as_children(world.folder)
    return ended, snapshot(case.out)


def choose_points(count: int, at_most: int | None) -> list[int]:
    """Numbers from 1 to `count`: all of them, or some drawn by chance, the same each time."""
    if at_most is None or count <= at_most:
        return list(range(1, count + 1))
    return sorted(random.Random(count).sample(range(1, count + 1), at_most))


def kill_once(world: World, case: StageCase, at: int, before: dict[str, str]) -> str:
    """Kill a stage at one operation and run it again; what went wrong, empty for nothing."""
    case.clear()
    killed = run_stage(case.argv, world.folder, trap=Trap(at=at, fault="tear", kinds=KINDS))
    where = f"{case.name}, operation {at}"
    if killed.operations:
        kind, path = killed.operations[-1]
        where += f" ({kind} {plain(path).removeprefix(str(world.folder))})"
    if killed.code != -9:
        return "" if killed.code == 0 else f"{where}: ended with {killed.code} before it was killed: {killed.said}"
    again = run_stage(case.argv, world.folder)
    if again.code:
        return f"{where}: the second run gave {again.code}: {again.said}"
    changes = differences(before, snapshot(case.out))
    if changes:
        return f"{where}: {', '.join(changes)}"
    twice = made_twice(killed, again)
    return f"{where}: made twice: {', '.join(twice)}" if len(parts_of(twice)) > 1 else ""


def made_twice(killed: Ended, again: Ended) -> list[str]:
    """Files that the killed run had finished, and that the second run made again, without its books."""
    done = {path for path in committed(killed.operations[:-1]) if Path(path).name not in BOOKS}
    return sorted(done.intersection(committed(again.operations)))


def committed(operations: Sequence[tuple[str, str]]) -> list[str]:
    """Paths that got their final names."""
    return [path for kind, path in operations if kind in ("os.rename", "os.link")]


def parts_of(paths: Sequence[str]) -> set[str]:
    """What is made as one: files of one stem are (000001.safetensors and 000001.rows.parquet), and so are a checkpoint,
    the tables of `evaluate`, the page of `report`, and what `cluster` makes before its first round and in a round of
    one process."""
    parts = {str(Path(path).parent / Path(path).name.partition(".")[0]) for path in paths}
    for pattern, whole in AS_ONE.items():
        parts = {re.sub(pattern, whole, part) for part in parts}
    return parts
