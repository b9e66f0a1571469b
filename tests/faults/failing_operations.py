"""Let file operations of every stage fail: one line says which file and why, and the next run completes."""

from __future__ import annotations

import errno
import random
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.faults import stage_cases
from tests.faults.children import Ended, differences, plain, run_stage, snapshot
from tests.faults.crash_points import choose_points, outcome, run_undisturbed, tell
from tests.faults.operations import CHANGES, Fault, Trap
from tests.faults.outcome import Outcome, Size
from tests.faults.stage_cases import StageCase, World

FAILURES: dict[str, tuple[int, Fault, frozenset[str]]] = {
    "a full disk": (errno.ENOSPC, "fail from here", frozenset({"write"})),
    "a device error": (errno.EIO, "fail once", frozenset({"write", "fsync", "read"})),
    "too many open files": (errno.EMFILE, "fail from here", frozenset({"open", "read"})),
    "a read-only file system": (errno.EROFS, "fail from here", frozenset({"open", *CHANGES})),
    "no right to a file": (errno.EACCES, "fail once", frozenset({"open", *CHANGES})),
}
SYSTEM = 3
"""The exit code for what the machine refuses."""


def drill(folder: Path, *, size: Size) -> list[Outcome]:
    """Each kind of failure at some operations of all stages; small: three stages, one operation."""
    small = size == "small"
    world = stage_cases.make(folder / "world", **({"stages": ("embed", "balance")} if small else {}))
    names = ("embed", "balance", "export keys") if small else tuple(stage_cases.cases(world))
    undisturbed = {name: run_undisturbed(world, stage_cases.cases(world)[name]) for name in names}
    outcomes = []
    for what, (number, fault, kinds) in FAILURES.items():
        started, found = time.monotonic(), []
        for name in names:
            case, (whole, before) = stage_cases.cases(world)[name], undisturbed[name]
            points = choose_points(sum(kind in kinds for kind, _ in whole.operations), 1 if small else 4)
            traps = [Trap(at=at, fault=fault, error=number, kinds=kinds) for at in points]
            problems = [problem for trap in traps if (problem := fail_once(world, case, trap, before))]
            found.append((len(points), problems))
            tell(f"{name}, {what}", len(points), problems)
        outcomes.append(
            outcome(
                f"Where {what} ends a stage, one line names the file and the cause, the exit code is {SYSTEM}, and the "
                "same command later gives the bytes of an undisturbed run.",
                f"{errno.errorcode[number]} at operations drawn by chance ({', '.join(sorted(kinds))}"
                f"{', and at all after it' if fault == 'fail from here' else ''}), in {len(names)} stages and exports.",
                found,
                started,
            )
        )
    return outcomes + ([] if small else fill_file_systems(world, names))


def fail_once(world: World, case: StageCase, trap: Trap, before: dict[str, str]) -> str:
    """Let a stage fail at one operation and run it again; what went wrong, empty for nothing."""
    case.clear()
    failed = run_stage(case.argv, world.folder, trap=trap)
    where = f"{case.name}, {errno.errorcode[trap.error]} at {trap.at}"
    if len(failed.operations) >= trap.at:
        kind, path = failed.operations[trap.at - 1]
        where += f" ({kind} {plain(path).removeprefix(str(world.folder))})"
    return judge(where, world, case, failed, before)


def judge(where: str, world: World, case: StageCase, failed: Ended, before: dict[str, str]) -> str:
    """What is wrong with how a stage failed, and with the run after it; empty for nothing."""
    said = [line for line in failed.said.splitlines() if line.startswith("distilclip")]
    if failed.code not in (0, SYSTEM):
        return f"{where}: gave {failed.code}: {failed.said[-600:]}"
    if failed.code == SYSTEM and (len(said) != 1 or "Traceback" in failed.said):
        return f"{where}: said {failed.said[-600:]}"
    if failed.code == SYSTEM and (str(world.folder) not in said[0] or ".tmp" in said[0]):
        return f"{where}: names no file: {said[0]}"
    again = run_stage(case.argv, world.folder)
    if again.code:
        return f"{where}: the second run gave {again.code}: {again.said[-600:]}"
    changes = differences(before, snapshot(case.out))
    return f"{where}: {', '.join(changes)}" if changes else ""


def fill_file_systems(world: World, names: Sequence[str]) -> list[Outcome]:
    """Run stages on real file systems that are too small, then larger; none where this user may not mount."""
    started, found = time.monotonic(), []
    try:
        for name in names:
            case = stage_cases.cases(world)[name]
            case.clear()
            _, before = run_undisturbed(world, case)
            num_bytes = sum(path.stat().st_size for path in case.out.rglob("*") if path.is_file())
            case.clear()
            problems = []
            shares = [random.Random(name).uniform(0.05, 0.9) for _ in range(2)]
            for share in shares:
                with small_file_system(case.out, max(1, int(num_bytes * share) // 4096)):
                    failed = run_stage(case.argv, world.folder)
                    subprocess.run(["mount", "-o", "remount,size=1g", case.out], check=True, capture_output=True)
                    where = f"{name} on {share:.0%} of its space"
                    if problem := judge(where, world, case, failed, before):
                        problems.append(problem)
            found.append((len(shares), problems))
            tell(f"{name}, a small file system", len(shares), problems)
    except (OSError, subprocess.CalledProcessError):
        return []
    promise = "A stage on a file system that is full says so in one line, and goes on when there is room."
    how = "A tmpfs that holds a part of the stage's output, drawn by chance, and is enlarged for the second run."
    return [outcome(promise, how, found, started)]


@contextmanager
def small_file_system(place: Path, num_blocks: int) -> Iterator[None]:
    """Mount a tmpfs of some blocks of 4 KiB for the length of the block."""
    place.mkdir(parents=True, exist_ok=True)
    options = f"size={num_blocks * 4096}"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", place], check=True, capture_output=True)
    try:
        yield
    finally:
        subprocess.run(["umount", place], check=True, capture_output=True)
