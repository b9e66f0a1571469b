"""Run the fault drills and write docs/reliability.md.

python -m tests.faults              # every drill that has no outcome in runs/torture yet, then the page
python -m tests.faults NAME ...     # these drills, again
python -m tests.faults --small      # every drill in its size for `make test`; nothing is kept
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import sys
import tempfile
from pathlib import Path

from tests.faults.outcome import Outcome, Size, page, read_outcomes, write_outcomes

ROOT = Path(__file__).parents[2]
KEPT = ROOT / "runs" / "torture"
PAGE = ROOT / "docs" / "reliability.md"
DRILLS = (
    "crash_points",
    "crash_points_by_chance",
    "failing_operations",
    "two_at_once",
    "terminated_stages",
    "fuzz",
    "pickles",
    "hostile_files",
    "private_words",
    "numbers",
    "elasticity",
    "ray_kills",
    "format_versions",
    "long_training",
    "large_store",
)
"""The modules of this folder that have a function `drill`, in the order of the page."""


def main(argv: list[str]) -> int:
    """Run drills; the exit code is 1 where one ended without an outcome or did not survive a fault."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description="Run the fault drills.")
    parser.add_argument("names", nargs="*", choices=[*DRILLS, []], help="drills to run again (default: unfinished)")
    parser.add_argument("--small", action="store_true", help="run the size of `make test`, and keep nothing")
    given = parser.parse_args(argv)
    size: Size = "small" if given.small else "full"
    kept = KEPT if size == "full" else Path(tempfile.mkdtemp(prefix="distilclip-faults-"))
    for name in given.names or [name for name in DRILLS if not (kept / f"{name}.json").exists()]:
        print(f"{name} ...", file=sys.stderr, flush=True)
        (kept / f"{name}.json").unlink(missing_ok=True)
        # A process of its own, forked before anything heavy is imported: no drill sees what another left.
        process = multiprocessing.get_context("fork").Process(target=run_drill, args=(name, size, kept))
        process.start()
        process.join()
    outcomes = {name: read_outcomes(kept / f"{name}.json") for name in DRILLS if (kept / f"{name}.json").exists()}
    text = page(outcomes, missing=[name for name in DRILLS if name not in outcomes])
    if size == "full":
        PAGE.write_text(text)
    print(text)
    is_whole = len(outcomes) == len(DRILLS)
    return 0 if is_whole and all(o.num_survived == o.num_cases for found in outcomes.values() for o in found) else 1


def run_drill(name: str, size: Size, kept: Path) -> None:
    """Run one drill in a temporary folder, and keep what it gives."""
    with tempfile.TemporaryDirectory(prefix=f"distilclip-{name}-") as folder:
        found: list[Outcome] = importlib.import_module(f"tests.faults.{name}").drill(Path(folder), size=size)
    write_outcomes(kept / f"{name}.json", found)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
