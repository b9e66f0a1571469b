from __future__ import annotations

import json
import math

import pytest
import torch

from distilclip.methods import TERMS
from distilclip.models.clip import create_clip
from distilclip.models.heads import Heads
from distilclip.train.objective import Objective
from distilclip.train.step import StepResult, Student, compute_gradients
from tests.conftest import TINY_CLIP
from tests.train.made import make_inputs, make_student

N = 12


def gradients(
    student: Student, objective: Objective, *, micro_batch: int, diagnosing: bool = False
) -> tuple[StepResult, list[torch.Tensor]]:
    for parameter in student.parameters():
        parameter.grad = None
    result = compute_gradients(
        student,
        objective,
        make_inputs(N),
        micro_batch=micro_batch,
        generator=torch.Generator().manual_seed(2),
        diagnosing=diagnosing,
    )
    trained = [*student.parameters(), *([] if result.classes is None else [result.classes.centers])]
    return result, [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in trained]


@pytest.mark.parametrize("term", TERMS)
def test_accumulated_gradients_equal_the_one_shot_batch(tiny_clip_json: str, term: str) -> None:
    student = make_student(tiny_clip_json)
    objective = Objective(**{"task": 1.0, term: 3.0}, sample_rate=0.9)
    once, expected = gradients(student, objective, micro_batch=N)
    for micro_batch in (5, 1):
        accumulated, found = gradients(student, objective, micro_batch=micro_batch)
        assert torch.allclose(accumulated.loss, once.loss, rtol=1e-5)
        for a, b in zip(found, expected, strict=True):
            assert (a - b).norm() <= 1e-5 * b.norm() + 1e-8


def test_loss_is_the_weighted_sum_of_the_terms(tiny_clip_json: str) -> None:
    objective = Objective(task=2.0, feature=5.0)
    result, _ = gradients(make_student(tiny_clip_json), objective, micro_batch=N)
    assert torch.isclose(result.loss, 2 * result.terms["task"] + 5 * result.terms["feature"])


def test_scale_is_learned_by_the_task_and_the_centers_by_the_cluster_term(tiny_clip_json: str) -> None:
    student = make_student(tiny_clip_json)
    result, _ = gradients(student, Objective(), micro_batch=N)
    assert student.clip.model.logit_scale.grad.abs() > 0
    assert result.classes is None
    result, _ = gradients(student, Objective(cluster=1.0), micro_batch=N)
    assert result.classes is not None
    assert result.classes.centers.grad is not None
    assert result.classes.centers.grad.abs().sum() > 0


@pytest.mark.parametrize(("bias", "limit"), [({}, 100.0), ({"init_logit_bias": -10.0}, 117.0)])
def test_scales_stop_at_100_but_for_a_model_with_a_bias(bias: dict[str, float], limit: float) -> None:
    clip = create_clip(json.dumps({**TINY_CLIP, **bias}), seed=0)
    student = Student(clip=clip, heads=Heads(clip.dim, 10), towers=clip.model)
    with torch.no_grad():
        for log_scale in (clip.model.logit_scale, *student.heads.log_scales()):
            log_scale.fill_(math.log(117))
    student.limit_scales()
    assert clip.scale.item() == pytest.approx(limit)
    assert student.heads.scale("instance").item() == pytest.approx(100)


def test_an_infinite_scale_does_not_become_100_without_a_word(tiny_clip_json: str) -> None:
    student = make_student(tiny_clip_json)
    scales = [student.clip.model.logit_scale, *student.heads.log_scales()]
    for scale in scales:
        scale.data.fill_(math.inf)
    student.limit_scales()
    assert all(bool(torch.isnan(scale)) for scale in scales)


def test_cosine_to_the_teacher_is_reported(tiny_clip_json: str) -> None:
    result, _ = gradients(make_student(tiny_clip_json), Objective(feature=1.0), micro_batch=4)
    assert set(result.cosines) == {"cosine_image", "cosine_text"}
    assert -1 <= float(result.cosines["cosine_image"]) <= 1


def test_a_diagnosis_measures_each_terms_pull_and_changes_no_gradient(tiny_clip_json: str) -> None:
    student = make_student(tiny_clip_json)
    objective = Objective(task=2.0, cluster=3.0, feature=5.0)
    _, expected = gradients(student, objective, micro_batch=4)
    result, found = gradients(student, objective, micro_batch=4, diagnosing=True)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert result.diagnosis is not None
    norms = result.diagnosis.gradient_norms
    assert list(norms) == ["task", "cluster", "feature"]
    double, _ = gradients(student, Objective(task=4.0, cluster=3.0, feature=0.0), micro_batch=N, diagnosing=True)
    assert double.diagnosis is not None
    assert double.diagnosis.gradient_norms["task"] == pytest.approx(2 * norms["task"], rel=1e-5)
    assert double.diagnosis.gradient_norms["cluster"] == pytest.approx(norms["cluster"], rel=1e-5)
    assert result.diagnosis.agreement is not None
    assert 0 <= result.diagnosis.agreement <= 1
    assert set(result.diagnosis.line()) == {"agreement", *(f"gradient_norm_{name}" for name in norms)}


def test_masked_pictures_leave_running_statistics_alone(tiny_clip_json: str) -> None:
    vision = {"timm_model_name": "cnn_w8", "timm_pool": "max", "timm_proj": "linear", "image_size": 32}
    architecture = json.dumps(json.loads(tiny_clip_json) | {"vision_cfg": vision})
    plain, masked = make_student(architecture), make_student(architecture)
    for student, method in ((plain, Objective()), (masked, Objective(masked=1.0))):
        student.clip.model.train()
        gradients(student, method, micro_batch=N)
    statistics = [dict(student.clip.model.named_buffers()) for student in (plain, masked)]
    assert any("running_mean" in name for name in statistics[0])
    for name, value in statistics[0].items():
        assert torch.equal(value, statistics[1][name]), name
