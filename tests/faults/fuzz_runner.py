"""Run many made-up inputs through one door of distilclip, in a child that is watched for hangs and for its memory.

hypothesis makes the cases. Each must end in a result, or in what the command line turns into one line and an exit code.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import re
import resource
import select
import signal
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hypothesis
from hypothesis import strategies as st

from tests.faults.outcome import Outcome

CPU_SECONDS = 20
"""Computing time after which a case hangs."""
WALL_SECONDS = 180
"""Time after which a case hangs that computes nothing; the machine may be busy with other work."""
MEMORY = 1 << 30
"""Bytes that a child may take above what it has when it starts."""
SHOWN = 5
CODES = (0, 1, 2, 3)
"""Exit codes of the command line; 1 is that of `verify` alone."""


@dataclass(frozen=True, kw_only=True)
class Door:
    """A way in: how its inputs are made, and what takes one.

    `enter(case, folder)` raises `Lost` where a row is neither read nor skipped; whether it returns True says that there
    was a result, False that there was one error line. What else it raises is judged as the command line would.
    """

    name: str
    cases: st.SearchStrategy[Any]
    enter: Callable[[Any, Path], bool]
    share: float = 1.0
    """part of all cases"""


class Lost(Exception):  # noqa: N818  (a finding)
    """An input ended otherwise than promised."""


@dataclass
class Ran:
    """What became of the cases of a door."""

    num_cases: int = 0
    num_results: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    peak: int = 0
    """bytes that the child took above what it had when it started"""
    slowest: float = 0.0


def run_door(door: Door, folder: Path, *, num_cases: int, seed: int) -> Ran:
    """Run `num_cases` cases in children: the next one goes on where one hung or crashed."""
    ran = Ran()
    folder.mkdir(parents=True, exist_ok=True)
    while ran.num_cases < num_cases:
        before = ran.num_cases
        _run_child(door, folder, ran, num_cases=num_cases - before, seed=seed + before)
        if ran.num_cases == before:
            break
    return ran


def outcome(door: Door, ran: Ran, *, promise: str, how: str, seconds: float) -> Outcome:
    """Return the outcome of a door."""
    num_faults = sum(ran.faults.values())
    notes = [f"{ran.num_results:,} gave a result, {ran.num_cases - num_faults - ran.num_results:,} one error line"]
    notes.append(f"the child took {ran.peak / 2**20:.0f} MiB more at most, the slowest case {ran.slowest:.1f} s")
    notes += [f"{count}x {what}" for what, count in ran.faults.most_common(SHOWN)]
    return Outcome(
        promise=promise,
        how=how,
        num_cases=ran.num_cases,
        num_survived=ran.num_cases - num_faults,
        seconds=seconds,
        notes=f"{door.name}: {'; '.join(notes)}.",
    )


def _run_child(door: Door, folder: Path, ran: Ran, *, num_cases: int, seed: int) -> None:
    """Run cases in one child, until it has done all, hangs or crashes."""
    receive, send = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of Python 3.12: threads of numba, which sleep
        pid = os.fork()
    if pid == 0:
        os.close(receive)
        _be_child(door, folder, send, num_cases=num_cases, seed=seed)
    os.close(send)
    started = time.monotonic()
    with open(receive, "rb") as lines:
        while True:
            ready, _, _ = select.select([lines], [], [], WALL_SECONDS)
            line = lines.readline() if ready else b""
            if not line:
                break
            said = json.loads(line)
            ran.num_cases += said["cases"]
            ran.num_results += said["results"]
            ran.peak = max(ran.peak, said["peak"])
            ran.slowest = max(ran.slowest, said["slowest"])
            ran.faults.update(said["faults"])
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL) if time.monotonic() - started > WALL_SECONDS and not line else None
    _, status = os.waitpid(pid, 0)
    if code := os.waitstatus_to_exitcode(status):
        what = "hang" if code in (-signal.SIGPROF, -signal.SIGKILL) else f"child ended with {code}"
        last = (folder / "case.txt").read_text()[:300] if (folder / "case.txt").exists() else ""
        ran.num_cases += 1
        ran.faults[f"{what}: {last}"] += 1


def _be_child(door: Door, folder: Path, send: int, *, num_cases: int, seed: int) -> None:
    code = 1
    try:
        hypothesis.configuration.set_hypothesis_home_dir(folder / "hypothesis")  # type: ignore[attr-defined]
        os.chdir(folder)
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        # Not exceptions but an end: a hang may be in compiled code.
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        limit = _status("VmSize") + 2 * MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        _run_cases(door, folder, send, num_cases=num_cases, seed=seed)
        code = 0
    except BaseException:
        (folder / "case.txt").write_text(traceback.format_exc()[-300:])
    finally:
        os._exit(code)


def _run_cases(door: Door, folder: Path, send: int, *, num_cases: int, seed: int) -> None:
    at_start = _status("VmHWM")

    def run(case: Any) -> None:
        # The start only: it says which kind of case it was, and a case may be large.
        (folder / "case.txt").write_text(f"{door.name} {case!r}"[:300], errors="replace")
        started = time.process_time()
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        fault, is_result = judge(lambda: door.enter(case, folder))
        signal.setitimer(signal.ITIMER_PROF, 0)
        peak = max(0, _status("VmHWM") - at_start)
        if peak > MEMORY and not fault:
            fault = f"{peak >> 20} MiB of memory"
        said = {"cases": 1, "results": int(is_result and not fault), "peak": peak, "faults": [fault] if fault else []}
        said["slowest"] = time.process_time() - started
        os.write(send, (json.dumps(said) + "\n").encode())

    settings = hypothesis.settings(
        max_examples=num_cases,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    hypothesis.seed(seed)(settings(hypothesis.given(door.cases)(run)))()


def _status(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) << 10


def judge(work: Callable[[], bool]) -> tuple[str, bool]:
    """Return what is wrong with how a case ends, empty where nothing is, and whether it ended in a result."""
    from distilclip import failures

    try:
        return "", work()
    except Lost as lost:
        return str(lost), False
    except SystemExit as end:  # tyro's, with a message of its own
        return ("" if end.code == 2 else f"exit code {end.code}"), False
    except BaseException as error:
        failure = failures.explain(error)
        if failure is None:
            where = traceback.extract_tb(error.__traceback__)[-1]
            at = f"{Path(where.filename).name}:{where.lineno}"
            return f"traceback: {type(error).__name__}: {str(error)[:160]} ({at})", False
        if isinstance(error, MemoryError):
            return "memory used up", False
        if "\n" in failure.text or not failure.text.strip():
            return f"not one line: {failure.text[:200]!r}", False
        return "", False


def command(argv: list[str]) -> tuple[int, str]:
    """Run `distilclip ARGV` in this process; its exit code and what it said on stderr.

    Raises `Lost` unless it said one error line where it failed, or where there is a traceback.
    """
    from distilclip import cli, folder_lock

    logging.getLogger("distilclip").handlers.clear()
    said, printed = io.StringIO(), io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(printed):
        try:
            code = cli.main(argv)
        except SystemExit as end:
            code = int(end.code or 0)
            if code == 2:
                return code, said.getvalue()
        finally:
            folder_lock.release_all()
    text = said.getvalue()
    lines = [line for line in text.splitlines() if line.startswith(f"distilclip {argv[0]}: ")]
    if code not in CODES or "Traceback" in text:
        raise Lost(f"exit code {code}: {text[-200:]!r}")
    if (code in (2, 3)) != (len(lines) == 1):
        raise Lost(f"exit code {code} with {len(lines)} error lines: {text[-200:]!r}")
    return code, text


def flipped(content: bytes, flips: list[tuple[float, int]]) -> bytes:
    """Return bytes with some exchanged: each at a share of the length, XORed with a number from 1 to 255."""
    changed = bytearray(content)
    for share, mask in flips if content else ():
        changed[min(len(changed) - 1, int(share * len(changed)))] ^= mask
    return bytes(changed)


FLIPS = st.lists(st.tuples(st.floats(0, 1), st.integers(1, 255)), max_size=6)


@st.composite
def damaged(draw: Callable[..., Any], contents: st.SearchStrategy[bytes]) -> bytes:
    """Bytes that are flipped, cut, doubled in part, or overwritten with zeros; sometimes whole."""
    content = draw(contents)
    kind = draw(st.sampled_from(["whole", "flip", "flip", "flip", "cut", "insert", "zero"]))
    if kind == "flip":
        return flipped(content, draw(FLIPS))
    start, length = draw(st.integers(0, len(content))), draw(st.integers(0, 600))
    if kind == "cut":
        return content[:start]
    if kind == "insert":
        return content[:start] + draw(st.binary(max_size=64)) + content[start:]
    return (
        content[:start] + bytes(min(length, len(content) - start)) + content[start + length :]
        if kind == "zero"
        else content
    )
