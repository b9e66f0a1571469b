from __future__ import annotations

import pytest
import torch

from distilclip.models.clip import create_clip
from distilclip.models.heads import Heads
from distilclip.train.optimizer import build_optimizer, schedule, set_learning_rate


def optimizer(tiny_clip_json: str) -> tuple[torch.optim.AdamW, Heads, torch.nn.Module]:
    clip = create_clip(tiny_clip_json, seed=0)
    heads = Heads(clip.dim, 9, centers=torch.eye(9))
    built = build_optimizer(clip.model, heads, learning_rate=1e-3, centers_learning_rate=1e-6, weight_decay=0.2)
    return built, heads, clip.model


def test_every_parameter_is_in_exactly_one_group(tiny_clip_json: str) -> None:
    built, heads, model = optimizer(tiny_clip_json)
    grouped = [id(p) for group in built.param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in [*model.parameters(), *heads.parameters()])


def test_biases_norms_scales_and_centers_do_not_decay(tiny_clip_json: str) -> None:
    built, heads, model = optimizer(tiny_clip_json)
    decay = {id(p): group["weight_decay"] for group in built.param_groups for p in group["params"]}
    named = dict(model.named_parameters())
    assert decay[id(named["logit_scale"])] == 0
    assert decay[id(named["ln_final.weight"])] == 0
    assert decay[id(named["visual.positional_embedding"])] == 0
    assert decay[id(named["token_embedding.weight"])] == 0.2
    assert decay[id(heads.centers)] == 0


def test_centers_have_their_own_learning_rate(tiny_clip_json: str) -> None:
    built, heads, _ = optimizer(tiny_clip_json)
    assert set_learning_rate(built, 0.5) == pytest.approx(5e-4)
    rates = {id(p): group["lr"] for group in built.param_groups for p in group["params"]}
    assert rates[id(heads.centers)] == pytest.approx(5e-7)


@pytest.mark.parametrize(("step", "share"), [(0, 0.1), (9, 1.0), (10, 1.0), (60, 0.5), (110, 0.0), (200, 0.0)])
def test_warmup_then_cosine(step: int, share: float) -> None:
    assert schedule(step, num_steps=110, warmup_steps=10) == pytest.approx(share)


def test_schedule_without_warmup_starts_at_the_peak() -> None:
    assert schedule(0, num_steps=10, warmup_steps=0) == 1.0
