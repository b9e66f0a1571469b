"""How long a training is, in steps or epochs, and what a finished one does with a larger number."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distilclip import stage_folder
from distilclip.config import parse
from distilclip.errors import InputError
from distilclip.stages import balance, train
from tests.stages.made_training import Prepared, config, contents, final_digest, prepare, steady_metrics


@pytest.fixture
def prepared(pair_tars: Callable[..., list[str]], tiny_clip_folder: str, tmp_path: Path) -> Prepared:
    return prepare(pair_tars, tiny_clip_folder, tmp_path)


def train_epochs(out: Path, architecture: str, prepared: Prepared, **values: Any) -> dict[str, Any]:
    return train.main(config(out, architecture, num_steps=None, store=prepared.store, **values))


def test_epochs_equal_the_same_number_of_steps(prepared: Prepared, tiny_clip_json: str, tmp_path: Path) -> None:
    steps = train.main(config(tmp_path / "steps", tiny_clip_json, store=prepared.store, num_steps=6))
    epochs = train_epochs(tmp_path / "epochs", tiny_clip_json, prepared, num_epochs=2.0)
    assert steps == epochs
    assert (epochs["num_rows"], epochs["num_steps"], epochs["num_samples_seen"]) == (24, 6, 48)
    assert steady_metrics(tmp_path / "steps") == steady_metrics(tmp_path / "epochs")


def test_epochs_count_the_kept_rows_and_the_warm_up_may_be_in_epochs(
    prepared: Prepared, tiny_clip_json: str, tmp_path: Path
) -> None:
    cut = {"metric": "cosine", "target_removed": 0.25, "max_threshold": 1.0}
    kept = balance.main(balance.Config(store=prepared.store, out=str(tmp_path / "fewer"), **cut))["num_kept"]
    assert 8 <= kept <= 18
    warm = {"warmup_steps": None, "warmup_epochs": 1.0, "checkpoint_every": 1}
    result = train_epochs(
        tmp_path / "out", tiny_clip_json, prepared, groups=str(tmp_path / "fewer"), num_epochs=2.0, **warm
    )
    assert result["num_rows"] == kept
    assert result["num_steps"] == -(-2 * kept // 8)
    warmup = -(-kept // 8)
    rates = [line["learning_rate"] for line in steady_metrics(tmp_path / "out")]
    assert rates[:warmup] == pytest.approx([1e-3 * (step + 1) / warmup for step in range(warmup)])
    with pytest.raises(InputError, match=f"warmup_steps is {-(-3 * kept // 8)}, more than num_steps"):
        train_epochs(
            tmp_path / "long",
            tiny_clip_json,
            prepared,
            groups=str(tmp_path / "fewer"),
            num_epochs=1.0,
            warmup_steps=None,
            warmup_epochs=3.0,
        )


def test_a_run_in_epochs_that_was_killed_goes_on_bit_for_bit(
    prepared: Prepared, tiny_clip_json: str, tmp_path: Path
) -> None:
    curve = {"schedule": "constant", "cooldown": 0.5, "final_learning_rate_ratio": 0.1, "num_epochs": 2.0}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for out in (whole, killed):
        train_epochs(out, tiny_clip_json, prepared, keep_checkpoints=9, **curve)
    (killed / "result.json").unlink()
    for step in (4, 6):
        (killed / f"checkpoints/step-{step:06d}/state.json").unlink()
    train_epochs(killed, tiny_clip_json, prepared, keep_checkpoints=9, **curve)
    assert contents(whole / "checkpoints") == contents(killed / "checkpoints")
    assert steady_metrics(whole) == steady_metrics(killed)


@pytest.mark.parametrize(
    ("short", "long"), [({"num_steps": 4}, {"num_steps": 8}), ({"num_epochs": 1.0}, {"num_epochs": 2.5})]
)
def test_a_finished_training_goes_on_to_a_larger_number_and_says_from_where(
    short: dict[str, float],
    long: dict[str, float],
    prepared: Prepared,
    tiny_clip_json: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    common = {"store": prepared.store, "objective": "clip-kd", "num_steps": None, "keep_checkpoints": 9}
    before = train.main(config(out, tiny_clip_json, **{**common, **short}))
    done = before["num_steps"]
    assert "extended_from" not in before
    first, lines = contents(out / "checkpoints"), steady_metrics(out)
    with pytest.raises(InputError, match=r"learning_rate was 0\.001, now 0\.002"):
        train.main(config(out, tiny_clip_json, **{**common, **long}, learning_rate=2e-3))
    assert contents(out / "checkpoints") == first
    assert (out / "result.json").exists()
    capfd.readouterr()
    after = train.main(config(out, tiny_clip_json, **{**common, **long}))
    said = capfd.readouterr().err
    assert after["num_steps"] == 8
    assert after["extended_from"] == [short]
    assert f"goes on from step {done} to 8" in said
    assert "the learning rate follows the longer schedule" in said
    later = contents(out / "checkpoints")
    assert {name: later[name] for name in first} == first  # it went on from there
    assert [line for line in steady_metrics(out) if line["step"] <= done] == lines
    assert after["checkpoint"] == "checkpoints/step-000008"
    assert after["num_samples_seen"] == 64
    with pytest.raises(InputError, match=f"{next(iter(short))} was"):  # and never back
        train.main(config(out, tiny_clip_json, **{**common, **short}))
    assert train.main(config(out, tiny_clip_json, **{**common, **long})) == after
    assert final_digest(out) == after["digest"]


def test_steps_and_epochs_are_alternatives(tiny_clip_json: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"num_steps is 4 and num_epochs is 2\.0: give one of them"):
        config(tmp_path, tiny_clip_json, data=("a.tar",), num_epochs=2.0)
    with pytest.raises(InputError, match=r"num_epochs is 0\.0; it must be positive"):
        config(tmp_path, tiny_clip_json, data=("a.tar",), num_steps=None, num_epochs=0.0)
    assert config(tmp_path, tiny_clip_json, data=("a.tar",), num_steps=None).num_steps == 1000
    words = ["--out", "x", "--student", "RN50", "--data", "a.tar", "--epochs", "3", "--warmup-epochs", "0.5"]
    parsed = parse(train.Config, words, stage="train")
    assert (parsed.num_steps, parsed.num_epochs) == (None, 3.0)
    assert (parsed.learning_curve.warmup_steps, parsed.learning_curve.warmup_epochs) == (None, 0.5)
    recipe = tmp_path / "config.json"
    recipe.write_text(json.dumps({"stage": "train", **stage_folder.config_values(parsed)}))
    assert parse(train.Config, [str(recipe)], stage="train") == parsed
