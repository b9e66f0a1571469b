"""Training whose data does not come any more: a signal ends it, after it has saved."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distilclip.data.stream import PairLoader
from distilclip.stages import train
from distilclip.train import signals
from tests.ranks import free_port, join_ranks, server
from tests.stages.made_training import config, contents

HUNG_AT = 5  # the step whose batch never comes


def train_on_hung_data(settings: train.Config, marks: str, rank: int, world: int, port: int) -> None:
    join_ranks(rank, world, port)
    read, calls = PairLoader.__getitem__, []

    def hang(self: PairLoader, task: Any) -> Any:
        calls.append(task)
        if len(calls) == HUNG_AT + 1 and rank == world - 1:
            Path(marks, "hung").touch()
            time.sleep(600)
        return read(self, task)

    PairLoader.__getitem__ = hang  # type: ignore[method-assign]
    signals.DATA_SECONDS = 1
    train.main(settings)


@pytest.mark.parametrize("world", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_signal_while_the_data_hangs_ends_the_processes(
    world: int, pair_tars: Callable[..., list[str]], tiny_clip_json: str, tmp_path: Path
) -> None:
    settings = {"data": tuple(pair_tars(shards=2, rows=12)), "objective": "clip", "checkpoint_every": 100}
    out, port = tmp_path / "out", free_port()
    hung = config(out, tiny_clip_json, **settings, num_steps=8)
    processes = [
        server().Process(target=train_on_hung_data, args=(hung, str(tmp_path), rank, world, port))
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    wait_for(tmp_path / "hung")
    os.kill(processes[-1].pid or 0, signal.SIGTERM)
    processes[-1].join(20)
    assert processes[-1].exitcode == -signal.SIGTERM
    for process in processes:  # torchrun would end those that wait for the one that is gone
        process.kill()
        process.join()
    states = list(out.glob("checkpoints/*/state.json"))
    if world > 1:
        assert not states
        return
    assert json.loads(states[0].read_text())["step"] == HUNG_AT
    train.main(hung)
    undisturbed = tmp_path / "undisturbed"
    train.main(config(undisturbed, tiny_clip_json, **settings, num_steps=8))
    assert contents(out / "checkpoints") == contents(undisturbed / "checkpoints")


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 100
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
