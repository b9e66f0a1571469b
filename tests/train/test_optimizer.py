from __future__ import annotations

import dataclasses
import math
from fractions import Fraction

import pytest
import torch
from torch import nn

from distilclip.errors import InputError
from distilclip.train.optimizer import Schedule, build_optimizer, set_learning_rate
from distilclip.train.settings import LearningCurve, Optimization, TowerTraining, steps_of
from tests.train.made import make_student


def test_every_parameter_is_in_exactly_one_group(tiny_clip_json: str) -> None:
    student = make_student(tiny_clip_json)
    built = build_optimizer(student.named_parameters(), Optimization(learning_rate=1e-3, weight_decay=0.2))
    grouped = [id(p) for group in built.param_groups for p in group["params"]]
    expected = [*student.clip.model.parameters(), *student.heads.parameters()]
    assert sorted(grouped) == sorted(id(p) for p in expected)


def test_biases_norms_scales_and_positions_do_not_decay(tiny_clip_json: str) -> None:
    student = make_student(tiny_clip_json)
    named = student.named_parameters()
    built = build_optimizer(named, Optimization(learning_rate=1e-3, weight_decay=0.2))
    decay = {id(p): group["weight_decay"] for group in built.param_groups for p in group["params"]}
    assert decay[id(named["model.logit_scale"])] == 0
    assert decay[id(named["model.ln_final.weight"])] == 0
    assert decay[id(named["model.visual.positional_embedding"])] == 0
    assert decay[id(named["heads.instance_log_scale"])] == 0
    assert decay[id(named["model.token_embedding.weight"])] == 0.2
    assert decay[id(named["heads.image_projection.weight"])] == 0.2


def test_every_group_follows_the_schedule(tiny_clip_json: str) -> None:
    built = build_optimizer(
        make_student(tiny_clip_json).named_parameters(), Optimization(learning_rate=1e-3, weight_decay=0.2)
    )
    assert set_learning_rate(built, 0.5) == pytest.approx(5e-4)
    assert {group["lr"] for group in built.param_groups} == {5e-4}


@pytest.mark.parametrize(("step", "share"), [(0, 0.1), (9, 1.0), (10, 1.0), (60, 0.5), (110, 0.0), (200, 0.0)])
def test_warmup_then_cosine(step: int, share: float) -> None:
    assert Schedule(num_steps=110, warmup_steps=10).share(step) == pytest.approx(share)


def test_schedule_without_warmup_starts_at_the_peak() -> None:
    assert Schedule(num_steps=10).share(0) == 1.0


@pytest.mark.parametrize(
    ("step", "share"), [(0, 0.1), (9, 1.0), (59, 1.0), (90, 1.0), (100, 0.6), (105, 0.4), (110, 0.2), (200, 0.2)]
)
def test_constant_then_a_straight_cooldown_to_the_final_ratio(step: int, share: float) -> None:
    curve = Schedule(num_steps=110, warmup_steps=10, shape="constant", final_ratio=0.2, cooldown_steps=20)
    assert curve.share(step) == pytest.approx(share)


def test_constant_without_cooldown_stays_at_the_peak() -> None:
    curve = Schedule(num_steps=9, warmup_steps=2, shape="constant")
    assert [curve.share(step) for step in range(9)] == [0.5, *[1.0] * 8]


def test_a_cosine_ends_at_its_floor_and_equals_its_formula() -> None:
    curve = Schedule(num_steps=50, warmup_steps=10, final_ratio=0.1)
    for step in range(10, 51):
        expected = 0.1 + 0.9 * (1 + math.cos(math.pi * (step - 10) / 40)) / 2
        assert curve.share(step) == pytest.approx(expected)
    assert curve.share(50) == pytest.approx(0.1)


def test_torchs_own_schedulers_give_the_same_cosine() -> None:
    built = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=1.0)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(built, T_max=40, eta_min=0.25)
    curve = Schedule(num_steps=40, final_ratio=0.25)
    for step in range(40):
        assert curve.share(step) == pytest.approx(built.param_groups[0]["lr"])
        built.step()
        reference.step()


def test_each_tower_has_its_own_peak_and_the_scale_and_heads_the_common_one(tiny_clip_json: str) -> None:
    named = make_student(tiny_clip_json).named_parameters()
    towers = TowerTraining(image_learning_rate_ratio=0.25, text_learning_rate_ratio=4.0)
    built = build_optimizer(named, Optimization(learning_rate=1e-3), towers)
    assert set_learning_rate(built, 0.5) == pytest.approx(5e-4)
    rate = {id(p): group["lr"] for group in built.param_groups for p in group["params"]}
    for name, parameter in named.items():
        if name.startswith("model.visual."):
            assert rate[id(parameter)] == pytest.approx(1.25e-4)
        elif name.startswith("heads.") or name == "model.logit_scale":
            assert rate[id(parameter)] == pytest.approx(5e-4)
        else:
            assert rate[id(parameter)] == pytest.approx(2e-3)


@pytest.mark.parametrize(
    ("epochs", "num_rows", "expected"),
    [(1.0, 24, 2), (2.0, 24, 3), (0.1, 30 * 16, 3), (0.5, 32, 1), (32.0, 1000, 2000)],
)
def test_steps_of_epochs_are_rounded_up_to_a_whole_batch(epochs: float, num_rows: int, expected: int) -> None:
    assert steps_of(epochs, num_rows=num_rows, batch_size=16) == expected
    seen = Fraction(str(epochs)) * num_rows
    assert (expected - 1) * 16 < seen <= expected * 16


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate must be positive"),
        ({"gradient_clip": -1.0}, "gradient_clip is -1.0"),
        ({"average_decay": 1.0}, "average_decay is 1.0"),
        ({"warmup_steps": -1}, "warmup_steps is -1"),
        ({"warmup_steps": 3, "warmup_epochs": 1.0}, "not both"),
        ({"final_learning_rate_ratio": 2.0}, "final_learning_rate_ratio is 2.0"),
        ({"cooldown": -0.1}, "cooldown is -0.1"),
        ({"patch_dropout": 1.0}, "patch_dropout is 1.0"),
        ({"text_learning_rate_ratio": 0.0}, "text_learning_rate_ratio is 0.0.*--freeze"),
    ],
)
def test_impossible_options_are_named(values: dict[str, float], message: str) -> None:
    groups = (Optimization, LearningCurve, TowerTraining)
    group = next(g for g in groups if set(values) <= {field.name for field in dataclasses.fields(g)})
    with pytest.raises(InputError, match=message):
        group(**values)
