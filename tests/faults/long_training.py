"""Train for long, and restart loaders for twenty epochs: memory stays flat, and no sample is lost or doubled."""

from __future__ import annotations

import contextlib
import itertools
import json
import multiprocessing
import os
import signal
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tests.conftest import TINY_CLIP
from tests.faults import stage_cases
from tests.faults.crash_points import outcome
from tests.faults.elasticity import write_pairs
from tests.faults.outcome import Outcome, Size
from tests.faults.stage_cases import World

MOST_GROWTH = 0.5
"""Megabytes in 1,000 steps that count as flat: a million steps stay below half a gigabyte."""
ROWS, BATCH = 96, 8  # loader processes are a third of an epoch ahead


def drill(folder: Path, *, size: Size) -> list[Outcome]:
    """Ten thousand steps and twenty epochs; small: four epochs."""
    found = [restart_loaders(folder / "epochs", num_epochs=4 if size == "small" else 20, num_kills=size == "full")]
    if size == "full":
        world = stage_cases.make(folder / "world", stages=("embed", "balance", "cluster"))
        found.append(train_long(world, num_steps=10_000))
    return found


def restart_loaders(folder: Path, *, num_epochs: int, num_kills: bool) -> Outcome:
    """Take epochs from loader processes that are begun anew for each, in the middle of some, or killed there."""
    from distilclip.data import workers
    from distilclip.data.stream import PairSource, Presentation, open_stream
    from distilclip.errors import InputError

    started = time.monotonic()
    workers._CHECK_SECONDS = 1  # else it takes ten seconds to find that one was killed
    source = PairSource(data=write_pairs(folder, ROWS))
    stream = open_stream(source, Presentation(sizes=[32], tokenize=_tokenize, seed=0), batch_size=BATCH)
    problems, step, ended = [], 0, Counter[str]()
    for epoch in range(num_epochs):
        seen: Counter[int] = Counter()
        stop = (epoch + 1) * stream.steps_per_epoch
        how = ("whole", "left", "killed" if num_kills else "left")[epoch % 3]
        with contextlib.suppress(InputError):
            before = set(children_of(os.getpid()))
            for number, batch in enumerate(stream.batches(start=step, stop=stop, num_workers=2)):
                step += 1
                seen.update(batch.ids.tolist())
                if number == 1 and how == "left":
                    break
                if number == 1 and how == "killed":
                    for loader in set(children_of(os.getpid())) - before:
                        os.kill(loader, signal.SIGKILL)
        ended[how] += step < stop
        for batch in stream.batches(start=step, stop=stop, num_workers=1):
            step += 1
            seen.update(batch.ids.tolist())
        if len(seen) != ROWS or set(seen.values()) != {1}:
            problems.append(f"epoch {epoch} ({how}): {ROWS - len(seen)} pairs lost, {seen.total() - len(seen)} doubled")
    return outcome(
        "Loader processes that are begun anew in every epoch, left in the middle of it or killed there lose and double "
        "no sample.",
        f"{num_epochs} epochs of {ROWS} pairs, each counted; {ended['left']} were left and {ended['killed']} killed in "
        "the middle, and gone on with from the next step.",
        [(num_epochs, problems)],
        started,
    )


def _tokenize(captions: Sequence[str]) -> object:
    import torch

    return torch.zeros(len(captions), 1, dtype=torch.long)


def train_long(world: World, *, num_steps: int) -> Outcome:
    """Train CLIP-CID with a loader process, look at the memory of both meanwhile, and fit a line to it."""
    started = time.monotonic()
    case = stage_cases.cases(world)["train"]
    flags = {
        "--num-steps": num_steps,
        "--checkpoint-every": 1000,
        "--num-workers": 1,
        "--student": json.dumps(TINY_CLIP),
    }
    argv = list(case.argv)
    for flag, value in flags.items():
        argv[argv.index(flag) + 1] = str(value)
    process = multiprocessing.get_context("fork").Process(target=_train, args=(argv, world.folder / "said.txt"))
    process.start()
    samples: list[tuple[int, float]] = []
    while process.is_alive():
        time.sleep(0.2)
        if process.pid and (step := last_step(case.out / "metrics.jsonl")):
            samples.append((step, resident_megabytes(process.pid)))
    process.join()
    problems = [f"training gave {process.exitcode}: {(world.folder / 'said.txt').read_text()[-400:]}"] * bool(
        process.exitcode
    )
    slope, spread, peak = fit_slope([sample for sample in samples if sample[1] > 0], first=num_steps // 5)
    if slope - 2 * spread > MOST_GROWTH:
        problems.append(f"memory grows by {slope:.2f} MB in 1,000 steps")
    return outcome(
        f"The memory of a training stays flat: below {MOST_GROWTH} MB in 1,000 steps.",
        f"{num_steps:,} steps of CLIP-CID with a tiny student, ten checkpoints and a loader process; a line through "
        f"the resident memory of both processes, without the first fifth: {slope:+.3f} MB in 1,000 steps, standard "
        f"error {spread:.3f} (from 8 blocks), at {peak:.0f} MB.",
        [(1, problems)],
        started,
    )


def _train(argv: list[str], said: Path) -> None:
    from distilclip import cli

    output = os.open(said, os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    raise SystemExit(cli.main(argv))


def last_step(metrics: Path) -> int:
    """Return the steps done by the last whole line of metrics.jsonl, 0 where there is none yet."""
    with contextlib.suppress(OSError), metrics.open("rb") as file:
        file.seek(max(0, metrics.stat().st_size - 4096))
        for line in reversed(file.read().splitlines()):
            with contextlib.suppress(ValueError):
                return int(json.loads(line)["step"])
    return 0


def resident_megabytes(pid: int) -> float:
    """Return the resident memory of a process and of those that it started."""
    pages = 0
    for each in (pid, *children_of(pid)):
        with contextlib.suppress(OSError):
            pages += int(Path(f"/proc/{each}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def children_of(pid: int) -> list[int]:
    """Return the processes that a process has started and that live."""
    found: list[int] = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += map(int, path.read_text().split())
    return found


def fit_slope(samples: Sequence[tuple[int, float]], *, first: int) -> tuple[float, float, float]:
    """Return the growth in megabytes per 1,000 steps, its standard error from 8 blocks, and the largest size."""
    steps, sizes = np.array([sample for sample in samples if sample[0] >= first], float).T
    edges = np.linspace(steps[0], steps[-1] + 1, 9)
    blocks = [(steps >= low) & (steps < high) for low, high in itertools.pairwise(edges)]
    x, y = (np.array([values[block].mean() for block in blocks if block.any()]) for values in (steps / 1000, sizes))
    slope, offset = np.polyfit(x, y, 1)
    error = np.sqrt(((y - slope * x - offset) ** 2).sum() / max(1, len(x) - 2) / ((x - x.mean()) ** 2).sum())
    return float(slope), float(error), float(sizes.max())
