"""Validation while a student learns: the numbers of `evaluate`, in any number of processes, and what follows."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from distilclip import stage_folder
from distilclip.data.stream import PairSource, Presentation, open_stream
from distilclip.errors import InputError
from distilclip.losses.contrastive import contrastive
from distilclip.models.clip import create_clip, load_clip, normalise_pixels
from distilclip.sets.specs import parse_spec
from distilclip.stage_calls import build_config
from distilclip.stages import embed, evaluate, train
from distilclip.train.validation import default_interval
from tests.ranks import run_ranks
from tests.sets.test_sets import write_own_sets
from tests.stages.made_training import Prepared, config, final_digest, prepare, steady_metrics


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A labelled set of 9 test pictures, and image-text pairs."""
    folder = tmp_path_factory.mktemp("sets")
    return write_own_sets(folder, ["circle", "square", "star"], num_train=1, num_test=3)


@pytest.fixture
def prepared(pair_tars: Callable[..., list[str]], tiny_clip_folder: str, tmp_path: Path) -> Prepared:
    return prepare(pair_tars, tiny_clip_folder, tmp_path)


@pytest.fixture
def held_out(pair_tars: Callable[..., list[str]], tiny_clip_folder: str, tmp_path: Path) -> str:
    """The teacher's store of 10 further pairs."""
    store = str(tmp_path / "aside")
    tars = pair_tars(shards=1, rows=10, folder="others")
    embed.main(embed.Config(data=tuple(tars), out=store, model=tiny_clip_folder, num_workers=0))
    return store


def evaluation(out: Path, **values: Any) -> evaluate.Config:
    return build_config(
        evaluate.Config, {"out": str(out), "device": "cpu", "num_workers": 0, **values}, stage="evaluate"
    )


def validated(out: Path) -> dict[int, dict[str, float]]:
    """The columns of the validations, by step."""
    lines = stage_folder.read_metrics(str(out / "metrics.jsonl"))
    found = {line["step"]: {k.removeprefix("validate/"): v for k, v in line.items() if "/" in k} for line in lines}
    return {step: values for step, values in found.items() if values}


@pytest.mark.parametrize("average_decay", [0.0, 0.5])
def test_the_numbers_are_those_of_evaluate(
    prepared: Prepared, sets: tuple[str, str], tiny_clip_json: str, tmp_path: Path, average_decay: float
) -> None:
    out = tmp_path / "out"
    values = {"validate": sets, "validate_every": 1, "checkpoint_every": 1, "keep_checkpoints": 9}
    train.main(config(out, tiny_clip_json, data=tuple(prepared.tars), average_decay=average_decay, **values))
    steps = [1, 2, 3, 4]
    models = tuple(f"m{step}={out}/checkpoints/step-{step:06d}" for step in steps)
    result = evaluate.main(evaluation(tmp_path / "e", models=models, sets=sets))
    expected: dict[int, dict[str, float]] = {step: {} for step in steps}
    for row in result["rows"]:
        if row["task"] in ("zero-shot", "retrieval"):
            expected[int(row["model"][1:])][f"{row['set']}/{row['metric']}"] = row["value"]
    assert validated(out) == expected
    assert len({tuple(values.values()) for values in expected.values()}) > 1  # the student does change


def test_it_changes_nothing_that_is_learned(
    prepared: Prepared, held_out: str, sets: tuple[str, str], tiny_clip_json: str, tmp_path: Path
) -> None:
    common = {"store": prepared.store, "clusters": prepared.clusters, "objective": "clip-cid"}
    with_it = {"validate": sets, "held_out": (held_out,), "validate_every": 2, "keep_best": "held-out/loss"}
    train.main(config(tmp_path / "without", tiny_clip_json, **common))
    train.main(config(tmp_path / "with", tiny_clip_json, **common, **with_it))
    assert final_digest(tmp_path / "with") == final_digest(tmp_path / "without")
    lines = [
        [{k: v for k, v in line.items() if "/" not in k} for line in steady_metrics(tmp_path / name)]
        for name in ("with", "without")
    ]
    assert lines[0] == lines[1]


