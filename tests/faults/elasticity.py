"""Let trainings go on with another number of processes after each interruption: the same batches, no sample lost.

What a process is given is written down as it takes it, in every attempt. A step that was taken again after a kill was
undone by going back to the checkpoint before: the last attempt at a step counts.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.conftest import TINY_CLIP, encoded, picture, write_tar
from tests.faults.crash_points import outcome
from tests.faults.outcome import Outcome, Size
from tests.ranks import free_port, join_ranks, server

ROWS, BATCH, STEPS = 36, 12, 12  # four epochs of three steps
SECONDS = 600
"""A process that lives longer hangs."""


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """How many processes train, and what ends them: a signal to some of them, when they are given a step."""

    world: int
    step: int = STEPS
    signal: int = 0
    ranks: tuple[int, ...] = ()


TURNS = (
    Attempt(world=1, step=1, signal=signal.SIGTERM, ranks=(0,)),
    Attempt(world=2, step=3, signal=signal.SIGTERM, ranks=(1,)),
    Attempt(world=3, step=6, signal=signal.SIGKILL, ranks=(0, 1, 2)),
    Attempt(world=1, step=7, signal=signal.SIGKILL, ranks=(0,)),
    Attempt(world=3, step=9, signal=signal.SIGKILL, ranks=(1,)),
    Attempt(world=2),
)


def drill(folder: Path, *, size: Size) -> list[Outcome]:
    """Streams alone, and a training; small: fewer streams, and no training, which tests/stages has."""
    started = time.monotonic()
    streams = continue_streams(folder / "streams", num_cases=40 if size == "small" else 400)
    found = [
        outcome(
            "The batches of any seed, batch size and number of pairs are the same for any number of processes, "
            "whatever it was before, and show every pair once an epoch but for those that fill no batch.",
            "Four epochs each on 1 to 6 processes in turn, changed at steps drawn by chance, against one process.",
            [streams],
            started,
        )
    ]
    if size == "full":
        started = time.monotonic()
        trained = continue_training(folder / "training")
        how = "1, 2, 3, 1, 3, 2 processes, ended by SIGTERM to one, SIGKILL of all or of one, against one process."
        promise = (
            "A training that goes on with another number of processes after every interruption sees every pair exactly "
            "once an epoch and the global batches of one process, and its losses are equal up to rounding."
        )
        found.append(outcome(promise, how, [trained], started))
    return found


def write_pairs(folder: Path, rows: int) -> list[str]:
    """Write pairs into two tars of unequal length."""
    paths = []
    for shard, numbers in enumerate((range(rows // 3), range(rows // 3, rows))):
        members = []
        for number in numbers:
            members += [
                (f"{number:05d}.jpg", encoded(picture(number))),
                (f"{number:05d}.txt", f"no. {number}".encode()),
            ]
        paths.append(write_tar(folder / f"{shard:05d}.tar", members))
    return paths


def continue_streams(folder: Path, *, num_cases: int) -> tuple[int, list[str]]:
    """Draw epochs, batch sizes, and numbers of processes that change at any step."""
    from distilclip.data.bad_samples import ErrorPolicy
    from distilclip.data.stream import PairSource, PairStream, Presentation, open_stream

    draw, problems = random.Random(0), []
    sizes = [20 + 7 * number for number in range(6)]
    tars = {rows: write_pairs(folder / str(rows), rows) for rows in sizes}
    for case in range(num_cases):
        rows, seed = draw.choice(sizes), draw.randrange(100)
        batch_size = draw.choice([b for b in (6, 12, 18) if b <= rows])
        shown = Presentation(sizes=[32], tokenize=lambda captions: None, seed=seed)  # type: ignore[arg-type, return-value]
        whole = open_stream(PairSource(data=tars[rows]), shown, batch_size=batch_size)
        worlds = [world for world in (1, 2, 3, 6) if batch_size % world == 0]
        shown_in: dict[int, Counter[int]] = {}
        loader, world = whole.loader, 1
        for step in range(4 * whole.steps_per_epoch):
            world = draw.choice(worlds) if draw.random() < 0.5 else world
            parts = [
                PairStream(loader, ErrorPolicy("skip"), batch_size=batch_size, rank=rank, world=world).rows_at(step)[1]
                for rank in range(world)
            ]
            epoch, expected, _ = whole.rows_at(step)
            if not np.array_equal(np.concatenate(parts), expected):
                problems.append(f"case {case}: step {step} on {world} processes differs")
                break
            shown_in.setdefault(epoch, Counter()).update(expected.tolist())
        wanted = rows // batch_size * batch_size
        if any(len(seen) != wanted or max(seen.values()) > 1 for seen in shown_in.values()) or len(shown_in) != 4:
            problems.append(f"case {case}: an epoch has not {wanted} different pairs")
    return num_cases, problems


def continue_training(folder: Path) -> tuple[int, list[str]]:
    """Train in turns; the number of turns and of epochs, and what went wrong in which."""
    tars = write_pairs(folder / "pairs", ROWS)
    for name, attempts in (("one", (Attempt(world=1),)), ("turns", TURNS)):
        if problems := [
            p for turn, attempt in enumerate(attempts) if (p := run_attempt(folder / name, tars, turn, attempt))
        ]:
            return len(TURNS) + 4, problems
    problems = []
    expected = {step: ids for step, _, ids in read_batches(folder / "one")}
    last: dict[int, list[int]] = {}
    for step, turn, ids in read_batches(folder / "turns"):
        last[step] = ids
        if ids != expected[step]:
            problems.append(f"turn {turn}: step {step} has another global batch than on one process")
    for epoch in range(4):
        seen = Counter(identity for step in range(3 * epoch, 3 * epoch + 3) for identity in last.get(step, []))
        if len(seen) != ROWS or set(seen.values()) != {1}:
            problems.append(f"epoch {epoch}: {ROWS - len(seen)} pairs lost, {seen.total() - len(seen)} doubled")
    one, turns = (read_losses(folder / name) for name in ("one", "turns"))
    if one.keys() != turns.keys() or not np.allclose(list(one.values()), list(turns.values()), rtol=1e-4):
        problems.append(f"losses differ: {one} and {turns}")
    return len(TURNS) + 4, problems


def run_attempt(folder: Path, tars: Sequence[str], turn: int, attempt: Attempt) -> str:
    """Run the processes of an attempt to their end; what is wrong with it, or nothing."""
    port = free_port()
    given = (str(folder), list(tars), turn, attempt)
    processes = [server().Process(target=train_and_record, args=(*given, rank, port)) for rank in range(attempt.world)]
    for process in processes:
        process.start()
    deadline = time.monotonic() + SECONDS
    for process in processes:
        process.join(max(0.1, deadline - time.monotonic()))
    hanging = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for rank in hanging:
        processes[rank].kill()
    codes = [process.exitcode for process in processes]
    if hanging:
        return f"turn {turn}: processes {hanging} of {attempt.world} hung"
    if not attempt.signal and any(codes):
        return f"turn {turn}: exit codes {codes}"
    if attempt.signal and 0 in codes:
        return f"turn {turn}: exit codes {codes}, although a process was ended"
    if attempt.signal == signal.SIGTERM and any(code not in (-signal.SIGTERM, 128 + signal.SIGTERM) for code in codes):
        return f"turn {turn}: exit codes {codes} after SIGTERM"
    return ""


def train_and_record(folder: str, tars: list[str], turn: int, attempt: Attempt, rank: int, port: int) -> None:
    """In a process of its own: train, write down the batches, and send the signal when its step comes."""
    join_ranks(rank, attempt.world, port)
    from distilclip import cli
    from distilclip.data.stream import Batch, PairStream

    original = PairStream.batches
    record = Path(f"{folder}-given")
    record.mkdir(exist_ok=True)

    def batches(self: PairStream, *, start: int = 0, stop: int, num_workers: int = 0) -> Iterator[Batch]:
        with (record / f"{turn:02d}-{attempt.world}-{rank}.jsonl").open("w") as file:
            for step, batch in enumerate(original(self, start=start, stop=stop, num_workers=num_workers), start):
                print(json.dumps({"step": step, "ids": batch.ids.tolist()}), file=file, flush=True)
                if step == attempt.step and rank in attempt.ranks:
                    os.kill(os.getpid(), attempt.signal)
                yield batch

    PairStream.batches = batches  # type: ignore[method-assign]
    flags = ["--data", *tars, "--out", folder, "--batch-size", BATCH, "--num-steps", STEPS, "--warmup-steps", 1]
    flags += ["--checkpoint-every", 2, "--num-workers", rank % 2, "--precision", "fp32", "--device", "cpu"]
    raise SystemExit(cli.main(["train", *map(str, flags), "--student", json.dumps(TINY_CLIP)]))


def read_batches(folder: Path) -> list[tuple[int, int, list[int]]]:
    """Return the global batches as (step, turn, ids), in the order of turns; whole ones only."""
    parts: dict[tuple[int, int], dict[int, list[int]]] = {}
    worlds = {}
    for path in sorted(folder.with_name(f"{folder.name}-given").glob("*.jsonl")):
        turn, world, rank = map(int, path.stem.split("-"))
        worlds[turn] = world
        for line in path.read_text().splitlines():
            with contextlib.suppress(ValueError):  # a kill cut it
                found: dict[str, Any] = json.loads(line)
                parts.setdefault((turn, found["step"]), {})[rank] = found["ids"]
    return [
        (step, turn, [identity for rank in sorted(by_rank) for identity in by_rank[rank]])
        for (turn, step), by_rank in sorted(parts.items())
        if len(by_rank) == worlds[turn]
    ]


def read_losses(folder: Path) -> dict[int, float]:
    """Return the loss of every line of metrics.jsonl, by its step."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines}
