"""Training from the command's own main: stored and live teachers, resume, and every refusal."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distilclip import progress, stage_folder
from distilclip.errors import InputError
from distilclip.models.clip import load_clip
from distilclip.stages import balance, embed, train
from tests.stages.made_training import Prepared, config, contents, final_digest, prepare, steady_metrics


@pytest.fixture
def prepared(pair_tars: Callable[..., list[str]], tiny_clip_folder: str, tmp_path: Path) -> Prepared:
    return prepare(pair_tars, tiny_clip_folder, tmp_path)


@pytest.mark.parametrize("method", ["clip", "clip-kd", "clip-cid"])
def test_each_method_trains_from_a_store_and_its_checkpoint_loads(
    method: str, prepared: Prepared, tiny_clip_json: str, tmp_path: Path
) -> None:
    out = tmp_path / "student"
    result = train.main(
        config(
            out,
            tiny_clip_json,
            store=prepared.store,
            groups=prepared.groups,
            clusters=prepared.clusters,
            objective=method,
        )
    )
    assert result["num_samples_seen"] == 32
    assert load_clip(str(out)).digest == result["digest"]
    line = steady_metrics(out)[-1]
    expected = {"clip": {"task"}, "clip-kd": {"task", "relational", "feature", "interactive"}}
    assert expected.get(method, {"task", "cluster", "instance"}) <= set(line)
    assert line["step"] == 4


def test_every_term_trains_at_once_in_micro_batches(prepared: Prepared, tiny_clip_json: str, tmp_path: Path) -> None:
    terms = dict.fromkeys(("feature", "masked", "gradient", "interactive", "augmented", "relational"), 1.0)
    common = {"store": prepared.store, "clusters": prepared.clusters, "objective": "clip-cid", "terms": terms}
    once, parts = tmp_path / "once", tmp_path / "parts"
    train.main(config(once, tiny_clip_json, **common))
    train.main(config(parts, tiny_clip_json, micro_batch=3, **common))
    for a, b in zip(steady_metrics(once), steady_metrics(parts), strict=True):
        assert a == pytest.approx(b, rel=1e-4)


def test_a_live_teacher_gives_what_the_store_gives(
    prepared: Prepared, tiny_clip_json: str, tiny_clip_folder: str, tmp_path: Path
) -> None:
    stored, live = tmp_path / "stored", tmp_path / "live"
    common: dict[str, Any] = {"objective": "clip-kd", "num_steps": 1, "min_crop": 1.0}
    train.main(config(stored, tiny_clip_json, store=prepared.store, **common))
    train.main(config(live, tiny_clip_json, data=tuple(prepared.tars), live_teacher=tiny_clip_folder, **common))
    a, b = steady_metrics(stored)[0], steady_metrics(live)[0]
    assert a["task"] == pytest.approx(b["task"])  # the same pairs, the same student
    # A live teacher sees the squared crop, the store the centre crop, so they agree but are not equal.
    assert a["cosine_text"] == pytest.approx(b["cosine_text"], abs=1e-3)
    assert set(a) == set(b)


@pytest.mark.slow
def test_resuming_from_any_checkpoint_equals_an_undisturbed_run(
    prepared: Prepared, tiny_clip_json: str, tmp_path: Path
) -> None:
    undisturbed, resumed = tmp_path / "undisturbed", tmp_path / "resumed"
    common = {"store": prepared.store, "clusters": prepared.clusters, "objective": "clip-cid", "num_steps": 6}
    train.main(config(undisturbed, tiny_clip_json, keep_checkpoints=9, **common))
    train.main(config(resumed, tiny_clip_json, keep_checkpoints=9, **common))
    (resumed / "result.json").unlink()
    for step in (4, 6):  # as if killed after step 2, while step 4 was being written
        (resumed / f"checkpoints/step-{step:06d}" / "state.json").unlink()
    train.main(config(resumed, tiny_clip_json, keep_checkpoints=9, **common))
    assert final_digest(undisturbed) == final_digest(resumed)
    assert steady_metrics(undisturbed) == steady_metrics(resumed)


@pytest.mark.slow
def test_sigkill_and_rerun_give_the_undisturbed_bytes(prepared: Prepared, tiny_clip_json: str, tmp_path: Path) -> None:
    # Every run in a process of its own: libraries that other tests load into this one may move the last bits.
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    common = {"store": prepared.store, "objective": "clip-kd", "num_steps": 40, "keep_checkpoints": 50}
    commands = {}
    for out in (undisturbed, killed):
        recipe = tmp_path / f"{out.name}.json"
        values = stage_folder.config_values(config(out, tiny_clip_json, **common))
        recipe.write_text(json.dumps({"stage": "train", **values}))
        commands[out] = [sys.executable, "-m", "distilclip.cli", "train", str(recipe)]
    subprocess.run(commands[undisturbed], check=True)
    process = subprocess.Popen(commands[killed])
    deadline = time.monotonic() + 120
    while not (killed / "checkpoints/step-000004/state.json").exists() and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "result.json").exists()
    subprocess.run(commands[killed], check=True)
    assert (killed / "result.json").read_bytes() == (undisturbed / "result.json").read_bytes()
    assert steady_metrics(killed) == steady_metrics(undisturbed)
    assert contents(undisturbed / "checkpoints") == contents(killed / "checkpoints")


def test_moved_tars_are_found_again_and_other_tars_are_refused(
    prepared: Prepared, tiny_clip_json: str, tmp_path: Path
) -> None:
    (tmp_path / "pairs").rename(tmp_path / "moved")
    with pytest.raises(InputError, match="is missing"):
        train.main(config(tmp_path / "lost", tiny_clip_json, store=prepared.store))
    moved = (str(tmp_path / "moved" / "*.tar"),)
    result = train.main(config(tmp_path / "found", tiny_clip_json, store=prepared.store, data=moved))
    assert result["num_rows"] == 24


def test_a_store_made_again_with_another_teacher_is_noticed(
    prepared: Prepared, tiny_clip_json: str, tmp_path: Path
) -> None:
    from distilclip.models.clip import create_clip

    other = str(tmp_path / "other-teacher")
    create_clip(tiny_clip_json, seed=8).save(other)
    shutil.rmtree(prepared.store)
    embed.main(embed.Config(data=tuple(prepared.tars), out=prepared.store, model=other, num_workers=0))
    with pytest.raises(InputError, match="was made from another store"):
        train.main(config(tmp_path / "student", tiny_clip_json, store=prepared.store, groups=prepared.groups))
    with pytest.raises(InputError, match="embed came, went or changed"):
        balance.main(balance.Config(store=prepared.store, out=prepared.groups, metric="cosine", threshold=1e-4))


def test_samples_that_fail_while_training_are_counted(prepared: Prepared, tiny_clip_json: str, tmp_path: Path) -> None:
    path = Path(prepared.tars[0])
    content = bytearray(path.read_bytes())
    start = content.index(b"\xff\xd8\xff")
    content[start + 3 : start + 400] = bytes(397)  # the tar's size and index stay as they are
    path.write_bytes(content)
    # Without a store: with one, a picture that changed since it was embedded is an error (test_changed_sources).
    out, data = tmp_path / "student", tuple(prepared.tars)
    result = train.main(config(out, tiny_clip_json, data=data, num_steps=3, batch_size=24))
    assert result["num_unusable"] == 3  # once an epoch
    assert sum(result["reasons"].values()) == 3
    with pytest.raises(InputError, match="00000"):
        train.main(config(tmp_path / "strict", tiny_clip_json, data=data, num_steps=3, max_bad_ratio=0.0))


def test_a_student_with_batch_norm_refuses_micro_batches(
    prepared: Prepared, tiny_clip_json: str, tmp_path: Path
) -> None:
    vision = {"timm_model_name": "cnn_w8", "timm_pool": "max", "timm_proj": "linear", "image_size": 32}
    student = json.dumps(json.loads(tiny_clip_json) | {"vision_cfg": vision})
    with pytest.raises(InputError, match="normalises over the batch"):
        train.main(config(tmp_path / "student", student, store=prepared.store, student=student, micro_batch=4))


def test_cuda_graphs_refuse_micro_batches(prepared: Prepared, tiny_clip_json: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--compile max-autotune replays one CUDA graph"):
        train.main(config(tmp_path / "x", tiny_clip_json, store=prepared.store, micro_batch=4, compile="max-autotune"))


def test_a_live_teacher_takes_micro_batches_and_the_towers_precision(
    prepared: Prepared, tiny_clip_json: str, tiny_clip_folder: str, tmp_path: Path
) -> None:
    common: dict[str, Any] = {"data": tuple(prepared.tars), "live_teacher": tiny_clip_folder, "objective": "clip-kd"}
    for name, values in {"once": {}, "parts": {"micro_batch": 3}, "half": {"precision": "bf16"}}.items():
        train.main(config(tmp_path / name, tiny_clip_json, num_steps=1, **common, **values))
    once, parts, half = (steady_metrics(tmp_path / name)[0] for name in ("once", "parts", "half"))
    assert once == pytest.approx(parts, rel=1e-4)
    assert half["relational"] != once["relational"]
    assert half["relational"] == pytest.approx(once["relational"], rel=0.05)


def test_the_progress_line_shows_the_loss_and_its_terms(
    pair_tars: Callable[..., list[str]],
    tiny_clip_json: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(progress, "FIRST_LINES", (0,))
    train.main(config(tmp_path / "out", tiny_clip_json, data=tuple(pair_tars(shards=1, rows=8))))
    *_, line = [text for text in capfd.readouterr().err.splitlines() if " train: " in text]
    loss = steady_metrics(tmp_path / "out")[-1]["loss"]
    assert "train: 4 of 4 (100%), " in line
    assert line.endswith(f"loss {loss:.4g}, task {loss:.4g}")


def test_a_finished_run_is_left_alone(prepared: Prepared, tiny_clip_json: str, tmp_path: Path) -> None:
    out = tmp_path / "student"
    first = train.main(config(out, tiny_clip_json, store=prepared.store))
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert train.main(config(out, tiny_clip_json, store=prepared.store)) == first
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == times


def test_groups_of_another_store_are_refused(
    prepared: Prepared, tiny_clip_json: str, tiny_clip_folder: str, tmp_path: Path
) -> None:
    other = str(tmp_path / "other")
    embed.main(embed.Config(data=(prepared.tars[0],), out=other, model=tiny_clip_folder, num_workers=0))
    with pytest.raises(InputError, match="was made from another store"):
        train.main(config(tmp_path / "student", tiny_clip_json, store=other, groups=prepared.groups))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "needs pairs"),
        ({"store": "s", "clusters": "c", "objective": "clip-cid", "live_teacher": "t"}, "leave out --live-teacher"),
        ({"data": ("a.tar",), "micro_batch": 0}, "micro_batch is 0"),
        ({"data": ("a.tar",), "min_crop": 1.5}, "min_crop is 1.5"),
        ({"data": ("a.tar",), "warmup_steps": 9}, "warmup_steps is 9"),
        ({"data": ("a.tar",), "objective": "clip-kd"}, "needs a teacher"),
        ({"store": "s", "objective": "clip-cid"}, "needs --clusters"),
        ({"data": ("a.tar",), "groups": "g"}, "give --store too"),
        ({"data": ("a.tar",), "batch_size": 0}, "batch_size is 0"),
        ({"data": ("a.tar",), "terms": {"featur": 1.0}}, "Did you mean 'feature'"),
    ],
)
def test_contradictory_flags_are_refused(values: dict[str, Any], message: str, tiny_clip_json: str) -> None:
    with pytest.raises(InputError, match=message):
        config(Path("unused"), tiny_clip_json, **values)


def test_a_state_that_is_not_finite_is_never_saved(prepared: Prepared, tiny_clip_json: str, tmp_path: Path) -> None:
    """A rate that no float32 holds makes weights infinite in one step, whose loss was finite."""
    options = {"learning_rate": 1e39, "warmup_steps": 0, "checkpoint_every": 1}
    with pytest.raises(InputError, match=r"Step 1: the state after 1 steps is not finite \(.*there is no checkpoint"):
        train.main(config(tmp_path / "student", tiny_clip_json, store=prepared.store, **options))
    assert not (tmp_path / "student" / "checkpoints").exists()


def test_a_loss_that_is_not_finite_stops_with_the_terms_named(
    prepared: Prepared, tiny_clip_json: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"Step \d+: the loss or its gradient is not finite.*'task'"):
        train.main(config(tmp_path / "student", tiny_clip_json, store=prepared.store, learning_rate=1e30, num_steps=50))
