from __future__ import annotations

import pickle
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

from distilclip import losses
from distilclip.errors import InputError
from distilclip.losses.features import Features
from distilclip.losses.terms import StepClasses
from distilclip.methods import TERMS
from distilclip.models.heads import Heads
from distilclip.train.class_head import ClassHead
from distilclip.train.objective import Objective, objective
from distilclip.train.settings import Optimization
from tests.train.made import fill_queues

N, STUDENT_DIM, TEACHER_DIM, NUM_CENTERS = 6, 8, 5, 7


def features(dim: int, seed: int) -> Features:
    generator = torch.Generator().manual_seed(seed)
    image, text = (F.normalize(torch.randn(N, dim, generator=generator), dim=1) for _ in range(2))
    return Features(image=image, text=text, scale=torch.tensor(10.0 + seed))


@pytest.fixture
def heads() -> Heads:
    torch.manual_seed(0)
    return fill_queues(Heads(STUDENT_DIM, TEACHER_DIM, augmented=True, queue_length=6))


def classes(labels: torch.Tensor) -> StepClasses:
    """All classes, centers drawn from a seed."""
    centers = torch.randn(NUM_CENTERS, TEACHER_DIM, generator=torch.Generator().manual_seed(3))
    return ClassHead(F.normalize(centers, dim=1), Optimization()).of_step(labels, None)


def test_every_term_is_computed_when_it_has_a_weight_and_not_otherwise(heads: Heads) -> None:
    student, teacher = features(STUDENT_DIM, 1), features(TEACHER_DIM, 2)
    taken = classes(torch.arange(N))
    for term in TERMS:
        method = Objective(**{"task": 0.0, term: 1.0})
        values = method.terms(student, teacher, heads=heads, masked_image=student.image, classes=taken)
        assert set(values) == {term}
        assert torch.isfinite(values[term])


def test_clip_kd_is_the_published_sum(heads: Heads) -> None:
    student, teacher = features(STUDENT_DIM, 1), features(TEACHER_DIM, 2)
    method = objective("clip-kd")
    u = heads.project(student)
    expected = (
        losses.contrastive(student.image, student.text, scale=student.scale)
        + losses.relational(student, teacher)
        + 2000 * losses.feature(u, teacher)
        + losses.interactive(u, teacher, scale=heads.scale("interactive"))
    )
    assert torch.allclose(method.total(method.terms(student, teacher, heads=heads)), expected)


def test_clip_cid_is_base_plus_cluster_plus_instance(heads: Heads) -> None:
    student, teacher, taken = features(STUDENT_DIM, 1), features(TEACHER_DIM, 2), classes(torch.arange(N))
    method = objective("clip-cid")
    u = heads.project(student)
    expected = (
        losses.contrastive(student.image, student.text, scale=student.scale)
        + losses.cluster(u.image, teacher.image, taken.centers, taken.labels).total
        + losses.instance(u, teacher, scale=heads.scale("instance"))
    )
    assert torch.allclose(method.total(method.terms(student, teacher, heads=heads, classes=taken)), expected)


def test_clip_cid_kd_is_the_sum_of_both_methods_with_the_task_once(heads: Heads) -> None:
    student, teacher, taken = features(STUDENT_DIM, 1), features(TEACHER_DIM, 2), classes(torch.arange(N))
    cid, kd, both = (objective(name) for name in ("clip-cid", "clip-kd", "clip-cid-kd"))

    def total(method: Objective) -> torch.Tensor:
        return method.total(method.terms(student, teacher, heads=heads, classes=taken))

    task = losses.contrastive(student.image, student.text, scale=student.scale)
    assert torch.allclose(total(both), total(cid) + total(kd) - task)
    assert {name: value for name, value in both.weights.items() if value} == {
        "task": 1.0,
        "cluster": 1.0,
        "instance": 1.0,
        "relational": 1.0,
        "feature": 2000.0,
        "interactive": 1.0,
    }


