"""Training in several processes, and training that is interrupted: what comes out is the same."""

from __future__ import annotations

import itertools
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from distilclip.data.stream import Batch, PairStream
from distilclip.stages import train
from tests.ranks import free_port, join_ranks, run_ranks, server
from tests.stages.made_training import Prepared, config, contents, prepare, steady_metrics

SIGNAL_STEPS = 4000  # more than are done before the signals come


@pytest.fixture
def prepared(pair_tars: Callable[..., list[str]], tiny_clip_folder: str, tmp_path: Path) -> Prepared:
    return prepare(pair_tars, tiny_clip_folder, tmp_path)


@pytest.fixture
def cid(prepared: Prepared) -> dict[str, Any]:
    """CLIP-CID with sampled classes, a moving average, masked pictures and a queue: all that has state or draws."""
    terms = {"sample_rate": 0.8, "masked": 1.0, "queue": 1.0, "queue_length": 20.0}
    common = {"store": prepared.store, "clusters": prepared.clusters, "objective": "clip-cid", "terms": terms}
    return {**common, "num_steps": 6, "average_decay": 0.5, "centers_learning_rate": 1e-2}


def weights(out: Path, step: int) -> dict[str, torch.Tensor]:
    folder = out / f"checkpoints/step-{step:06d}"
    return safetensors.torch.load((folder / "trained.safetensors").read_bytes())


