"""Several teachers, and models of the sigmoid loss, in an objective's terms."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from distilclip import losses
from distilclip.losses.features import Features
from distilclip.models.heads import Heads
from distilclip.train.objective import Objective
from tests.train.made import fill_queues

ALL = Objective(relational=1.0, feature=1.0, interactive=1.0, instance=1.0, augmented=1.0, gradient=1.0)


def features(dim: int, seed: int, *, scale: float = 20.0, bias: float | None = None) -> Features:
    generator = torch.Generator().manual_seed(seed)
    image, text = (F.normalize(torch.randn(6, dim, generator=generator), dim=1) for _ in range(2))
    return Features(image, text, torch.tensor(scale), None if bias is None else torch.tensor(bias))


def trainable(student: Features) -> Features:
    return Features(student.image.requires_grad_(), student.text.requires_grad_(), student.scale, student.bias)


def heads_of(*dims: int, weights: tuple[float, ...]) -> Heads:
    torch.manual_seed(0)
    return fill_queues(Heads(8, dims[0], augmented=True, queue_length=6, other_dims=dims[1:], weights=weights))


def test_every_term_is_the_weighted_mean_of_each_teachers_own() -> None:
    student, teachers = features(8, 1), [features(10, 2), features(4, 3, scale=7.0), features(8, 4)]
    heads = heads_of(10, 4, 8, weights=(1.0, 2.0, 5.0))
    found = ALL.terms(student, teachers[0], heads=heads, others=teachers[1:])
    first = heads_of(10, weights=(1.0,))
    first.load_state_dict({k: v for k, v in heads.state_dict().items() if not k.startswith("others.")})
    alone = [ALL.terms(student, t, heads=h) for t, h in zip(teachers, (first, *heads.others), strict=True)]
    assert list(found) == list(alone[0])
    for name, value in found.items():
        expected = sum(w * terms[name] for w, terms in zip((1 / 8, 2 / 8, 5 / 8), alone, strict=True))
        assert torch.allclose(value, expected), name
    assert torch.equal(found["task"], alone[0]["task"])


def test_one_teacher_twice_with_its_heads_is_that_teacher() -> None:
    student, teacher = features(8, 1), features(10, 2)
    heads = heads_of(10, 10, weights=(1.0, 3.0))
    heads.others[0].load_state_dict({k: v for k, v in heads.state_dict().items() if not k.startswith("others.")})
    once = ALL.terms(student, teacher, heads=heads_of(10, weights=(1.0,)))
    for name, value in ALL.terms(student, teacher, heads=heads, others=[teacher]).items():
        assert torch.allclose(value, once[name]), name


def test_the_relational_gradient_is_the_one_of_the_averaged_distribution() -> None:
    """What models/teacher.py says of divergences: one teacher's distribution for each row, averaged over teachers."""
    teachers, weights = [features(10, 2), features(4, 3, scale=7.0)], (0.25, 0.75)
    method = Objective(task=0.0, relational=1.0)
    student = trainable(features(8, 1))
    loss = method.terms(student, teachers[0], heads=heads_of(10, 4, weights=weights), others=teachers[1:])["relational"]
    logits = student.scale * student.image @ student.text.T
    expected = torch.zeros(())
    for own, dim in ((logits, 1), (logits, 0)):
        target = sum(w * (t.scale * t.image @ t.text.T).softmax(dim) for w, t in zip(weights, teachers, strict=True))
        expected = expected - (target * own.log_softmax(dim)).sum() / (2 * len(logits))
    inputs = [student.image, student.text]
    for found, reference in zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, inputs), strict=True):
        assert torch.allclose(found, reference, atol=1e-6)


def test_every_teachers_heads_are_trained_and_saved() -> None:
    heads = heads_of(10, 4, weights=(1.0, 1.0))
    student = features(8, 1)
    terms = ALL.terms(student, features(10, 2), heads=heads, others=[features(4, 3)])
    ALL.total(terms).backward()
    for name in ("image_projection.weight", "others.0.image_projection.weight", "others.0.fuse_text.weight"):
        assert dict(heads.named_parameters())[name].grad is not None
        assert name in heads.state_dict()
    assert len(heads.log_scales()) == 8


def test_a_student_with_a_bias_learns_by_the_sigmoid_loss() -> None:
    student, heads = features(8, 1, bias=-10.0), heads_of(10, weights=(1.0,))
    found = Objective().terms(student, None, heads=heads)["task"]
    assert student.bias is not None
    assert torch.equal(found, losses.sigmoid(student.image, student.text, scale=student.scale, bias=student.bias))


@pytest.mark.parametrize(("student_bias", "teacher_bias"), [(-3.0, -5.0), (None, -5.0), (-3.0, None)])
def test_relations_are_compared_pair_by_pair_between_two_sigmoid_models_only(
    student_bias: float | None, teacher_bias: float | None
) -> None:
    student, teacher = features(8, 1, bias=student_bias), features(10, 2, bias=teacher_bias)
    found = Objective(relational=1.0).terms(student, teacher, heads=heads_of(10, weights=(1.0,)))["relational"]
    if student.bias is None or teacher.bias is None:
        assert torch.equal(found, losses.relational(student, teacher))
    else:
        assert torch.equal(found, losses.sigmoid_relational(student, teacher))
