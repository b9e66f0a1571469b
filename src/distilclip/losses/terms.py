"""Compute the terms of an objective from the features of a step; `methods.py` names them and says what they need.

A term is computed in one form for one rank and for many: the rows here as queries, the rows of all ranks as keys
(`RankRows.all`). The ranks' values add up to the term, and every row counts 1 / m, so a weight means the same on any
number of ranks. A new loss is a function in this package, one line in
`methods.py`, and one more function under `@computes` below.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor

from distilclip.losses.cluster import ClassShard, cluster
from distilclip.losses.contrastive import contrastive, instance
from distilclip.losses.distillation import (
    augmented,
    feature,
    gradient,
    interactive,
    intramodal,
    one_feature,
    queued,
    relational,
)
from distilclip.losses.features import Features, RankRows, Sides
from distilclip.losses.sigmoid import sigmoid, sigmoid_relational
from distilclip.methods import Constants, find_term


@dataclass(frozen=True, kw_only=True)
class StepClasses:
    """The classes of one step: this rank's, and the labels of the global batch among those of all ranks."""

    centers: Float[Tensor, "c dim"]
    """this rank's centers, a leaf: `grad` is the gradient of these rows alone"""
    labels: Int[Tensor, " m"]
    """of the global batch, numbered among the classes of all ranks in this step"""
    first: int
    """the number of this rank's first class among them"""
    rows: Int[Tensor, " c"] | None
    """the rows of the class head that `centers` are; None for all of them, in place"""


@runtime_checkable
class TermHeads(Protocol):
    """The learned parameters that terms use; `models.heads.Heads` are such."""

    def project(self, student: Features) -> Features:
        """Bring the student's embeddings to the teacher's space."""

    def fuse(self, projected: Features, teacher: Features) -> tuple[Tensor, Tensor]:
        """Fuse the embeddings of student and teacher, images and texts."""

    def scale(self, term: str) -> Tensor:
        """Return a term's own scale."""

    def queued(self, side: str) -> Tensor:
        """Return the teacher's embeddings of one side, `image` or `text`, of the batches before."""


@dataclass(frozen=True, kw_only=True)
class TermInputs:
    """What a term without a teacher may use."""

    rows: RankRows
    """which rows of the global batch are here"""
    student: Features
    """in the student's own space"""
    constants: Constants
    sides: Sides | None = None
    """what each row has; None where all have a picture and a caption, or the term takes only rows that have what it
    needs"""


@dataclass(frozen=True, kw_only=True)
class TeacherInputs(TermInputs):
    """What a term that compares with a teacher may use."""

    teacher: Features
    projected: Features
    """the student in the teacher's space"""
    heads: TermHeads
    masked_image: Float[Tensor, "n dim"] | None = None
    """the student's embeddings of masked images, in its own space (for a term that needs masks)"""
    classes: StepClasses | None = None
    """centers and labels of the step (for a term that needs centers)"""


Compute = Callable[[Any], Float[Tensor, ""]]
"""From `TermInputs`, or `TeacherInputs` where the term needs a teacher, to what the rows here add to the term."""

COMPUTE: dict[str, Compute] = {}
"""How every term of `methods.TERMS` is computed."""


def computes(name: str) -> Callable[[Compute], Compute]:
    """Make the function below the way to compute a term; `InputError` where `methods.py` has none of that name."""
    find_term(name)

    def add(compute: Compute) -> Compute:
        COMPUTE[name] = compute
        return compute

    return add


# Every term: which embeddings it compares, its scale, and the rows that are here.


@computes("task")
def _task(given: TermInputs) -> Tensor:
    """The student's own loss: the sigmoid loss for a model with a bias (SigLIP), else the contrastive loss."""
    student, rows = given.student, given.rows
    if student.bias is None:
        return contrastive(student.image, student.text, scale=student.scale, rows=rows)
    # The sigmoid loss has one direction: own images against the texts of all ranks.
    keys, scale, bias = rows.all(student.text), student.scale, student.bias
    return sigmoid(student.image, keys, scale=scale, bias=bias, offset=rows.offset, count=rows.count)


