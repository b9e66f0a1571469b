from __future__ import annotations

import pytest

from distilclip.errors import InputError
from distilclip.train.optimizer import build_optimizer, schedule, set_learning_rate
from distilclip.train.settings import Optimization
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
    assert schedule(step, num_steps=110, warmup_steps=10) == pytest.approx(share)


def test_schedule_without_warmup_starts_at_the_peak() -> None:
    assert schedule(0, num_steps=10, warmup_steps=0) == 1.0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate must be positive"),
        ({"gradient_clip": -1.0}, "gradient_clip is -1.0"),
        ({"average_decay": 1.0}, "average_decay is 1.0"),
    ],
)
def test_impossible_options_are_named(values: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Optimization(**values)
