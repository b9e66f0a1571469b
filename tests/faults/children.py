"""Run a stage in a forked child, and look at what its folder holds afterwards."""

from __future__ import annotations

import contextlib
import faulthandler
import hashlib
import importlib
import json
import logging
import os
import re
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.faults.operations import Operations, Trap
from tests.faults.outcome import Outcome, Size

SECONDS = 180
"""A child that lives longer hangs."""
HUNG = 124
"""Its exit code, as that of `timeout`."""


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a child ended: its exit code (-9 for SIGKILL), what it said, and what it did to files, as (kind, path)."""

    code: int
    said: str
    operations: list[tuple[str, str]]
    seconds: float

    seconds_to_end: float
    """from SIGTERM to the end"""


def run_stage(
    argv: Sequence[str], folder: Path, *, trap: Trap | None = None, terminate_after: float | None = None
) -> Ended:
    """Run `distilclip ARGV` in a child of this process, which has imported everything; all below `folder` is watched.

    `terminate_after` are seconds until it gets SIGTERM.
    """

    def work() -> int:
        code = run_here(argv)
        (control_of(folder) / "modules.txt").write_text("\n".join(sys.modules))
        return code

    return run_child(work, folder, trap=trap, terminate_after=terminate_after)


def run_here(argv: Sequence[str]) -> int:
    """Run `distilclip ARGV` in this process, a child, as a new one would; its exit code."""
    from distilclip import cli, digests, folder_lock

    logging.getLogger("distilclip").handlers.clear()
    digests.forget()
    code = cli.main(argv)
    folder_lock.release_all()  # what atexit would do
    return code


def speak_into(path: Path) -> None:
    """Let this process, a child, write what it says to a file."""
    output = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)


def control_of(folder: Path) -> Path:
    """Where children tell of themselves, outside of what is watched."""
    place = folder.with_name(f"{folder.name}-control")
    place.mkdir(exist_ok=True)
    return place


def import_as_children(folder: Path) -> None:
    """Import here what the last child has imported, so that the next ones need not."""
    for name in (control_of(folder) / "modules.txt").read_text().split():
        if name not in sys.modules:
            with warnings.catch_warnings(), contextlib.suppress(Exception):  # not all can be had by their names
                warnings.simplefilter("ignore")
                importlib.import_module(name)


def run_child(
    work: Callable[[], int], folder: Path, *, trap: Trap | None = None, terminate_after: float | None = None
) -> Ended:
    """Call a function in a child; what it returns is the exit code, and an exception is a traceback and 1."""
    said, log = control_of(folder) / "said.txt", control_of(folder) / "operations.txt"
    started = time.monotonic()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of Python 3.12: threads of numba, which sleep
        pid = os.fork()
    if pid == 0:
        _become_child(work, said, log, folder, trap or Trap())
    code, seconds_to_end = _wait(pid, started, terminate_after)
    lines = [line.split("\t")[1:] for line in log.read_text().splitlines()]
    return Ended(
        code=code,
        said=said.read_text(errors="replace"),
        operations=[(kind, path) for kind, path in lines],
        seconds=time.monotonic() - started,
        seconds_to_end=seconds_to_end,
    )


def _become_child(work: Callable[[], int], said: Path, log: Path, folder: Path, trap: Trap) -> None:
    code = 1
    try:
        speak_into(said)
        written = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        Operations(trap, (f"{folder}/",), written).watch()
        faulthandler.dump_traceback_later(SECONDS - 5)  # to `said`, where it hangs
        code = work()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _wait(pid: int, started: float, terminate_after: float | None) -> tuple[int, float]:
    """Wait for a child; its exit code, and the seconds that it lived after SIGTERM. One that hangs is killed."""
    terminated = 0.0
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        passed = time.monotonic() - started
        if found:
            return os.waitstatus_to_exitcode(status), passed - terminated if terminated else 0.0
        if terminate_after is not None and passed >= terminate_after and not terminated:
            os.kill(pid, signal.SIGTERM)
            terminated = passed
        if passed > SECONDS:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return HUNG, 0.0
        time.sleep(0.002)


UNSTEADY = ("env.json", "index.html")
"""Files that docs/formats.md lets differ: both hold times."""


def snapshot(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file below a folder, without what docs/formats.md lets differ, and every empty folder."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_file():
            found[name] = hashlib.sha256(_steady(path)).hexdigest() if path.name not in UNSTEADY else "unsteady"
        elif not any(path.iterdir()):
            found[f"{name}/"] = "empty"
    return found


def _steady(path: Path) -> bytes:
    if path.name != "metrics.jsonl":
        return path.read_bytes()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    kept = [{k: v for k, v in x.items() if k != "samples_per_second" and not k.endswith("_share")} for x in lines]
    return json.dumps(kept).encode()


def differences(before: dict[str, str], after: dict[str, str]) -> list[str]:
    """What differs between two snapshots, in words."""
    return [
        f"{name} {'is missing' if name not in after else 'is new' if name not in before else 'differs'}"
        for name in sorted({*before, *after})
        if before.get(name) != after.get(name)
    ]


def plain(path: str) -> str:
    """A path without what differs from run to run: the numbers of temporary names."""
    return re.sub(r"\.\d+\.[0-9a-f]{8}\.tmp$", ".tmp", path)


def run_in_fresh_process(name: str, folder: Path, *, size: Size) -> list[Outcome]:
    """Run a drill from a process that has computed nothing, as forks need it: for tests, whose own has."""
    from tests.ranks import server

    context = server()
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_send_outcomes, args=(name, folder, size, send))
    process.start()
    send.close()
    try:
        found: Any = receive.recv()
    except EOFError:
        found = [f"the drill {name} ended without a word"]
    process.join()
    if not all(isinstance(outcome, Outcome) for outcome in found):
        raise AssertionError("\n".join(found))
    return found  # type: ignore[no-any-return]


def _send_outcomes(name: str, folder: Path, size: Size, send: Any) -> None:
    try:
        send.send(importlib.import_module(f"tests.faults.{name}").drill(folder, size=size))
    except BaseException:
        send.send([traceback.format_exc()])
