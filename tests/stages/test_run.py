"""A whole recipe: order, resume, SIGKILL in every stage, and refusals."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from distilclip.errors import InputError
from distilclip.stages import run as run_stage
from tests.ranks import server

RECIPE = """
out = "unused"
[report]
folders = ["@"]
num_groups = 1
[train]
batch_size = 32
num_steps = 4
warmup_steps = 1
checkpoint_every = 2
num_workers = 0
precision = "fp32"
student = {student}
[train.teacher]
data = ["@corpus/train/*.tar"]
[train.clip-kd]
store = "@embed"
objective = "clip-kd"
[train.clip-cid]
store = "@embed"
groups = "@balance"
clusters = "@cluster"
objective = "clip-cid"
[corpus]
num_pairs = 160
shard_size = 80
num_eval = 32
image_size = 32
num_workers = 0
[embed]
data = ["@corpus/train/*.tar"]
model = "@train/teacher"
num_workers = 0
[balance]
store = "@embed"
metric = "cosine"
target_removed = 0.3
max_threshold = 0.5
[cluster]
store = "@embed"
groups = "@balance"
num_centers = 8
[evaluate]
models = ["teacher=@train/teacher", "clip-kd=@train/clip-kd", "clip-cid=@train/clip-cid"]
sets = ["tar:@corpus/eval/shape", "pairs:@corpus/eval/retrieval"]
probe_l2 = 1.0
num_workers = 0
"""

ORDER = [
    "corpus",
    "train/teacher",
    "embed",
    "train/clip-kd",
    "balance",
    "cluster",
    "train/clip-cid",
    "evaluate",
    "report",
]


@pytest.fixture
def recipe(tmp_path: Path, tiny_clip_json: str) -> str:
    student = json.dumps(tiny_clip_json)  # a TOML string with the JSON inside
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE.replace("{student}", student))
    return str(path)


def run(recipe: str, out: Path) -> dict[str, Any]:
    return run_stage.main(run_stage.Config(recipe=recipe, out=str(out)))


def steady_contents(out: Path) -> dict[str, Any]:
    """Every file below a run, without what depends on the clock."""
    contents: dict[str, Any] = {}
    for path in sorted(out.rglob("*")):
        name = str(path.relative_to(out))
        if path.is_dir() or path.name == "env.json" or name.startswith(("report/", "evaluate/cache/")):
            continue  # the page shows speeds and dates; cached features are named by when their files changed
        if path.name == "metrics.jsonl":
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            steady = [{k: v for k, v in line.items() if not k.endswith(("_per_second", "_share"))} for line in lines]
            contents[name] = steady
        else:
            contents[name] = path.read_bytes()
    return contents


def test_steps_run_after_those_they_use_whatever_the_order_of_the_file(recipe: str, tmp_path: Path) -> None:
    from distilclip import config

    steps = run_stage.read_steps(config.read_recipe(recipe), out="here", seed=5, source="recipe")
    assert [step.path for step in steps] == ORDER
    assert steps[0].config.seed == 5
    assert steps[2].config.data == ("here/corpus/train/*.tar",)
    assert steps[-1].config.folders == ("here",)


def test_killed_in_every_stage_and_run_again_equals_an_undisturbed_run(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("undisturbed", "killed"):  # the same relative path in two places: stores name their tars
        (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path / "undisturbed")
    run(recipe, Path("run"))
    monkeypatch.chdir(tmp_path / "killed")
    killed = Path("run")
    num_killed = 0
    for step in ORDER:
        process = server().Process(target=run, args=(recipe, killed))
        process.start()
        while not (killed / step / "config.json").exists() and process.is_alive():
            time.sleep(0.001)
        time.sleep(0.05)  # into the stage's work
        process.kill()
        process.join()
        num_killed += not (killed / step / "result.json").exists()
    assert num_killed >= len(ORDER) // 2  # a quick stage may have finished; most were caught at work
    run(recipe, killed)
    assert steady_contents(killed) == steady_contents(tmp_path / "undisturbed" / "run")


def test_a_second_run_computes_nothing(recipe: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    first = run(recipe, out)
    assert first["steps"] == ORDER
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path != out / "result.json" and path.is_file()}
    run(recipe, out)
    again = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path != out / "result.json" and path.is_file()}
    assert again == times


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[embed]\ndata = ['a']\nmodel = '@train/teacher'\n", "@train/teacher is no step"),
        ("[trian]\n", r"no stage \[trian\]. Did you mean 'train'"),
        ("seed = 3\n[embed]\n", "'seed' stands outside a table"),
        ("", "has no steps"),
        (
            "[embed]\ndata = ['@embed/x']\nmodel = 'm'\n",
            r"steps \['embed'\] wait for one another",
        ),
        ("[embed]\ndata = ['a']\nmodle = 'm'\n", "unknown key 'modle'. Did you mean 'model'"),
    ],
)
def test_bad_recipes_are_refused_before_anything_runs(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        run(str(path), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_recipe_without_a_folder_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text("[embed]\n")
    with pytest.raises(InputError, match="names no `out` folder"):
        run_stage.main(run_stage.Config(recipe=str(path)))
