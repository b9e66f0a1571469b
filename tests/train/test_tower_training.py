"""Frozen towers, patch dropout, scaled gradients, and batch norms of a micro-batch, against naive references."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from open_clip.transformer import PatchDropout
from torch import nn
from torch.nn import functional as F

from distilclip.errors import InputError
from distilclip.models.clip import create_clip, normalise_pixels
from distilclip.models.freezing import begin_training, freeze_tower
from distilclip.models.patch_dropout import every_patch, set_patch_dropout
from distilclip.train.gradient_scale import GROWTH_INTERVAL, GradientScale
from distilclip.train.objective import Objective
from distilclip.train.step import Student, compute_gradients
from tests.train.made import make_inputs, make_student

N = 8


def gradients(
    student: Student, objective: Objective, *, micro_batch: int = N, scale: float = 1.0
) -> dict[str, torch.Tensor]:
    for parameter in student.parameters():
        parameter.grad = None
    compute_gradients(
        student,
        objective,
        make_inputs(N),
        micro_batch=micro_batch,
        generator=torch.Generator().manual_seed(2),
        gradient_scale=scale,
    )
    return {name: p.grad.clone() for name, p in student.named_parameters().items() if p.grad is not None}


def with_batch_norm(tiny_clip_json: str) -> str:
    vision = {"timm_model_name": "cnn_w8", "timm_pool": "max", "timm_proj": "linear", "image_size": 32}
    return json.dumps(json.loads(tiny_clip_json) | {"vision_cfg": vision})


@pytest.mark.parametrize("micro_batch", [N, 3])
@pytest.mark.parametrize("tower", ["image", "text"])
def test_a_frozen_tower_has_no_gradient_and_the_other_tower_the_same(
    tower: str, micro_batch: int, tiny_clip_json: str
) -> None:
    objective = Objective(task=1.0, feature=3.0, masked=1.0)
    expected = gradients(make_student(tiny_clip_json), objective)
    student = make_student(tiny_clip_json)
    freeze_tower(student.clip, tower)  # type: ignore[arg-type]
    found = gradients(student, objective, micro_batch=micro_batch)
    frozen = set(expected) - set(found)
    image = {name for name in expected if name.startswith("model.visual.")}
    text = {name for name in expected if name.startswith("model.")} - image - {"model.logit_scale"}
    assert frozen == (image if tower == "image" else text)
    for name, gradient in found.items():
        assert (gradient - expected[name]).norm() <= 1e-5 * expected[name].norm() + 1e-7, name


def test_a_frozen_tower_runs_as_in_evaluation(tiny_clip_json: str) -> None:
    clip = create_clip(with_batch_norm(tiny_clip_json), seed=0)
    freeze_tower(clip, "image")
    begin_training(clip.model)
    before = {name: value.clone() for name, value in clip.model.named_buffers()}
    clip.model.encode_image(torch.randn(4, 3, 32, 32))
    assert all(torch.equal(value, before[name]) for name, value in clip.model.named_buffers())
    assert clip.model.transformer.training


def test_random_weights_are_not_frozen(tiny_clip_json: str) -> None:
    clip = create_clip(tiny_clip_json, seed=0)
    freeze_tower(clip, "image", fresh=["ln_final.weight", "logit_scale"])
    with pytest.raises(InputError, match="--freeze text would keep 1 random tensors"):
        freeze_tower(clip, "text", fresh=["ln_final.weight", "logit_scale"])


def test_patch_dropout_equals_open_clips_own_and_leaves_evaluation_and_checkpoints(
    tiny_clip_json: str, tmp_path: Path
) -> None:
    clip, plain = (create_clip(tiny_clip_json, seed=0) for _ in range(2))
    config = json.loads(tiny_clip_json)
    config["vision_cfg"]["patch_dropout"] = 0.5
    reference = create_clip(json.dumps(config), seed=0)
    set_patch_dropout(clip, 0.5)
    pixels = torch.randn(4, 3, 32, 32)
    assert torch.equal(clip.encode_image(pixels), plain.encode_image(pixels))
    found = []
    for model in (clip.model, reference.model):
        begin_training(model)
        torch.manual_seed(5)
        found.append(model.encode_image(pixels))
    assert torch.equal(*found)
    assert not torch.equal(found[0], plain.model.encode_image(pixels))
    with every_patch(clip.model):
        assert torch.equal(clip.model.encode_image(pixels), plain.model.encode_image(pixels))
    assert any(isinstance(m, PatchDropout) and m.training for m in clip.model.modules())
    for name, saved in (("dropped", clip), ("plain", plain)):
        saved.save(str(tmp_path / name))
    for file in (tmp_path / "plain").iterdir():
        assert (tmp_path / "dropped" / file.name).read_bytes() == file.read_bytes()
    with pytest.raises(InputError, match="no vision transformer"):
        set_patch_dropout(create_clip(with_batch_norm(tiny_clip_json), seed=0), 0.5)


def test_masked_pictures_keep_all_their_patches(tiny_clip_json: str) -> None:
    student = make_student(tiny_clip_json)
    pixels, tokens = torch.randn(4, 3, 32, 32), torch.randint(1, 400, (4, 12))
    begin_training(student.clip.model)
    _, _, expected = student.towers(pixels, tokens, pixels)
    set_patch_dropout(student.clip, 0.5)
    whole, _, masked = student.towers(pixels, tokens, pixels)
    assert torch.equal(masked, expected)
    assert not torch.equal(whole, masked)


@pytest.mark.parametrize("micro_batch", [N, 3])
def test_a_gradient_scale_that_is_a_power_of_two_changes_no_bit(micro_batch: int, tiny_clip_json: str) -> None:
    objective = Objective(task=1.0, feature=3.0)
    student = make_student(tiny_clip_json)
    plain = gradients(student, objective, micro_batch=micro_batch)
    scaled = gradients(student, objective, micro_batch=micro_batch, scale=2.0**12)
    for name, gradient in plain.items():
        assert torch.equal(scaled[name], gradient), name


def test_the_gradient_scale_moves_as_torchs_own_scaler() -> None:
    own = GradientScale()
    reference = torch.amp.GradScaler("cpu", init_scale=own.value, growth_interval=GROWTH_INTERVAL)
    weight = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    good = [False, False, *[True] * (GROWTH_INTERVAL - 1), False, *[True] * (GROWTH_INTERVAL + 3)]
    for finite in good:
        weight.grad = torch.tensor([1.0 if finite else torch.inf])
        reference.scale(torch.zeros(()))
        reference.step(optimizer)
        reference.update()
        assert finite or own.lower()
        if finite:
            own.grow()
        assert own.value == reference.get_scale()
    assert GradientScale(value=1.0).lower() is False


def test_batch_norms_per_micro_batch_equal_a_naive_step_over_micro_batches(tiny_clip_json: str) -> None:
    student, naive = (make_student(with_batch_norm(tiny_clip_json)) for _ in range(2))
    for each in (student, naive):
        begin_training(each.clip.model)
    found = gradients(student, Objective(task=1.0), micro_batch=4)
    inputs = make_inputs(N)
    parts = []
    for start in (0, 4):
        part = slice(start, start + 4)
        pixels = normalise_pixels(inputs.pixels[part], naive.clip.preprocess_cfg)
        parts.append(naive.clip.encode_image(pixels))
    image, text = torch.cat(parts), naive.clip.encode_text(inputs.tokens)
    logits = naive.clip.scale * image @ text.T
    labels = torch.arange(N)
    ((F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2).backward()
    for name, parameter in naive.named_parameters().items():
        if parameter.grad is not None:
            assert torch.allclose(found[name], parameter.grad, rtol=1e-3, atol=1e-6), name
    buffers = dict(naive.clip.model.named_buffers())  # counted once, though there are two passes
    for name, value in student.clip.model.named_buffers():
        assert torch.allclose(value, buffers[name]), name
