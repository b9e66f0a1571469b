from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from distilclip.models.clip import create_clip
from distilclip.models.heads import Heads
from distilclip.ops.features import Features
from distilclip.train.objective import TERMS, Objective
from distilclip.train.step import StepResult, Student, compute_gradients

N, TEACHER_DIM, NUM_CENTERS = 12, 10, 9


def build(tiny_clip_json: str) -> Student:
    clip = create_clip(tiny_clip_json, seed=0)
    torch.manual_seed(1)
    centers = F.normalize(torch.randn(NUM_CENTERS, TEACHER_DIM), dim=1)
    heads = Heads(clip.dim, TEACHER_DIM, augmented=True, centers=centers)
    return Student(clip=clip, heads=heads, precision=torch.float32)


def gradients(student: Student, objective: Objective, *, micro_batch: int) -> tuple[StepResult, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(2)
    teacher = Features(
        image=F.normalize(torch.randn(N, TEACHER_DIM, generator=generator), dim=1),
        text=F.normalize(torch.randn(N, TEACHER_DIM, generator=generator), dim=1),
        scale=torch.tensor(20.0),
    )
    for parameter in student.parameters():
        parameter.grad = None
    result = compute_gradients(
        student,
        objective,
        pixels=torch.randint(0, 256, (N, 3, 32, 32), dtype=torch.uint8, generator=generator),
        tokens=torch.randint(1, 400, (N, 12), generator=generator),
        teacher=teacher,
        labels=torch.randint(0, NUM_CENTERS, (N,), generator=generator),
        micro_batch=micro_batch,
        generator=generator,
    )
    return result, [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in student.parameters()]


@pytest.mark.parametrize("term", TERMS)
def test_accumulated_gradients_equal_the_one_shot_batch(tiny_clip_json: str, term: str) -> None:
    student = build(tiny_clip_json)
    objective = Objective(**{"task": 1.0, term: 3.0}, sample_rate=0.9)
    once, expected = gradients(student, objective, micro_batch=N)
    for micro_batch in (5, 1):
        accumulated, found = gradients(student, objective, micro_batch=micro_batch)
        assert torch.allclose(accumulated.loss, once.loss, rtol=1e-5)
        for a, b in zip(found, expected, strict=True):
            assert (a - b).norm() <= 1e-5 * b.norm() + 1e-8


def test_loss_is_the_weighted_sum_of_the_terms(tiny_clip_json: str) -> None:
    objective = Objective(task=2.0, feature=5.0)
    result, _ = gradients(build(tiny_clip_json), objective, micro_batch=N)
    assert torch.isclose(result.loss, 2 * result.terms["task"] + 5 * result.terms["feature"])


def test_scale_is_learned_by_the_task_and_the_centers_by_the_cluster_term(tiny_clip_json: str) -> None:
    student = build(tiny_clip_json)
    gradients(student, Objective(), micro_batch=N)
    assert student.clip.model.logit_scale.grad.abs() > 0
    assert student.heads.centers is not None
    assert student.heads.centers.grad is None
    gradients(student, Objective(cluster=1.0), micro_batch=N)
    assert student.heads.centers.grad is not None
    assert student.heads.centers.grad.abs().sum() > 0


def test_cosine_to_the_teacher_is_reported(tiny_clip_json: str) -> None:
    result, _ = gradients(build(tiny_clip_json), Objective(feature=1.0), micro_batch=4)
    assert result.cosine_image is not None
    assert -1 <= float(result.cosine_image) <= 1