@computes("cluster")
def _cluster(given: TeacherInputs) -> Tensor:
    # By images only, in the space of the centers; the labels are those of the global batch.
    assert given.classes is not None
    return cluster(
        given.projected.image,
        given.teacher.image,
        given.classes.centers,
        given.classes.labels,
        alpha=given.constants.alpha,
        temperature=given.constants.temperature,
        class_scale=given.constants.class_scale,
        shard=ClassShard(rows=given.rows, first=given.classes.first),
    ).total


@computes("instance")
def _instance(given: TeacherInputs) -> Tensor:
    scale, gamma = given.heads.scale("instance"), given.constants.gamma
    return instance(given.projected, given.teacher, scale=scale, gamma=gamma, rows=given.rows)


@computes("relational")
def _relational(given: TeacherInputs) -> Tensor:
    """Between two models of the sigmoid loss pair by pair; else by softmaxes, which do not see a bias."""
    # The student's own embeddings, never projected: similarities need no common space.
    both = given.student.bias is not None and given.teacher.bias is not None
    return (sigmoid_relational if both else relational)(given.student, given.teacher, rows=given.rows)


@computes("feature")
def _feature(given: TeacherInputs) -> Tensor:
    return _imitate(given.projected, given)


@computes("masked")
def _masked(given: TeacherInputs) -> Tensor:
    # The feature term on the student's embeddings of masked images.
    assert given.masked_image is not None
    own = Features(image=given.masked_image, text=given.student.text, scale=given.student.scale)
    return _imitate(given.heads.project(own), given)


def _imitate(projected: Features, given: TeacherInputs) -> Tensor:
    if given.sides is None:
        return feature(projected, given.teacher, rows=given.rows)
    return _add_sides(one_feature, projected, given.teacher, given.sides)


@computes("intramodal")
def _intramodal(given: TeacherInputs) -> Tensor:
    # The student's own embeddings, never projected, as in the relational term; pictures and texts count half each.
    student, teacher = given.student, given.teacher

    def within(own: Tensor, target: Tensor, *, rows: RankRows) -> Tensor:
        return intramodal(own, target, scale=student.scale, teacher_scale=teacher.scale, rows=rows) / 2

    if given.sides is not None:
        return _add_sides(within, student, teacher, given.sides)
    return within(student.image, teacher.image, rows=given.rows) + within(student.text, teacher.text, rows=given.rows)


@computes("queue")
def _queue(given: TeacherInputs) -> Tensor:
    scale, total = given.heads.scale("queue"), nothing(given.student)
    for side in ("image", "text"):
        own, target, keys = getattr(given.projected, side), getattr(given.teacher, side), given.heads.queued(side)
        part = None if given.sides is None else getattr(given.sides, side)
        if len(keys) and (part is None or len(part)):
            count = given.rows.count if part is None else len(part)
            own, target = (own, target) if part is None else (own[part.mine], target[part.mine])
            value = queued(own, target, keys, scale=scale, teacher_scale=given.teacher.scale, count=count)
            total = total + value / 2
    return total + scale * 0


def _add_sides(loss: Callable[..., Tensor], student: Features, teacher: Features, sides: Sides) -> Tensor:
    """Add a loss of pictures, over the rows that have one, and the same loss of texts."""
    total = nothing(student)
    for own, target, part in (
        (student.image, teacher.image, sides.image),
        (student.text, teacher.text, sides.text),
    ):
        if len(part):
            total = total + loss(own[part.mine], target[part.mine], rows=part.rows)
    return total


def nothing(student: Features) -> Float[Tensor, ""]:
    """Return the value of a term to which no row of the batch adds: 0, with gradients of 0."""
    return (student.image.sum() + student.text.sum()) * 0


@computes("gradient")
def _gradient(given: TeacherInputs) -> Tensor:
    return gradient(given.projected, given.teacher, rows=given.rows)


@computes("interactive")
def _interactive(given: TeacherInputs) -> Tensor:
    return interactive(given.projected, given.teacher, scale=given.heads.scale("interactive"), rows=given.rows)


@computes("augmented")
def _augmented(given: TeacherInputs) -> Tensor:
    fused = given.heads.fuse(given.projected, given.teacher)
    return augmented(*fused, scale=given.heads.scale("augmented"), rows=given.rows)