def assert_same_training(found: Path, expected: Path, *, step: int) -> None:
    """Equal but for the rounding of sums in another order."""
    lines = steady_metrics(found), steady_metrics(expected)
    assert [line["step"] for line in lines[0]] == [line["step"] for line in lines[1]]
    for a, b in zip(*lines, strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-5)
    pairs = weights(found, step), weights(expected, step)
    for name, value in pairs[1].items():
        torch.testing.assert_close(pairs[0][name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_two_processes_train_as_one_and_any_number_goes_on(
    cid: dict[str, Any], tiny_clip_json: str, tmp_path: Path
) -> None:
    one, two, sharded, moved = (tmp_path / name for name in ("one", "two", "sharded", "moved"))
    everything = {**cid, "keep_checkpoints": 9}
    expected = train.main(config(one, tiny_clip_json, **everything))
    results = run_ranks(2, train.main, config(two, tiny_clip_json, **everything))
    run_ranks(2, train.main, config(sharded, tiny_clip_json, **everything, strategy="fsdp", micro_batch=2))
    without = {key: value for key, value in expected.items() if key != "digest"}
    assert [{k: v for k, v in result.items() if k != "digest"} for result in results] == [without, without]
    assert results[0]["digest"] == results[1]["digest"] == json.loads((two / "result.json").read_text())["digest"]
    assert_same_training(two, one, step=6)
    assert_same_training(sharded, one, step=6)
    ranges = sorted(path.name for path in (two / "checkpoints/step-000004/centers").iterdir())
    assert ranges == ["000000000-000000002.safetensors", "000000002-000000005.safetensors"]
    assert run_ranks(2, train.main, config(two, tiny_clip_json, **everything)) == results  # finished: left alone

    # From two processes to one, and from FSDP2 to three processes under DDP.
    for source, world in ((two, 1), (sharded, 4)):
        source.rename(moved)
        for step in (4, 6):
            (moved / f"checkpoints/step-{step:06d}/state.json").unlink()
        (moved / "result.json").unlink()
        run_ranks(world, train.main, config(moved, tiny_clip_json, **everything, strategy="ddp"))
        assert_same_training(moved, one, step=6)
        moved.rename(tmp_path / f"done-{world}")


def start(settings: train.Config, world: int) -> list[ForkServerProcess]:
    """`train` in the background, in processes as tests.ranks starts them."""
    port = free_port()
    processes = [server().Process(target=in_background, args=(settings, rank, world, port)) for rank in range(world)]
    for process in processes:
        process.start()
    return processes


def in_background(settings: train.Config, rank: int, world: int, port: int) -> None:
    join_ranks(rank, world, port)
    train.main(settings)


def wait_for(path: Path, processes: list[ForkServerProcess]) -> None:
    deadline = time.monotonic() + 100
    while not path.exists() and time.monotonic() < deadline:
        assert all(process.is_alive() for process in processes)
        time.sleep(0.005)
    assert path.exists()


@pytest.mark.slow
def test_sigkill_with_a_sharded_head_and_rerun_give_the_undisturbed_bytes(
    cid: dict[str, Any], tiny_clip_json: str, tmp_path: Path
) -> None:
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    everything = {**cid, "keep_checkpoints": 50, "num_steps": 20}
    run_ranks(2, train.main, config(undisturbed, tiny_clip_json, **everything))
    processes = start(config(killed, tiny_clip_json, **everything), 2)
    wait_for(killed / "checkpoints/step-000004/state.json", processes)
    for process in processes:
        process.kill()
        process.join()
    assert not (killed / "result.json").exists()
    run_ranks(2, train.main, config(killed, tiny_clip_json, **everything))
    assert (killed / "result.json").read_bytes() == (undisturbed / "result.json").read_bytes()
    assert steady_metrics(killed) == steady_metrics(undisturbed)
    assert contents(killed / "checkpoints") == contents(undisturbed / "checkpoints")


@pytest.mark.parametrize("world", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_signals_save_and_the_run_goes_on_from_there(
    world: int, cid: dict[str, Any], tiny_clip_json: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    settings = {**cid, "checkpoint_every": SIGNAL_STEPS, "num_steps": SIGNAL_STEPS}
    processes = start(config(out, tiny_clip_json, **settings), world)
    wait_for(out / "metrics.jsonl", processes)
    while not steady_metrics(out):
        time.sleep(0.01)
    os.kill(processes[-1].pid or 0, signal.SIGUSR1)  # one process hears it, all of them save
    while not (saved := sorted(out.glob("checkpoints/*/state.json"))):
        time.sleep(0.01)
    assert all(process.is_alive() for process in processes)
    os.kill(processes[0].pid or 0, signal.SIGTERM)
    for process in processes:
        process.join(30)
    assert {process.exitcode for process in processes} == {-signal.SIGTERM}
    (last,) = out.glob("checkpoints/*/state.json")  # the first one was replaced
    assert last > saved[0]
    state = json.loads(last.read_text())
    assert not state["scheduled"]
    lines = steady_metrics(out)
    assert lines[-1]["step"] == state["step"] // 10 * 10
    assert state["log"]["num_steps"] == state["step"] % 10


@pytest.mark.slow
def test_a_checkpoint_between_two_lines_changes_no_line(
    cid: dict[str, Any], tiny_clip_json: str, tmp_path: Path
) -> None:
    undisturbed, often = tmp_path / "undisturbed", tmp_path / "often"
    common = {**cid, "num_steps": 12, "checkpoint_every": 12}
    train.main(config(undisturbed, tiny_clip_json, **common))
    train.main(config(often, tiny_clip_json, **common, checkpoint_minutes=1e-9, keep_best="agreement"))
    assert steady_metrics(often) == steady_metrics(undisturbed)
    assert [path.name for path in (often / "checkpoints").iterdir()] == ["step-000012"]


def test_a_run_that_goes_on_between_two_lines_equals_an_undisturbed_one_bit_for_bit(
    cid: dict[str, Any], tiny_clip_json: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed, cut = tmp_path / "undisturbed", tmp_path / "cut"
    common = {**cid, "num_steps": 12, "checkpoint_every": 12}
    train.main(config(undisturbed, tiny_clip_json, **common))
    batches = PairStream.batches

    def seven(self: PairStream, **options: Any) -> Iterator[Batch]:
        yield from itertools.islice(batches(self, **options), 7)
        raise ConnectionError("the disk is gone")

    monkeypatch.setattr(PairStream, "batches", seven)
    with pytest.raises(ConnectionError):
        train.main(config(cut, tiny_clip_json, **common, checkpoint_minutes=1e-9))
    monkeypatch.undo()
    assert [path.name for path in (cut / "checkpoints").iterdir()] == ["step-000007"]
    train.main(config(cut, tiny_clip_json, **common))
    assert steady_metrics(cut) == steady_metrics(undisturbed)
    assert contents(cut / "checkpoints") == contents(undisturbed / "checkpoints")


def test_a_gradient_that_is_not_finite_names_step_and_rank_after_a_checkpoint(
    prepared: Prepared, tiny_clip_json: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    settings = config(
        out, tiny_clip_json, store=prepared.store, learning_rate=1e30, num_steps=50, checkpoint_every=50, warmup_steps=0
    )
    with pytest.raises(
        AssertionError, match=r"Step (\d+): the loss or its gradient is not finite\. rank 0: .*'task'.*rank 1"
    ):
        run_ranks(2, train.main, settings)
    (saved,) = (out / "checkpoints").iterdir()
    state = json.loads((saved / "state.json").read_text())
    assert state["step"] > 0
    assert state["unusable"]["num_seen"] == 8 * state["step"]


def test_a_batch_that_does_not_divide_is_refused_by_every_process(
    prepared: Prepared, tiny_clip_json: str, tmp_path: Path
) -> None:
    settings = config(tmp_path / "out", tiny_clip_json, store=prepared.store, batch_size=9)
    with pytest.raises(AssertionError, match="batch_size 9 does not divide among 2 processes"):
        run_ranks(2, train.main, settings)
