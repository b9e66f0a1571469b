"""A recipe with weights and with captions of the group, through the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from distilclip import cli
from distilclip.errors import InputError
from distilclip.report.load import load
from distilclip.stages import balance, cluster, embed, run, train, weigh  # noqa: F401

RECIPE = """
out = "unused"
[embed]
data = {data}
model = {model}
num_workers = 0
device = "cpu"
[balance]
store = "@embed"
metric = "cosine"
target_removed = 0.4
max_threshold = 1.0
rule = "cover"
device = "cpu"
[cluster]
store = "@embed"
groups = "@balance"
num_centers = 3
device = "cpu"
[weigh]
store = "@embed"
groups = "@balance"
clusters = "@cluster"
cluster_power = 0.5
group_power = 0.5
[train]
student = {student}
objective = "clip-kd"
store = "@embed"
groups = "@balance"
row_weights = "@weigh"
captions = "of-group"
batch_size = 8
num_steps = 4
warmup_steps = 1
checkpoint_every = 2
precision = "fp32"
num_workers = 0
device = "cpu"
"""


def test_a_recipe_weighs_and_teaches_all_captions(
    pair_tars: Callable[..., list[str]],
    tiny_clip_folder: str,
    tiny_clip_json: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    values = {"data": pair_tars(shards=2, rows=16), "model": tiny_clip_folder, "student": tiny_clip_json}
    recipe, out = tmp_path / "recipe.toml", tmp_path / "run"
    recipe.write_text(RECIPE.format(**{name: json.dumps(value) for name, value in values.items()}))
    assert cli.main(["run", str(recipe), "--out", str(out)]) == 0
    balanced, weighed, trained = (
        json.loads((out / f"{n}/result.json").read_text()) for n in ("balance", "weigh", "train")
    )
    assert trained["num_rows"] == balanced["num_kept"] == weighed["num_rows"] < 32
    assert trained["mixture"] == {name: weighed[name] for name in ("effective_rows", "most_often")}
    assert trained["captions"]["num_captions"] == 32
    said = capsys.readouterr().err
    assert f"{balanced['num_kept']} pictures are taught with 32 captions" in said
    assert json.loads((out / "train/inputs.json").read_text()).keys() == {"embed", "balance", "weigh"}
    assert cli.main(["verify", str(out)]) == 0
    assert load([str(out)]).trainings[0].remarks == ["rows weighed by weigh", "32 captions of groups"]
    flags = ["--captions", "own", "--out", str(tmp_path / "own")]
    assert cli.main(["train", str(out / "train/config.json"), *flags]) == 0
    own = json.loads((tmp_path / "own/result.json").read_text())
    assert "captions" not in own
    assert own["digest"] != trained["digest"]
    with pytest.raises(InputError, match="--captions of-group needs --groups"):
        train.Config(out="x", student="ViT-T-16", store="s", captions="of-group")
