"""Two and three processes equal one: loss and every gradient, for every term, under DDP and FSDP2."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from distilclip import distributed
from distilclip.errors import InputError
from distilclip.methods import TERMS
from distilclip.train.objective import Objective
from distilclip.train.parallel import clip_gradients_, whole
from distilclip.train.settings import Execution
from distilclip.train.step import Student, compute_gradients
from tests.conftest import TINY_CLIP
from tests.ranks import run_ranks
from tests.train.made import make_inputs, make_student

N = 12
EVERYTHING = Objective(**dict.fromkeys(TERMS, 1.0), sample_rate=0.8)
OBJECTIVES = {term: Objective(**{"task": 0.0, term: 3.0}, sample_rate=0.8) for term in TERMS} | {"all": EVERYTHING}


@dataclass
class Outcome:
    """What one step gave: sums over processes, whole tensors (on rank 0)."""

    loss: float
    terms: dict[str, float]
    cosines: dict[str, float]
    gradients: dict[str, Tensor]
    centers: list[Tensor]
    norm: float
    agreement: float | None
    gradient_norms: dict[str, float]
    queue: Tensor
    """of pictures, after the step"""


def one_step(
    student: Student, objective: Objective, *, micro_batch: int, inputs: dict[str, Any] | None = None
) -> Outcome:
    for parameter in student.parameters():
        parameter.grad = None
    result = compute_gradients(
        student,
        objective,
        make_inputs(N, **(inputs or {})),
        micro_batch=micro_batch,
        generator=torch.Generator().manual_seed(3),
        diagnosing=True,
    )
    centers = [] if result.classes is None else [result.classes.centers]
    gradients = {name: p.grad.clone() for name, p in student.named_parameters().items() if p.grad is not None}
    held = [c.grad.clone() for c in centers if c.grad is not None]
    norm = clip_gradients_(student.parameters(), sharded=centers, max_norm=0.5)
    assert result.diagnosis is not None
    assert result.rows is not None
    before = {name: value.clone() for name, value in student.heads.named_buffers()}
    student.heads.remember(result.teachers, result.rows.here, result.rows.sides)
    queue = student.heads.queued("image").clone()
    for name, value in student.heads.named_buffers():  # the next step has the queue of this one
        value.copy_(before[name])
    return Outcome(
        loss=summed(result.loss),
        terms={name: summed(value) for name, value in result.terms.items()},
        cosines={name: summed(value) for name, value in result.cosines.items()},
        gradients=whole(gradients),
        centers=[rows for part in distributed.gather_objects(held) for rows in part],
        norm=float(norm),
        agreement=result.diagnosis.agreement,
        gradient_norms=result.diagnosis.gradient_norms,
        queue=queue,
    )


def summed(value: Tensor) -> float:
    return float(distributed.reduce_(value.detach().clone()))


def on_a_rank(architecture: str, strategy: str, micro_batches: tuple[int, ...]) -> dict[tuple[str, int], Outcome]:
    with distributed.job("cpu"):
        student = make_student(architecture, execution=Execution(strategy=strategy))
        shards = [p for p in student.parameters() if isinstance(p, DTensor)]
        assert len(shards) > 20 if strategy == "fsdp" else not shards
        return {
            (name, micro_batch): one_step(student, objective, micro_batch=micro_batch)
            for name, objective in OBJECTIVES.items()
            for micro_batch in (micro_batches if name == "all" else micro_batches[:1])
        }


def assert_equal(found: Outcome, expected: Outcome) -> None:
    assert found.loss == pytest.approx(expected.loss, rel=1e-5)
    assert found.terms == pytest.approx(expected.terms, rel=1e-5)
    assert found.cosines == pytest.approx(expected.cosines, rel=1e-5, abs=1e-6)
    assert found.norm == pytest.approx(expected.norm, rel=1e-5)
    assert found.agreement == pytest.approx(expected.agreement, abs=1e-5)
    assert found.gradient_norms == pytest.approx(expected.gradient_norms, rel=1e-4)
    assert torch.equal(found.queue, expected.queue)
    assert set(found.gradients) == set(expected.gradients)
    for name, gradient in expected.gradients.items():
        assert (found.gradients[name] - gradient).norm() <= 2e-5 * gradient.norm() + 1e-7, name
    torch.testing.assert_close(
        torch.cat([*found.centers, torch.zeros(0, 10)]),
        torch.cat([*expected.centers, torch.zeros(0, 10)]),
        rtol=1e-4,
        atol=1e-7,
    )


@pytest.mark.parametrize(
    ("strategy", "world"), [pytest.param("ddp", 2, marks=pytest.mark.slow), ("fsdp", 2), ("ddp", 3)]
)
def test_several_processes_give_the_loss_and_gradients_of_one(strategy: str, world: int, tiny_clip_json: str) -> None:
    local = N // world
    outcomes = run_ranks(world, on_a_rank, tiny_clip_json, strategy, (local, local // 2))[0]
    alone = make_student(tiny_clip_json)
    for (name, micro_batch), found in outcomes.items():
        expected = one_step(alone, OBJECTIVES[name], micro_batch=N)
        assert len(expected.gradients) > 20
        assert_equal(found, expected)
        assert micro_batch in (local, local // 2)
    assert len(outcomes) == len(OBJECTIVES) + 1


SEVERAL: dict[str, Any] = {"other_dims": (6, 10)}
SIGMOID: dict[str, Any] = {"teacher_bias": -8.0}
SIGMOID_MODEL = json.dumps({**TINY_CLIP, "init_logit_bias": -10, "init_logit_scale": 2.302})


def other_kinds_on_a_rank(architecture: str, strategy: str) -> list[Outcome]:
    """Three teachers at once, and a sigmoid student of a sigmoid teacher, of a softmax teacher, and alone."""
    with distributed.job("cpu"):
        execution = Execution(strategy=strategy)
        several = make_student(architecture, execution=execution, **SEVERAL)
        sigmoid = make_student(SIGMOID_MODEL, execution=execution)
        micro_batch = N // distributed.world()
        return [
            one_step(several, EVERYTHING, micro_batch=micro_batch, inputs=SEVERAL),
            one_step(several, EVERYTHING, micro_batch=4, inputs=SEVERAL),
            one_step(sigmoid, EVERYTHING, micro_batch=micro_batch, inputs=SIGMOID),
            one_step(sigmoid, EVERYTHING, micro_batch=micro_batch),
            one_step(sigmoid, Objective(), micro_batch=2),
        ]


@pytest.mark.parametrize("strategy", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp"])
def test_several_teachers_and_sigmoid_models_in_two_processes_as_in_one(strategy: str, tiny_clip_json: str) -> None:
    found = run_ranks(2, other_kinds_on_a_rank, tiny_clip_json, strategy)[0]
    expected = other_kinds_on_a_rank(tiny_clip_json, "ddp")
    for one, two in zip(expected, found, strict=True):
        assert_equal(two, one)
    assert {"heads.others.0.image_projection.weight", "heads.others.1.fuse_text.weight"} <= set(found[0].gradients)
    assert all(outcome.gradients["model.logit_bias"].abs() > 0 for outcome in found[2:])


def cnn_on_a_rank(architecture: str) -> str:
    with distributed.job("cpu"), pytest.raises(InputError) as refusal:
        make_student(architecture)
    return str(refusal.value)


def test_batch_norm_on_several_cpu_processes_is_refused(tiny_clip_json: str) -> None:
    vision = {"timm_model_name": "cnn_w8", "timm_pool": "max", "timm_proj": "linear", "image_size": 32}
    architecture = json.dumps(json.loads(tiny_clip_json) | {"vision_cfg": vision})
    for message in run_ranks(2, cnn_on_a_rank, architecture):
        assert "normalises over the batch" in message
