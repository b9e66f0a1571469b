"""Send SIGTERM to every stage at moments spread over its run, and run it again."""

from __future__ import annotations

import signal
import time
from pathlib import Path

from tests.faults import stage_cases
from tests.faults.children import differences, run_stage, snapshot
from tests.faults.crash_points import outcome, run_undisturbed, tell
from tests.faults.outcome import Outcome, Size
from tests.faults.stage_cases import World

SECONDS = 5.0
"""A process that lives longer after SIGTERM does not end within seconds."""


def drill(folder: Path, *, size: Size) -> list[Outcome]:
    """Twelve moments of all stages; small: two moments of three stages."""
    started = time.monotonic()
    small = size == "small"
    world = stage_cases.make(folder / "world", **({"stages": ("embed", "balance")} if small else {}))
    names = ("embed", "balance", "cluster") if small else tuple(stage_cases.cases(world))
    longest = 0.0
    found = []
    for name in names:
        num_cases, problems, slowest = terminate_everywhere(world, name, num_moments=2 if small else 12)
        found.append((num_cases, problems))
        tell(name, num_cases, problems)
        longest = max(longest, slowest)
    one = outcome(
        f"A stage that gets SIGTERM ends within {SECONDS:.0f} s by that signal (143 in a shell), says so once it has "
        "begun, gives its folder back, and the same command completes it to the bytes of an undisturbed run.",
        f"SIGTERM at moments spread over the run of {len(names)} stages and exports; the longest end took "
        f"{longest:.1f} s.",
        found,
        started,
    )
    return [one]


def terminate_everywhere(world: World, name: str, *, num_moments: int) -> tuple[int, list[str], float]:
    """Terminate a stage at some moments; how many ended by it, what went wrong, and the longest end in seconds."""
    case = stage_cases.cases(world)[name]
    run_undisturbed(world, case)
    whole, before = run_undisturbed(world, case)  # the first one was slowed by imports
    num_cases, problems, longest = 0, [], 0.0
    for moment in range(num_moments):
        case.clear()
        after = whole.seconds * (moment + 0.5) / num_moments
        ended = run_stage(case.argv, world.folder, terminate_after=after)
        if ended.code == 0:
            continue  # it was faster this time
        num_cases += 1
        longest = max(longest, ended.seconds_to_end)
        where = f"{name} after {after:.2f} s"
        has_lock = (case.out / "lock.json").exists()
        is_at_work = any(case.out.rglob("*")) and not (case.out / "result.json").exists()
        again = run_stage(case.argv, world.folder)
        if ended.code not in (-signal.SIGTERM, 128 + signal.SIGTERM) or "Traceback" in ended.said:
            problems.append(f"{where}: gave {ended.code}: {ended.said[-600:]}")
        elif ended.seconds_to_end > SECONDS:
            problems.append(f"{where}: took {ended.seconds_to_end:.1f} s to end")
        elif has_lock:
            problems.append(f"{where}: kept its lock")
        elif is_at_work and "SIGTERM" not in ended.said:
            problems.append(f"{where}: did not say that it was ended")
        elif again.code:
            problems.append(f"{where}: the second run gave {again.code}: {again.said[-600:]}")
        elif changes := differences(before, snapshot(case.out)):
            problems.append(f"{where}: {', '.join(changes)}")
    return num_cases, problems, longest
