from __future__ import annotations

from collections import Counter
from pathlib import Path

import open_clip
import torch

from distilclip.data.policy import ErrorPolicy
from distilclip.models.clip import create_clip
from distilclip.models.heads import Heads
from distilclip.train.checkpoint import (
    complete_checkpoints,
    folder_name,
    load_checkpoint,
    prune_checkpoints,
    remove_incomplete_checkpoints,
    save_checkpoint,
)
from distilclip.train.optimizer import build_optimizer
from distilclip.train.step import Student


def build(tiny_clip_json: str, seed: int) -> tuple[Student, torch.optim.AdamW]:
    clip = create_clip(tiny_clip_json, seed=seed)
    torch.manual_seed(seed)
    heads = Heads(clip.dim, 9, centers=torch.eye(9))
    optimizer = build_optimizer(clip.model, heads, learning_rate=1e-2, centers_learning_rate=1e-3, weight_decay=0.1)
    return Student(clip=clip, heads=heads, precision=torch.float32), optimizer


def update(student: Student, optimizer: torch.optim.AdamW) -> None:
    optimizer.zero_grad()
    image, _ = student.embed(torch.ones(2, 3, 32, 32), torch.ones(2, 12, dtype=torch.long))
    assert student.heads.centers is not None
    (student.heads.image_projection(image) @ student.heads.centers).square().sum().backward()
    optimizer.step()


def state(student: Student) -> list[torch.Tensor]:
    return [*student.clip.model.state_dict().values(), *student.heads.state_dict().values()]


def test_training_goes_on_from_a_checkpoint_bit_for_bit(tmp_path: Path, tiny_clip_json: str) -> None:
    undisturbed, optimizer = build(tiny_clip_json, 0)
    update(undisturbed, optimizer)
    folder = str(tmp_path / folder_name(1))
    counted = ErrorPolicy("skip", reasons=Counter({"truncated image": 2}))
    save_checkpoint(folder, undisturbed, optimizer, step=1, policy=counted)
    update(undisturbed, optimizer)
    resumed, second = build(tiny_clip_json, 5)
    restored = ErrorPolicy("skip")
    assert load_checkpoint(folder, resumed, second, policy=restored) == 1
    assert restored.reasons == {"truncated image": 2}
    update(resumed, second)
    assert all(torch.equal(a, b) for a, b in zip(state(undisturbed), state(resumed), strict=True))


def test_open_clip_loads_a_checkpoint_as_it_is(tmp_path: Path, tiny_clip_json: str) -> None:
    student, optimizer = build(tiny_clip_json, 0)
    save_checkpoint(str(tmp_path / "ck"), student, optimizer, step=0, policy=ErrorPolicy())
    model = open_clip.create_model(f"local-dir:{tmp_path / 'ck'}")
    expected = student.clip.model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


def test_nothing_in_a_checkpoint_is_pickled(tmp_path: Path, tiny_clip_json: str) -> None:
    student, optimizer = build(tiny_clip_json, 0)
    save_checkpoint(str(tmp_path / "ck"), student, optimizer, step=0, policy=ErrorPolicy())
    assert {p.suffix for p in (tmp_path / "ck").iterdir()} == {".json", ".safetensors"}


def test_only_complete_checkpoints_count_and_the_last_are_kept(tmp_path: Path, tiny_clip_json: str) -> None:
    student, optimizer = build(tiny_clip_json, 0)
    for step in (1, 2, 3):
        save_checkpoint(str(tmp_path / folder_name(step)), student, optimizer, step=step, policy=ErrorPolicy())
    (tmp_path / folder_name(3) / "state.json").unlink()  # a kill came before the last file
    assert complete_checkpoints(str(tmp_path)) == [1, 2]
    remove_incomplete_checkpoints(str(tmp_path))
    assert not (tmp_path / folder_name(3)).exists()
    prune_checkpoints(str(tmp_path), keep=1)
    assert complete_checkpoints(str(tmp_path)) == [2]
    assert not (tmp_path / folder_name(1)).exists()