def test_task_is_never_projected(heads: Heads) -> None:
    student = features(STUDENT_DIM, 1)
    values = Objective().terms(student, features(TEACHER_DIM, 2), heads=heads)
    assert not values["task"].requires_grad  # no head's parameter is in its graph


def test_a_term_without_its_teacher_is_an_error(heads: Heads) -> None:
    with pytest.raises(ValueError, match="compares with a teacher"):
        objective("clip-kd").terms(features(STUDENT_DIM, 1), None, heads=heads)


@pytest.mark.parametrize(
    ("term", "message"),
    [("masked", "'masked' needs masked_image"), ("cluster", "needs classes"), ("queue", "queue_length")],
)
def test_a_term_without_what_it_needs_is_an_error(term: str, message: str, heads: Heads) -> None:
    heads.queue = None
    with pytest.raises(ValueError, match=message):
        Objective(**{term: 1.0}).terms(features(STUDENT_DIM, 1), features(TEACHER_DIM, 2), heads=heads)


def test_a_term_with_a_weight_that_is_not_computed_is_an_error(monkeypatch: pytest.MonkeyPatch, heads: Heads) -> None:
    student, teacher, method = features(STUDENT_DIM, 1), features(TEACHER_DIM, 2), Objective(feature=5.0)
    values = method.terms(student, teacher, heads=heads)
    with pytest.raises(ValueError, match=r"\['feature'\] have a weight and were not computed"):
        method.total({"task": values["task"]})
    monkeypatch.delitem(TERMS, "feature")
    with pytest.raises(InputError, match="There is no term 'feature'"):
        method.terms(student, teacher, heads=heads)


def test_objectives_of_one_content_are_equal_and_name_every_value() -> None:
    method = objective("clip-kd")
    assert method == Objective(relational=1.0, feature=2000.0, interactive=1.0) != Objective()
    assert list(method.values) == [
        *TERMS,
        "alpha",
        "temperature",
        "class_scale",
        "sample_rate",
        "gamma",
        "mask_ratio",
        "queue_length",
    ]
    assert pickle.loads(pickle.dumps(method)) == method
    with pytest.raises(AttributeError, match="no term or constant 'featur'"):
        _ = method.featur


def test_overrides_replace_weights_and_constants() -> None:
    method = objective("clip-cid", {"alpha": 0.9, "feature": 10.0})
    assert (method.alpha, method.feature, method.cluster) == (0.9, 10.0, 1.0)


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("clip-cdi", {}, "Did you mean 'clip-cid'"),
        ("clip", {"featur": 1.0}, "no term or constant 'featur'. Did you mean 'feature'"),
        ("clip", {"feature": -1.0}, "weight of the term 'feature' is -1.0"),
        ("clip", {"task": 0.0}, "All term weights are 0"),
        ("clip-cid", {"alpha": 1.5}, "alpha is 1.5"),
        ("clip-cid", {"temperature": 0.0}, "must be positive"),
        ("clip-cid", {"class_scale": float("inf")}, "class_scale is inf"),
        ("clip-kd", {"feature": float("nan")}, "'feature' is nan; weights are 0 or more"),
        ("clip-kd", {"feature": -1.0}, "'feature' is -1.0; weights are 0 or more"),
        ("clip-cid", {"sample_rate": 0.0}, "sample_rate is 0.0"),
    ],
)
def test_bad_objectives_are_named(name: str, overrides: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        objective(name, overrides)


def test_words_for_weights_are_named() -> None:
    """In a process of its own: here, the types themselves are checked before the function is called."""
    code = """
import distilclip as dc
for name, overrides in (("clip", {"feature": "1"}), ("clip", {"alpha": None}), (None, {})):
    try:
        dc.objective(name, overrides)
    except dc.InputError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    expected = ["feature is '1'; a weight", "alpha is None; a weight", "No objective None. Known: clip"]
    for part, message in zip(expected, done.stdout.splitlines(), strict=True):
        assert part in message
