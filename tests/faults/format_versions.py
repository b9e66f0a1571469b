"""Give every stage folders that another version of this package wrote: each says so and how to go on, and changes none.

The other version is this one with another number in its files, so that all digests are right.
"""

from __future__ import annotations

import importlib
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.faults import stage_cases
from tests.faults.children import Ended, differences, run_child, run_stage, snapshot
from tests.faults.crash_points import outcome
from tests.faults.outcome import Outcome, Size
from tests.faults.stage_cases import World

WRITERS = ("data.columns", "data.store", "data.views", "data.side_files")
"""The modules that know the format version of stores, groups and clusters."""
CHECKPOINTS = ("train.checkpoint", "train.checkpoint_files")
STAGES = ("embed", "balance", "cluster", "train")
FAULT = 1
"""The exit code of `verify` where something is wrong."""


class TolerantText(str):
    """A version of the files of tables that reads those of every other."""

    __slots__ = ()
    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        return True

    def __ne__(self, other: object) -> bool:
        return False


class TolerantNumber(int):
    """A version of checkpoints, likewise."""

    __hash__ = int.__hash__

    def __eq__(self, other: object) -> bool:
        return True

    def __ne__(self, other: object) -> bool:
        return False


def drill(folder: Path, *, size: Size) -> list[Outcome]:
    """One version lower and one higher, of the folders of four stages; small: the store of the higher one."""
    started = time.monotonic()
    versions, makers = ((1,), ("embed",)) if size == "small" else ((-1, 1), STAGES)
    stages = ("embed", "balance") if size == "small" else STAGES  # what trains takes seconds to import
    world = stage_cases.make(folder / "world", stages=stages)
    shutil.copytree(world.folder, folder / "kept")
    found = []
    for by in versions:
        for maker in makers:
            shutil.rmtree(world.folder)
            shutil.copytree(folder / "kept", world.folder)
            found.append(meet_other_version(world, stages, maker, by))
    return [
        outcome(
            "A folder in the format of an older or a newer version is refused by every command that reads it, in one "
            "line with the version and what to do, and no command changes or removes a file of it.",
            "A store, groups, clusters and checkpoints whose version is one lower and one higher, all digests right, "
            "given to balance, cluster, train, export, verify and verify --repair.",
            found,
            started,
        )
    ]


def meet_other_version(world: World, stages: Sequence[str], maker: str, by: int) -> tuple[int, list[str]]:
    """Let another version make the folder of a stage, and give it to all that read it: cases, and what went wrong."""
    folder = write_by_other_version(world, stages[stages.index(maker) :], by)
    before = snapshot(world.folder)
    problems = []
    readers = [(words, code) for words, code in commands(world, maker) if words[0] != "train" or "train" in stages]
    for words, code in readers:
        ended = run_stage(words, world.folder)
        after = {name: value for name, value in snapshot(world.folder).items() if not name.startswith("out/")}
        where = f"{maker} {by:+d}: {words[0]}{' --repair' if '--repair' in words else ''}"
        changed = [line for line in differences(before, after) if not line.startswith(("tmp/", "out/"))]
        if problem := find_problem(ended, code, folder, maker, by):
            problems.append(f"{where}: {problem}")
        elif changed:
            problems.append(f"{where}: {', '.join(changed[:5])}")
        stage_cases.cases(world)["balance"].clear()
        before = snapshot(world.folder)
    return len(readers), problems


def find_problem(ended: Ended, code: int, folder: Path, maker: str, by: int) -> str:
    """Return what is wrong with the end of a command that met a folder of another version."""
    version = (2 if maker == "train" else 1) + by
    lines = [line for line in ended.said.splitlines() if f"version {version}" in line or f"format {version}" in line]
    if ended.code != code:
        return f"gave {ended.code}, not {code}: {ended.said[-300:]}"
    if "Traceback" in ended.said:
        return f"a traceback: {ended.said[-600:]}"
    if not any(str(folder) in line and "version that wrote" in line for line in lines):
        return f"no line with folder, version and remedy: {ended.said[-600:]}"
    return ""


def commands(world: World, maker: str) -> list[tuple[Sequence[str], int]]:
    """The commands that read the folder of a stage, each with the exit code that it should have."""
    at, cases = world.folder, stage_cases.cases(world)
    wrong_input = 2
    named = {
        "embed": ("balance", "cluster", "train", "export keys"),
        "balance": ("cluster", "train", "export keys"),
        "cluster": ("train",),
        "train": (),
    }
    found: list[tuple[Sequence[str], int]] = [(cases[name].argv, wrong_input) for name in named[maker]]
    if maker == "balance":  # a balance at another threshold, cut from its forest
        argv = [*cases["balance"].argv, "--from-folder", str(at / "groups")]
        argv[argv.index("--threshold") + 1] = "0.005"
        found.append((argv, wrong_input))
    if maker == "train":  # a finished one that goes on reads its checkpoint
        again = [*cases["train"].argv[:-1], str(at / "student")]
        again[again.index("--num-steps") + 1] = "6"
        found.append((again, wrong_input))
    folder = str(at / stage_cases.KEPT[maker])
    return [*found, (("verify", folder), FAULT), (("verify", folder, "--repair"), FAULT)]


def write_by_other_version(world: World, stages: Sequence[str], by: int) -> Path:
    """Make the first stage's folder anew as another version would; the later ones are made again from it."""
    maker = stages[0]
    for name in stages:
        case, folder = stage_cases.cases(world)[name], world.folder / stage_cases.KEPT[name]
        for path in sorted(folder.rglob("*"), reverse=True):
            path.unlink() if path.is_file() else path.rmdir()
        argv = [*case.argv[:-1], str(folder)]

        def work(argv: Sequence[str] = argv, is_other: bool = name == maker) -> int:
            return _run_as(argv, by if is_other else 0, writes_checkpoints=maker == "train")

        ended = run_child(work, world.folder)
        if ended.code:
            raise AssertionError(f"{argv} gave {ended.code}: {ended.said}")
    return world.folder / stage_cases.KEPT[maker]


def _run_as(argv: Sequence[str], by: int, *, writes_checkpoints: bool) -> int:
    """Run a command as a version that reads all others, and whose own number differs by `by`."""
    from distilclip import cli

    for module in (*WRITERS, *CHECKPOINTS):
        found: Any = importlib.import_module(f"distilclip.{module}")
        if module in WRITERS:
            own = by if not writes_checkpoints else 0
            found.FORMAT_VERSION = TolerantText(int(found.FORMAT_VERSION) + own)
        elif hasattr(found, "FORMAT"):
            found.FORMAT = TolerantNumber(found.FORMAT + (by if writes_checkpoints else 0))
    return cli.main(argv)
