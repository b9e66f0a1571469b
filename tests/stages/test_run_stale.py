"""A recipe that changes: what is stale and why, what is made anew, and what is left alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from distilclip import cli
from distilclip.errors import InputError
from distilclip.stages import run

RECIPE = """
[corpus]
num_pairs = 120
shard_size = 60
num_eval = 8
image_size = 32
num_workers = 0
[embed]
data = ["@corpus/train/*.tar"]
model = "{teacher}"
num_workers = 0
[balance]
store = "@embed"
metric = "cosine"
threshold = {threshold}
[cluster]
store = "@embed"
groups = "@balance"
num_centers = {num_centers}
[report]
folders = ["@"]
num_groups = 1
"""


@pytest.fixture
def folder(tiny_clip_folder: str, tmp_path: Path) -> Path:
    """The folder of a finished run of `recipe.toml`, beside it."""
    write(tmp_path, tiny_clip_folder)
    again(tmp_path)
    return tmp_path


def write(folder: Path, teacher: str, *, threshold: float = 0.001, num_centers: int = 4) -> None:
    text = RECIPE.format(teacher=teacher, threshold=threshold, num_centers=num_centers)
    (folder / "recipe.toml").write_text(text)


def again(folder: Path, **options: Any) -> dict[str, Any]:
    return run.main(run.Config(recipe=str(folder / "recipe.toml"), out=str(folder / "out"), **options))


def states(folder: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    capsys.readouterr()
    again(folder, dry_run=True)
    return dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_changed_threshold_is_stale_with_all_that_reads_it_and_is_made_anew_only_when_asked(
    folder: Path, tiny_clip_folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    first = contents(folder / "out")
    assert set(states(folder, capsys).values()) == {"finished"}
    write(folder, tiny_clip_folder, threshold=0.002)
    found = states(folder, capsys)
    assert found["embed"] == "finished"
    assert found["balance"] == "stale (threshold was 0.001, now 0.002)"
    assert found["cluster"] == "stale (it reads balance, made anew)"
    assert "balance" in found["report"]

    with pytest.raises(InputError, match=r"balance: stale \(threshold was 0.001, now 0.002\)[^$]*--stale redo"):
        again(folder)
    assert contents(folder / "out") == first

    again(folder, stale="redo")
    assert json.loads((folder / "out" / "balance" / "config.json").read_text())["threshold"] == 0.002
    beside = contents(folder / "out-before-1")
    assert {name.split("/")[0] for name in beside} == {"balance", "cluster", "report"}
    assert beside.items() <= first.items()
    assert set(states(folder, capsys).values()) == {"finished"}

    write(folder, tiny_clip_folder, threshold=0.002, num_centers=5)
    again(folder, stale="replace")
    assert json.loads((folder / "out" / "cluster" / "result.json").read_text())["num_centers"] == 5
    assert not (folder / "out-before-2").exists()
    assert contents(folder / "out-before-1") == beside


def test_one_step_and_those_from_a_step_on(
    folder: Path, tiny_clip_folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write(folder, tiny_clip_folder, threshold=0.002, num_centers=5)
    again(folder, only="balance", stale="replace")
    found = states(folder, capsys)
    assert found["balance"] == "finished"
    assert "num_centers was 4, now 5; balance changed since it was made" in found["cluster"]
    again(folder, from_step="cluster", stale="replace")
    assert set(states(folder, capsys).values()) == {"finished"}
    with pytest.raises(InputError, match=r"--only 'balanc': the recipe has no such step\. Did you mean 'balance'"):
        again(folder, only="balanc")


def test_a_finished_run_answers_without_torch_or_numpy(folder: Path) -> None:
    code = (
        "import sys; from distilclip import cli; assert cli.main(sys.argv[1:]) == 0; "
        "heavy = {'torch', 'numpy', 'pyarrow', 'fsspec'} & set(sys.modules); assert not heavy, heavy"
    )
    words = ["run", str(folder / "recipe.toml"), "--out", str(folder / "out")]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("(finished before)") == 5


def test_the_command_line_says_it_in_one_message(
    folder: Path, tiny_clip_folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write(folder, tiny_clip_folder, threshold=0.002)
    capsys.readouterr()
    assert cli.main(["run", str(folder / "recipe.toml"), "--out", str(folder / "out")]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"distilclip run: {folder / 'out'} holds steps that would come out differently now:")
    assert "Traceback" not in said


def test_a_stale_folder_that_another_process_writes_is_left_alone(folder: Path, tiny_clip_folder: str) -> None:
    write(folder, tiny_clip_folder, num_centers=5)
    cluster = folder / "out" / "cluster"
    (cluster / "result.json").unlink()
    hold = "import sys; from distilclip.folder_lock import hold; hold(sys.argv[1]); print('held', flush=True); input()"
    words = [sys.executable, "-c", hold, str(cluster)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        before = contents(cluster)
        for stale in ("redo", "replace"):
            with pytest.raises(InputError, match=f"cluster is held by process {other.pid} "):
                again(folder, stale=stale)
        assert contents(cluster) == before
        other.communicate("\n")
    again(folder, stale="replace")
    assert json.loads((cluster / "result.json").read_text())["num_centers"] == 5