@pytest.mark.slow
def test_several_processes_measure_what_one_does(
    prepared: Prepared, held_out: str, sets: tuple[str, str], tiny_clip_json: str, tmp_path: Path
) -> None:
    terms = {"sample_rate": 0.8, "masked": 1.0, "relational": 1.0}  # everything that draws, and a term over all rows
    common = {"store": prepared.store, "clusters": prepared.clusters, "objective": "clip-cid", "terms": terms}
    common |= {"validate": sets, "held_out": (held_out,), "validate_every": 2, "micro_batch": 2}
    train.main(config(tmp_path / "one", tiny_clip_json, **common))
    for world, strategy in ((2, "ddp"), (4, "fsdp")):
        out = tmp_path / strategy
        run_ranks(world, train.main, config(out, tiny_clip_json, **common, strategy=strategy))
        for step, values in validated(tmp_path / "one").items():
            assert validated(out)[step] == pytest.approx(values, rel=1e-4)
    terms_of = {name.split("/")[1] for name in validated(tmp_path / "one")[4] if name.startswith("held-out/")}
    named = {"loss", "task", "cluster", "instance", "masked", "relational", "cosine_image", "cosine_text"}
    assert terms_of == named


def test_the_held_out_loss_is_the_objective_on_the_held_out_pairs(
    prepared: Prepared, pair_tars: Callable[..., list[str]], tiny_clip_json: str, tmp_path: Path
) -> None:
    aside = tuple(pair_tars(shards=1, rows=19, folder="others"))  # two batches of 8; three pairs fill none
    out = tmp_path / "out"
    values = {"held_out": aside, "num_steps": 2, "micro_batch": 3, "batch_size": 8}
    train.main(config(out, tiny_clip_json, data=tuple(prepared.tars), **values))
    clip = load_clip(str(out))
    presentation = Presentation(sizes=[clip.image_size], tokenize=clip.tokenizer, seed=0)
    losses = []
    with torch.no_grad():
        for batch in open_stream(PairSource(data=aside), presentation, batch_size=8).batches(stop=2):
            image = clip.encode_image(normalise_pixels(batch.pixels, clip.preprocess_cfg))
            losses.append(float(contrastive(image, clip.encode_text(batch.tokens), scale=clip.scale)))
    found = validated(out)[2]
    assert found == pytest.approx({"held-out/loss": sum(losses) / 2, "held-out/task": sum(losses) / 2}, rel=1e-5)


