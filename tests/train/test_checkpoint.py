from __future__ import annotations

from collections import Counter
from pathlib import Path

import open_clip
import pytest
import safetensors.torch
import torch

from distilclip import stage_folder
from distilclip.data.bad_samples import ErrorPolicy
from distilclip.train.checkpoint import Progress, Training, load_checkpoint, save_checkpoint
from distilclip.train.checkpoint_files import (
    complete_checkpoints,
    folder_name,
    prune_checkpoints,
    remove_incomplete_checkpoints,
)
from distilclip.train.objective import Objective
from distilclip.train.optimizer import Average, build_optimizer
from distilclip.train.settings import Checkpoints, Optimization
from distilclip.train.step import compute_gradients
from tests.train.made import make_inputs, make_student


def build(tiny_clip_json: str, seed: int, *, decay: float = 0.5) -> Training:
    student = make_student(tiny_clip_json, seed=seed)
    return Training(
        student=student,
        optimizer=build_optimizer(student.named_parameters(), Optimization(learning_rate=1e-2, weight_decay=0.1)),
        policy=ErrorPolicy("skip"),
        average=Average(student.clip.model, decay=decay) if decay else None,
    )


def update(training: Training) -> None:
    student = training.student
    training.optimizer.zero_grad()
    result = compute_gradients(
        student,
        Objective(cluster=1.0, sample_rate=0.8),
        make_inputs(4),
        micro_batch=4,
        generator=torch.Generator().manual_seed(0),
    )
    training.optimizer.step()
    assert result.classes is not None
    assert student.class_head is not None
    student.class_head.update(result.classes, share=1.0)
    if training.average is not None:
        training.average.update(student.clip.model)


def state(training: Training) -> list[torch.Tensor]:
    student = training.student
    assert student.class_head is not None
    assert training.average is not None
    return [
        *student.clip.model.state_dict().values(),
        *student.heads.state_dict().values(),
        student.class_head.centers,
        *training.average.values.values(),
    ]


def test_training_goes_on_from_a_checkpoint_bit_for_bit(tmp_path: Path, tiny_clip_json: str) -> None:
    undisturbed = build(tiny_clip_json, 0)
    update(undisturbed)
    undisturbed.policy.reasons = Counter({"truncated image": 2})
    folder = str(tmp_path / folder_name(1))
    save_checkpoint(folder, undisturbed, Progress(step=1, log={"num_steps": 1}))
    update(undisturbed)
    resumed = build(tiny_clip_json, 5)
    assert load_checkpoint(folder, resumed) == Progress(step=1, log={"num_steps": 1})
    assert resumed.policy.reasons == {"truncated image": 2}
    update(resumed)
    assert all(torch.equal(a, b) for a, b in zip(state(undisturbed), state(resumed), strict=True))


def test_a_checkpoint_from_before_a_term_was_added_lacks_its_scale(tmp_path: Path, tiny_clip_json: str) -> None:
    training, folder = build(tiny_clip_json, 0), str(tmp_path / "step")
    save_checkpoint(folder, training, Progress())
    heads = safetensors.torch.load((tmp_path / "step/heads.safetensors").read_bytes())
    del heads["queue_log_scale"]
    (tmp_path / "step/heads.safetensors").write_bytes(safetensors.torch.save(heads))
    resumed = build(tiny_clip_json, 1)
    load_checkpoint(folder, resumed)
    assert torch.equal(resumed.student.heads.state_dict()["image_projection.weight"], heads["image_projection.weight"])
    assert float(resumed.student.heads.scale("queue").detach()) == pytest.approx(1 / 0.07)


def test_open_clip_loads_a_checkpoint_as_it_is(tmp_path: Path, tiny_clip_json: str) -> None:
    training = build(tiny_clip_json, 0, decay=0.0)
    save_checkpoint(str(tmp_path / "ck"), training, Progress())
    model = open_clip.create_model(f"local-dir:{tmp_path / 'ck'}")
    expected = training.student.clip.model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


def test_a_checkpoint_gives_the_average_where_there_is_one(tmp_path: Path, tiny_clip_json: str) -> None:
    training = build(tiny_clip_json, 0, decay=0.75)
    name = "visual.proj"
    weights = training.student.clip.model.state_dict()[name]
    before = weights.clone()
    update(training)
    save_checkpoint(str(tmp_path / "ck"), training, Progress())
    model = open_clip.create_model(f"local-dir:{tmp_path / 'ck'}")
    torch.testing.assert_close(model.state_dict()[name], 0.75 * before + 0.25 * weights)


def test_nothing_in_a_checkpoint_is_pickled(tmp_path: Path, tiny_clip_json: str) -> None:
    save_checkpoint(str(tmp_path / "ck"), build(tiny_clip_json, 0), Progress())
    assert {p.suffix for p in (tmp_path / "ck").rglob("*") if p.is_file()} == {".json", ".safetensors"}


def made_checkpoints(folder: Path, values: dict[int, dict[str, object]]) -> str:
    """A train folder with a state.json for every step."""
    for step, value in values.items():
        content = {"scheduled": True, "metrics": {}, **value}
        stage_folder.write_json(str(folder / folder_name(step) / "state.json"), content)
    return str(folder)


def test_only_complete_checkpoints_count(tmp_path: Path) -> None:
    folder = made_checkpoints(tmp_path, {1: {}, 2: {}, 3: {}})
    (tmp_path / folder_name(3) / "state.json").rename(tmp_path / folder_name(3) / "heads.safetensors")
    assert complete_checkpoints(folder) == [1, 2]
    remove_incomplete_checkpoints(folder)
    assert not (tmp_path / folder_name(3)).exists()


@pytest.mark.parametrize(
    ("best", "kept"), [("none", [5, 6]), ("loss", [2, 5, 6]), ("agreement", [4, 5, 6]), ("cosine_text", [5, 6])]
)
def test_the_last_checkpoints_and_the_best_are_kept(tmp_path: Path, best: str, kept: list[int]) -> None:
    losses, agreements = [9.0, 1.0, 7.0, 5.0, 3.0, 2.0], [0.1, 0.2, 0.9, 0.9, 0.3, 0.4]
    metrics = {i + 1: {"loss": losses[i], "agreement": agreements[i]} for i in range(6)}
    folder = made_checkpoints(tmp_path, {step: {"metrics": value} for step, value in metrics.items()})
    prune_checkpoints(folder, Checkpoints(keep_checkpoints=2, keep_best=best))
    assert complete_checkpoints(folder) == kept


def test_a_checkpoint_by_clock_or_signal_stays_until_the_next(tmp_path: Path) -> None:
    folder = made_checkpoints(tmp_path, {2: {}, 3: {"scheduled": False}})
    keeping = Checkpoints(checkpoint_every=2, keep_checkpoints=1, checkpoint_minutes=0.5)
    prune_checkpoints(folder, keeping)
    assert complete_checkpoints(folder) == [2, 3]
    made_checkpoints(tmp_path, {4: {}})
    prune_checkpoints(folder, keeping)
    assert complete_checkpoints(folder) == [4]
    assert [keeping.due(seconds) for seconds in (0.0, 29.0, 30.0)] == [False, False, True]
    assert not Checkpoints().due(1e9)
