"""A recipe whose training steps run in several processes: started by `run` itself, by torchrun, and by Slurm."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from distilclip import cli, launch, stage_folder
from tests.ranks import free_port

RECIPE = """
out = "{out}"
[corpus]
num_pairs = 48
shard_size = 24
num_eval = 4
image_size = 32
num_workers = 0
[train]
data = ["@corpus/train/*.tar"]
batch_size = 8
num_steps = 3
warmup_steps = 1
num_workers = 0
precision = "fp32"
device = "cpu"
student = {student}
[train.one]
[train.two]
init = ["weights:@train/one"]
[embed]
data = ["@corpus/train/*.tar"]
model = "@train/two"
num_workers = 0
device = "cpu"
"""
SLURM = {"SLURM_NTASKS": "2", "SLURM_STEP_ID": "0", "SLURM_JOB_ID": "41", "SLURM_STEP_TASKS_PER_NODE": "2"}


@pytest.fixture
def recipe(tmp_path: Path, tiny_clip_json: str) -> str:
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE.replace("{student}", json.dumps(tiny_clip_json)).replace("{out}", str(tmp_path / "own")))
    return str(path)


def start(words: list[str], **variables: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-m", *words], env=environment, stdout=pipe, stderr=pipe, text=True)


def start_slurm(words: list[str]) -> list[subprocess.Popen[str]]:
    """Two tasks of `srun` on this machine."""
    place = {**SLURM, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    tasks = [{"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)} for rank in range(2)]
    return [start(["distilclip", *words], **place, **task) for task in tasks]


def torchrun(*words: str) -> list[str]:
    return ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "distilclip", *words]


def ended(processes: list[subprocess.Popen[str]]) -> str:
    """What the processes said on stderr; all must have succeeded."""
    said = [process.communicate(timeout=600)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), "\n".join(said)
    return "\n".join(said)


def losses(out: Path) -> list[float]:
    lines = [
        line for name in ("one", "two") for line in stage_folder.read_metrics(str(out / f"train/{name}/metrics.jsonl"))
    ]
    assert len(lines) == 2  # each the mean of three steps
    return [line["loss"] for line in lines]


@pytest.mark.slow
def test_two_processes_however_they_are_started_train_as_one(recipe: str, tmp_path: Path) -> None:
    run = ["run", recipe, "--out"]
    assert cli.main([*run, str(tmp_path / "alone")]) == 0
    ended([start(["distilclip", *run, str(tmp_path / "itself"), "--nproc-per-node", "2"])])
    ended([start(torchrun(*run, str(tmp_path / "torchrun")))])
    said = ended(start_slurm([*run, str(tmp_path / "slurm")]))
    assert said.count("1/4 corpus") == 1  # only one process prepares
    expected = tmp_path / "alone"
    for name in ("itself", "torchrun", "slurm"):
        found = tmp_path / name
        assert losses(found) == pytest.approx(losses(expected), rel=1e-6, abs=1e-6)
        pairs = sorted((expected / "corpus/train").iterdir())
        assert [path.read_bytes() for path in pairs] == [(found / "corpus/train" / p.name).read_bytes() for p in pairs]
        assert (found / "embed/result.json").exists()
        assert not list(found.rglob("lock.json"))


@pytest.mark.slow
def test_one_step_of_a_recipe_has_the_references_and_the_folder_of_run(
    recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["corpus", recipe]) == 0
    assert cli.main(["train", f"{recipe}#one"]) == 0
    ended([start(torchrun("train", f"{recipe}#two"))])
    out = tmp_path / "own"
    assert stage_folder.read_json(str(out / "train/two/config.json"))["init"] == [f"weights:{out}/train/one"]
    capsys.readouterr()
    assert cli.main(["run", recipe]) == 0  # finds them done
    said = capsys.readouterr().err
    assert all(f"{number}/4 {path} (finished before)" in said for number, path in ((1, "corpus"), (3, "train/two")))
    assert cli.main(["train", f"{recipe}#two", "--init", "weights:@train/tow", "--out", str(tmp_path / "x")]) == 2


def test_a_stage_of_one_process_runs_once_under_torchrun(tmp_path: Path) -> None:
    words = ["corpus", "--num-pairs", "16", "--num-eval", "4", "--image-size", "32", "--num-workers", "0"]
    said = ended([start(torchrun(*words, "--out", str(tmp_path / "corpus")))])
    assert said.count("corpus runs in one process: the other 1 that were started end at once") == 1
    assert said.count("written to") == 1


@pytest.mark.slow
def test_a_failure_in_the_processes_of_run_is_said_once(recipe: str, tmp_path: Path) -> None:
    words = ["run", recipe, "--out", str(tmp_path / "out"), "--nproc-per-node", "3"]  # 8 pairs for 3 processes
    process = start(["distilclip", *words])
    said = process.communicate(timeout=240)[1]
    assert process.returncode == 2
    assert "Traceback" not in said
    assert said.count("distilclip train: ") == 1
    assert "distilclip run: train in 3 processes failed (exit code 2)" in said


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("gpu[007-010,12],cpu3", "gpu007"), ("node1,node2", "node1"), ("n[3]-ib", "n3-ib"), ("alone", "alone")],
)
def test_the_first_node_of_a_list_of_slurm(nodes: str, first: str) -> None:
    assert launch.first_node(nodes) == first


def test_the_batch_script_of_slurm_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "SLURM_STEP_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_NTASKS", "16")
    assert launch.find_place() == (0, 1)
    monkeypatch.setenv("SLURM_STEP_ID", str(0xFFFFFFFB))
    assert launch.find_place() == (0, 1)
