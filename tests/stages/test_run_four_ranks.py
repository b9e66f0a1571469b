"""A recipe of all stages on four ranks: started by `run`, torchrun and Slurm, killed and run again, it is the same."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from distilclip import cli, stage_folder
from tests.ranks import free_port
from tests.stages.test_run_processes import ended, start

RECIPE = """
out = "{out}"
[corpus]
num_pairs = 64
shard_size = 32
num_eval = 12
image_size = 32
num_workers = 0
[train]
batch_size = 8
num_steps = 10
warmup_steps = 1
checkpoint_every = 2
keep_checkpoints = 9
num_workers = 0
precision = "fp32"
device = "cpu"
student = {student}
[train.teacher]
data = ["@corpus/train/*.tar"]
[train.small]
store = "@embed"
groups = "@balance"
clusters = "@cluster"
objective = "clip-cid"
validate = ["tar:@corpus/eval/shape", "pairs:@corpus/eval/retrieval"]
held_out = ["@embed"]
validate_every = 2
keep_best = "held-out/loss"
[embed]
data = ["@corpus/train/*.tar"]
model = "@train/teacher"
num_workers = 0
device = "cpu"
[balance]
store = "@embed"
metric = "cosine"
target_removed = 0.2
max_threshold = 0.5
[cluster]
store = "@embed"
groups = "@balance"
num_centers = 5
[evaluate]
models = ["student=@train/small"]
sets = ["tar:@corpus/eval/shape", "pairs:@corpus/eval/retrieval"]
num_workers = 0
device = "cpu"
[report]
folders = ["@"]
"""
RANKS = 4


@pytest.fixture
def recipe(tmp_path: Path, tiny_clip_json: str) -> str:
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE.replace("{student}", json.dumps(tiny_clip_json)).replace("{out}", str(tmp_path / "own")))
    return str(path)


def start_itself(words: list[str]) -> list[subprocess.Popen[str]]:
    return [start(["distilclip", *words, "--nproc-per-node", str(RANKS)])]


def start_torchrun(words: list[str]) -> list[subprocess.Popen[str]]:
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
    return [start([*launcher, "-m", "distilclip", *words])]


def start_slurm(words: list[str]) -> list[subprocess.Popen[str]]:
    """Two nodes of two tasks each, as `srun` would start them."""
    place = {"SLURM_NTASKS": "4", "SLURM_STEP_ID": "0", "SLURM_JOB_ID": "41", "SLURM_STEP_TASKS_PER_NODE": "2(x2)"}
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    tasks = [
        {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank % 2), "SLURM_NODEID": str(rank // 2)}
        for rank in range(RANKS)
    ]
    return [start(["distilclip", *words], **place, **task) for task in tasks]


def losses(out: Path) -> list[dict[str, float]]:
    """What was logged of both trainings, without what the clock decides."""
    return [
        {name: value for name, value in line.items() if name != "samples_per_second" and not name.endswith("_share")}
        for name in ("teacher", "small")
        for line in stage_folder.read_metrics(str(out / f"train/{name}/metrics.jsonl"))
    ]


def assert_same(found: Path, expected: Path) -> None:
    lines = losses(found), losses(expected)
    assert len(lines[0]) == len(lines[1]) == 10
    for line, other in zip(*lines, strict=True):
        assert line == pytest.approx(other, rel=1e-4, abs=1e-5)
    # The student learns from a store in half precision of a teacher that differs by rounding.
    for line, other in list(zip(*lines, strict=True))[:5]:
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-6, abs=1e-6)
    for path in (expected / "corpus").rglob("*.tar"):
        assert (found / path.relative_to(expected)).read_bytes() == path.read_bytes()
    for stage in ("embed", "balance", "cluster", "evaluate", "report"):
        assert (found / stage / "result.json").exists()
    kept = [stage_folder.read_json(str(out / "balance/result.json"))["num_kept"] for out in (found, expected)]
    assert kept[0] == kept[1]
    assert not list(found.rglob("lock.json"))


@pytest.mark.slow
def test_four_ranks_do_what_one_does_however_they_are_started(recipe: str, tmp_path: Path) -> None:
    assert cli.main(["run", recipe, "--out", str(tmp_path / "alone")]) == 0
    for starts in (start_itself, start_torchrun, start_slurm):
        out = tmp_path / starts.__name__
        said = ended(starts(["run", recipe, "--out", str(out)]))
        assert said.count("1/8 corpus") == 1  # only one process prepares
        assert_same(out, tmp_path / "alone")


@pytest.mark.slow
def test_killed_in_any_part_and_run_again_it_is_the_undisturbed_training(recipe: str, tmp_path: Path) -> None:
    """Killed in the student's training: one of its ranks, then what started them, then all; then it finishes."""
    undisturbed, out = tmp_path / "undisturbed", tmp_path / "out"
    words = ["run", recipe, "--out", str(undisturbed)]
    ended(start_itself(words))
    words[-1] = str(out)
    (process,) = start_itself(words)
    wait_for(out / "train/small/checkpoints/step-000002/state.json", process)
    os.kill(ranks_of(process.pid)[-1], signal.SIGKILL)
    said = process.communicate(timeout=120)[1]
    assert process.returncode not in (0, None)
    assert "Traceback" not in said
    (process,) = start_itself(words)
    wait_for(out / "train/small/checkpoints/step-000004/state.json", process)
    ranks = ranks_of(process.pid)
    os.kill(launcher_of(process.pid), signal.SIGKILL)
    process.communicate(timeout=120)
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{rank}").exists() for rank in ranks):  # they save and end
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert not (out / "train/small/result.json").exists()
    (process,) = start_itself(words)
    wait_for(out / "train/small/checkpoints/step-000008/state.json", process)
    for pid in [*ranks_of(process.pid), process.pid]:
        os.kill(pid, signal.SIGKILL)
    process.communicate()
    assert not (out / "train/small/result.json").exists()
    ended(start_itself(words))
    for line, other in zip(losses(out), losses(undisturbed), strict=True):
        assert line == pytest.approx(other, rel=1e-5, abs=1e-6)  # DDP sums in another order in its first step
    for stage in ("embed", "balance", "cluster"):
        ours, theirs = (stage_folder.read_json(str(folder / stage / "result.json")) for folder in (out, undisturbed))
        for result in (ours, theirs):
            result.pop("digests")  # of files that hold the paths of the pairs
        assert json.dumps(ours).replace(str(out), "") == json.dumps(theirs).replace(str(undisturbed), "")


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 400
    while not path.exists():
        assert process.poll() is None, "ended too early"
        assert time.monotonic() < deadline
        time.sleep(0.01)


def ranks_of(pid: int) -> list[int]:
    """The processes of a training that `run` has started, as children of its launcher."""
    ranks = children_of(launcher_of(pid))
    assert len(ranks) == RANKS
    return ranks


def launcher_of(pid: int) -> int:
    (launcher,) = children_of(pid)
    return launcher


def children_of(pid: int) -> list[int]:
    lines = subprocess.run(["ps", "-eo", "pid,ppid"], capture_output=True, text=True, check=True).stdout
    return [int(own) for own, parent in map(str.split, lines.splitlines()[1:]) if parent == str(pid)]
