"""Losses of pictures alone, of texts alone, and of batches in which some rows lack one of the two."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from distilclip import losses
from distilclip.losses.features import Features, RankRows, Sides
from distilclip.methods import TERMS
from distilclip.models.heads import Heads
from distilclip.train.class_head import ClassHead
from distilclip.train.objective import Objective
from distilclip.train.settings import Optimization
from tests.train.made import fill_queues

N, DIM, TEACHER_DIM = 7, 8, 5
HAS_IMAGE, HAS_TEXT = torch.tensor([1, 1, 0, 1, 0, 1, 1]).bool(), torch.tensor([1, 0, 1, 1, 1, 1, 0]).bool()


def naive_intramodal(own: Tensor, target: Tensor, scale: float, teacher_scale: float) -> float:
    total = 0.0
    for i in range(len(own)):
        others = [j for j in range(len(own)) if j != i]
        log_p = torch.stack([scale * own[i] @ own[j] for j in others]).log_softmax(0)
        log_q = torch.stack([teacher_scale * target[i] @ target[j] for j in others]).log_softmax(0)
        total += float((log_q.exp() * (log_q - log_p)).sum())
    return total / len(own)


@pytest.mark.parametrize("block", [None, 2])
def test_intramodal_equals_the_formula_and_its_gradient_is_right(
    unit_rows: Callable[..., Tensor], block: int | None
) -> None:
    own, target, scale = unit_rows(5, DIM, seed=1), unit_rows(5, 4, seed=2), torch.tensor(3.0, dtype=torch.float64)
    scale.requires_grad_()

    def loss(own: Tensor, scale: Tensor) -> Tensor:
        return losses.intramodal(own, target, scale=scale, teacher_scale=20.0, block=block)

    assert float(loss(own, scale).detach()) == pytest.approx(
        naive_intramodal(own.detach(), target.detach(), 3.0, 20.0), rel=1e-9
    )
    assert torch.autograd.gradcheck(loss, (own, scale))


def test_intramodal_by_hand() -> None:
    """Row 0 is nearer to 1 than to 2 for the teacher (cosines 1 and 0), and as near to both for the student."""
    target = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    own = torch.eye(3, dtype=torch.float64)
    # Rows 0 and 1: KL((3/4, 1/4) || (1/2, 1/2)) = log 2 - entropy; row 2 sees both alike: 0.
    expected = 2 / 3 * (math.log(2) + 0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    found = losses.intramodal(own, target, scale=1.0, teacher_scale=math.log(3))
    assert float(found) == pytest.approx(expected)


def test_one_feature_of_both_sides_is_the_feature_term(unit_rows: Callable[..., Tensor]) -> None:
    image, text, other_image, other_text = (unit_rows(4, DIM, seed=seed) for seed in range(4))
    student, teacher = Features(image, text, torch.tensor(1.0)), Features(other_image, other_text, torch.tensor(1.0))
    both = losses.one_feature(image, other_image) + losses.one_feature(text, other_text)
    assert float(both.detach()) == pytest.approx(float(losses.feature(student, teacher).detach()))


def test_the_rows_of_a_part_are_numbered_on_every_rank() -> None:
    chosen = torch.tensor([0, 1, 0, 0, 1, 1, 0, 0]).bool()
    found = [RankRows(here=slice(start, start + 2), count=8).only(chosen) for start in range(0, 8, 2)]
    assert [rows.here for rows in found] == [slice(0, 1), slice(1, 1), slice(1, 3), slice(3, 3)]
    assert {rows.count for rows in found} == {3}
    assert not any(rows.whole for rows in found)
    assert not RankRows(here=slice(0, 2), count=4).only(torch.tensor([1, 1, 0, 0]).bool()).whole


def make_features(dim: int, seed: int) -> Features:
    generator = torch.Generator().manual_seed(seed)
    image, text = (F.normalize(torch.randn(N, dim, generator=generator), dim=1) for _ in range(2))
    return Features(image.requires_grad_(), text.requires_grad_(), torch.tensor(10.0 + seed))


@pytest.mark.parametrize("term", TERMS)
def test_a_term_sees_the_rows_that_have_what_it_compares(term: str) -> None:
    """Its value is that of the batch without the others, whose embeddings get no gradient."""
    torch.manual_seed(0)
    heads = fill_queues(Heads(DIM, TEACHER_DIM, augmented=True, queue_length=6))
    student, teacher = make_features(DIM, 1), make_features(TEACHER_DIM, 2)
    head = ClassHead(F.normalize(torch.randn(4, TEACHER_DIM), dim=1), Optimization())
    labels, method = torch.arange(N) % 4, Objective(**{"task": 0.0, term: 1.0})
    sides = Sides.of(HAS_IMAGE, HAS_TEXT, RankRows.alone(N))

    def value(rows: Tensor, sides: Sides | None = None) -> Tensor:
        classes = head.of_step(labels[rows if sides is None else HAS_IMAGE], None)
        taken, target = student.take(rows), teacher.take(rows)
        return method.terms(taken, target, heads=heads, masked_image=taken.image, classes=classes, sides=sides)[term]

    found = value(torch.ones(N).bool(), sides)
    pairs = HAS_IMAGE & HAS_TEXT
    if TERMS[term].rows == "sides":
        by_side = {"image": value(HAS_IMAGE), "text": value(HAS_TEXT)}
        zeros = {side: torch.autograd.grad(whole, getattr(student, side))[0] for side, whole in by_side.items()}
        gradients = torch.autograd.grad(found, (student.image, student.text))
        for gradient, side in zip(gradients, ("image", "text"), strict=True):
            torch.testing.assert_close(gradient, zeros[side])
        return
    rows = HAS_IMAGE if TERMS[term].rows == "images" else pairs
    torch.testing.assert_close(found, value(rows))
    gradient = torch.autograd.grad(found, student.image)[0]
    assert (gradient.abs().sum(dim=1) > 0).tolist() == rows.tolist()


def test_without_such_rows_a_term_is_0(unit_rows: Callable[..., Tensor]) -> None:
    heads = fill_queues(Heads(DIM, DIM, augmented=True, queue_length=6))
    student, teacher = make_features(DIM, 1), make_features(DIM, 2)
    sides = Sides.of(torch.ones(N).bool(), torch.zeros(N).bool(), RankRows.alone(N))
    values = Objective(task=1.0, relational=1.0, feature=1.0).terms(student, teacher, heads=heads, sides=sides)
    assert not values["task"].any()
    assert not values["relational"].any()
    expected = losses.one_feature(student.image, teacher.image)
    assert float(values["feature"].detach()) == pytest.approx(float(expected.detach()))