def test_the_best_by_a_validation_is_kept_and_named(
    prepared: Prepared, sets: tuple[str, str], tiny_clip_json: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    values = {"validate": sets, "num_steps": 8, "keep_checkpoints": 1, "validate_every": 1}
    best_by = f"{stage_set_name(sets[1])}/text_to_image_r1"
    result = train.main(config(out, tiny_clip_json, data=tuple(prepared.tars), **values, keep_best=best_by))
    curve = {step: found[best_by] for step, found in validated(out).items()}
    best = max(curve, key=lambda step: (curve[step], step))
    assert result["best"] == {
        "metric": f"validate/{best_by}",
        "value": curve[best],
        "checkpoint": f"checkpoints/step-{best:06d}",
    }
    assert (out / result["best"]["checkpoint"] / "state.json").exists()
    assert len(list((out / "checkpoints").iterdir())) == len({best, 8})


@pytest.mark.slow
def test_it_stops_when_nothing_gets_better_also_when_killed_in_between(
    prepared: Prepared, pair_tars: Callable[..., list[str]], tiny_clip_json: str, tmp_path: Path
) -> None:
    aside = tuple(pair_tars(shards=1, rows=8, folder="others"))
    values = {"data": tuple(prepared.tars), "held_out": aside, "validate_every": 1, "checkpoint_every": 1}
    values |= {"num_steps": 40, "learning_rate": 0.3, "stop_after": 3, "keep_best": "held-out/loss"}
    values |= {"keep_checkpoints": 99}
    out, again = tmp_path / "out", tmp_path / "again"
    result = train.main(config(out, tiny_clip_json, **values))
    curve = {step: found["held-out/loss"] for step, found in validated(out).items()}
    best = min(curve, key=lambda step: curve[step])
    assert result["num_steps"] == best + 3 == max(curve) < 40
    assert result["checkpoint"] == f"checkpoints/step-{best + 3:06d}"
    out.rename(again)
    for removed in ("result.json", *(f"checkpoints/step-{step:06d}/state.json" for step in range(best + 2, best + 4))):
        (again / removed).unlink()  # as a kill two steps before the end
    assert train.main(config(again, tiny_clip_json, **values)) == result
    (again / "result.json").unlink()  # as a kill between the last checkpoint and the result
    assert train.main(config(again, tiny_clip_json, **values)) == result


def stage_set_name(spec: str) -> str:
    return parse_spec(spec)[0]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"validate": ("pairs:{pairs}",), "keep_best": "pair/text_to_image_r1"}, "the set 'pair' is not validated"),
        ({"validate": ("imagenet",)}, "The set imagenet needs --data-root"),
        ({"validate": ("tar:{pairs}/none",)}, "none"),
        ({"validate_every": 5}, "Nothing to validate on"),
        ({"stop_after": 5, "held_out": ("{pairs}",)}, "--stop-after needs --keep-best"),
        ({"keep_best": "agrement"}, "Did you mean 'agreement'"),
        ({"held_out": ("{pairs}",), "validate_every": 1, "validate_every_epochs": 1.0}, "not both"),
    ],
)
def test_what_cannot_be_validated_is_refused_before_training(
    prepared: Prepared, tiny_clip_json: str, tmp_path: Path, values: dict[str, Any], words: str
) -> None:
    pairs = str(Path(prepared.tars[0]).parent)
    filled = json.loads(json.dumps(values).replace("{pairs}", pairs))
    filled = {name: tuple(value) if isinstance(value, list) else value for name, value in filled.items()}
    with pytest.raises(InputError, match=re.escape(words)):
        train.main(config(tmp_path / "out", tiny_clip_json, data=tuple(prepared.tars), **filled))
    assert not (tmp_path / "out/metrics.jsonl").exists()


def test_a_store_of_another_teacher_is_not_held_out(
    prepared: Prepared, pair_tars: Callable[..., list[str]], tiny_clip_json: str, tmp_path: Path
) -> None:
    create_clip(tiny_clip_json, seed=9).save(str(tmp_path / "other"))
    store = str(tmp_path / "aside")
    embed.main(embed.Config(data=tuple(prepared.tars), out=store, model=str(tmp_path / "other"), num_workers=0))
    with pytest.raises(InputError, match="was embedded by another teacher"):
        train.main(config(tmp_path / "out", tiny_clip_json, store=prepared.store, held_out=(store,)))


def test_a_set_that_breaks_later_costs_its_numbers_not_the_training(
    prepared: Prepared, sets: tuple[str, str], tiny_clip_json: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken"
    for name in ("circle", "square"):
        (broken / name).mkdir(parents=True)
        (broken / name / "a.png").write_bytes(b"no picture")
    values = {"validate": (f"folder:{broken}", sets[0]), "validate_every": 4}
    train.main(config(tmp_path / "out", tiny_clip_json, data=tuple(prepared.tars), **values))
    assert "warning: validation: broken could not be measured" in capsys.readouterr().err
    assert {name.split("/")[0] for name in validated(tmp_path / "out")[4]} == {stage_set_name(sets[0])}


def test_the_interval_keeps_the_work_near_two_percent() -> None:
    for num_pairs, batch_size, checkpoint_every in ((50_000, 1024, 500), (1500, 256, 100), (5, 8, 2)):
        every = default_interval(num_pairs, batch_size=batch_size, checkpoint_every=checkpoint_every)
        assert every % checkpoint_every == 0
        assert num_pairs / (3 * batch_size * every) <= 0.02
        fewer = every - checkpoint_every
        assert fewer == 0 or num_pairs / (3 * batch_size * fewer) > 0.02
