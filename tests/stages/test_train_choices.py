"""What a training may begin with and learn from: initial weights, stored views, several teachers, sigmoid models."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch

from distilclip.data.store import Store
from distilclip.errors import InputError
from distilclip.models.clip import create_clip, load_clip
from distilclip.stages import embed, train
from tests.conftest import TINY_CLIP
from tests.stages.made_training import config, final_digest, steady_metrics

PairTars = Callable[..., list[str]]

SIGMOID = json.dumps({**TINY_CLIP, "init_logit_bias": -10, "init_logit_scale": 2.302})


def store_of(folder: Path, tars: list[str], model: str, **options: Any) -> str:
    embed.main(embed.Config(data=tuple(tars), out=str(folder), model=model, num_workers=0, **options))
    return str(folder)


@pytest.fixture
def tars(pair_tars: PairTars) -> list[str]:
    return pair_tars(shards=2, rows=8)


def test_views_are_trained_on_with_their_own_embeddings(
    tars: list[str], tiny_clip_folder: str, tiny_clip_json: str, tmp_path: Path
) -> None:
    store = store_of(tmp_path / "store", tars, tiny_clip_folder, views=2)
    common = {
        "store": store,
        "objective": "clip-kd",
        "init": (f"weights:{tiny_clip_folder}",),
        "student": tiny_clip_json,
    }
    slow = {"learning_rate": 1e-9, "num_steps": 2}
    train.main(config(tmp_path / "views", tiny_clip_json, views=2, **common, **slow))
    train.main(config(tmp_path / "crops", tiny_clip_json, min_crop=0.9, **common, **slow))
    views, crops = (steady_metrics(tmp_path / name)[-1] for name in ("views", "crops"))
    assert views["cosine_image"] == pytest.approx(1, abs=1e-3)  # the student is the teacher, and sees what it saw
    assert crops["cosine_image"] < views["cosine_image"]
    with pytest.raises(InputError, match="has 2 views, not 3"):
        train.main(config(tmp_path / "more", tiny_clip_json, views=3, **common))


@pytest.mark.slow
def test_several_teachers_of_their_own_width_teach_one_student_and_it_resumes(
    tars: list[str], tiny_clip_folder: str, tiny_clip_json: str, tmp_path: Path
) -> None:
    wide = json.dumps({**TINY_CLIP, "embed_dim": 24})
    create_clip(wide, seed=3).save(str(tmp_path / "wide"))
    first = store_of(tmp_path / "first", tars, tiny_clip_folder)
    second = store_of(tmp_path / "second", tars, str(tmp_path / "wide"))
    common = {"store": first, "other_stores": (f"{second}=0.5",), "objective": "clip-kd"}
    train.main(config(tmp_path / "both", tiny_clip_json, **common))
    heads = safetensors.torch.load_file(tmp_path / "both/checkpoints/step-000004/heads.safetensors")
    assert heads["image_projection.weight"].shape == (16, 8)
    assert heads["others.0.image_projection.weight"].shape == (24, 8)
    resumed = tmp_path / "resumed"
    train.main(config(resumed, tiny_clip_json, **common))
    (resumed / "result.json").unlink()
    (resumed / "checkpoints/step-000004/state.json").unlink()
    train.main(config(resumed, tiny_clip_json, **common))
    assert final_digest(resumed) == final_digest(tmp_path / "both")
    train.main(config(tmp_path / "one", tiny_clip_json, store=first, objective="clip-kd"))
    assert final_digest(tmp_path / "one") != final_digest(resumed)


def test_stores_of_other_pairs_are_refused(
    tars: list[str], pair_tars: PairTars, tiny_clip_folder: str, tiny_clip_json: str, tmp_path: Path
) -> None:
    first = store_of(tmp_path / "first", tars, tiny_clip_folder)
    fewer = store_of(tmp_path / "fewer", pair_tars(shards=1, rows=8, folder="others"), tiny_clip_folder)
    with pytest.raises(InputError, match="were not made from the same shards"):
        train.main(config(tmp_path / "out", tiny_clip_json, store=first, other_stores=(fewer,)))


def test_a_sigmoid_student_learns_from_a_sigmoid_teacher(tars: list[str], tmp_path: Path) -> None:
    create_clip(SIGMOID, seed=3).save(str(tmp_path / "teacher"))
    store = store_of(tmp_path / "store", tars, str(tmp_path / "teacher"))
    assert Store.open(store).teacher["bias"] == -10
    out = tmp_path / "student"
    train.main(config(out, SIGMOID, store=store, terms={"relational": 1.0}, num_steps=12, learning_rate=3e-3))
    assert load_clip(str(out)).bias is not None
    assert load_clip(str(out)).bias != -10  # it is trained too
    lines = steady_metrics(out)
    assert lines[-1]["task"] < lines[0]["task"]
    assert lines[-1]["relational"] < lines[0]["relational"]


def test_a_student_begins_with_its_teachers_weights(
    tars: list[str], tiny_clip_folder: str, tiny_clip_json: str, tmp_path: Path
) -> None:
    store = store_of(tmp_path / "store", tars, tiny_clip_folder)
    shallow = {**TINY_CLIP, "vision_cfg": {**TINY_CLIP["vision_cfg"], "layers": 1}}
    common = {"store": store, "objective": "clip-kd", "student": json.dumps(shallow), "num_steps": 1}
    nearness = {}
    for name, init in (("scratch", ()), ("inherited", (f"inherit:{tiny_clip_folder}",))):
        result = train.main(config(tmp_path / name, tiny_clip_json, init=init, **common))
        assert result.get("fresh") == ([] if init else None)  # every weight came from the teacher, or nobody asked
        nearness[name] = steady_metrics(tmp_path / name)[0]["cosine_text"]
    assert nearness["inherited"] == pytest.approx(1, abs=1e-3)  # the text tower is the whole teacher's
    assert nearness["scratch"] < 0.9


def test_tensorboard_shows_the_lines_of_metrics_jsonl(tars: list[str], tiny_clip_json: str, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "out"
    train.main(config(out, tiny_clip_json, data=tuple(tars), track=("tensorboard",)))
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    expected = [(line["step"], pytest.approx(line["loss"])) for line in steady_metrics(out)]
    assert [(event.step, event.value) for event in events.Scalars("loss")] == expected
    assert len(expected) == 2


def test_a_tracker_without_its_package_is_refused_before_anything_is_written(
    tars: list[str], tiny_clip_json: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'distilclip\[wandb\]'"):
        train.main(config(tmp_path / "out", tiny_clip_json, data=tuple(tars), track=("wandb",)))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"data": ("a.tar",), "views": 1}, "--other-stores and --views need a --store"),
        ({"store": "s", "views": -1}, "views is -1"),
        ({"store": "s", "views": 1, "min_crop": 0.5}, "leave out --min-crop and --flip"),
        ({"store": "s", "live_teacher": "t", "other_stores": ("x",)}, "leave out --live-teacher"),
        ({"store": "s", "other_stores": ("x=half",)}, "'x=half' does not end in a weight"),
        ({"store": "s", "other_stores": ("x=0",)}, "weights must be positive"),
    ],
)
def test_contradictory_flags_are_refused(values: dict[str, Any], message: str, tiny_clip_json: str) -> None:
    with pytest.raises(InputError, match=message):
        config(Path("unused"), tiny_clip_json, **values)
