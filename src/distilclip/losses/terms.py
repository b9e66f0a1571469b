"""List the terms of an objective: each has a name, words for the report, what it needs, and how to compute it.

A term is computed in one form for one rank and for many: the rows here as queries, the rows of all ranks as keys
(`RankRows.all`). The ranks' values add up to the term, and every row counts 1 / m, so a weight means the same on any
number of ranks. A new loss is a function in this package, and one more function under `@register` below.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Literal, Protocol, get_args, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor

from distilclip.errors import InputError, did_you_mean
from distilclip.losses.cluster import ClassShard, cluster
from distilclip.losses.contrastive import contrastive, instance
from distilclip.losses.distillation import augmented, feature, gradient, interactive, relational
from distilclip.losses.features import Features, RankRows
from distilclip.losses.sigmoid import sigmoid, sigmoid_relational

Need = Literal["teacher", "scale", "fusion", "masks", "centers"]
"""A teacher; a learned scale of the term's own; linear maps that fuse student and teacher; masked images; centers."""


@dataclass(frozen=True, kw_only=True)
class Constants:
    """The constants inside the terms, beside their weights."""

    alpha: float = 0.999
    """share of the label loss in the cluster term; the rest is the KL"""
    temperature: float = 0.07
    """tau of the cluster term's KL"""
    class_scale: float = 1.0
    """s_l of the cluster term's label loss"""
    sample_rate: float = 1.0
    """share of the classes in each step's softmax (Partial FC); 1 means all"""
    gamma: float = 0.5
    """share of the image side in the instance term"""
    mask_ratio: float = 0.75
    """share of the patch grid that the masked term hides"""

    def __post_init__(self) -> None:
        for name in ("alpha", "gamma", "mask_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} is {getattr(self, name)}; it is a share, from 0 to 1.")
        for name in ("temperature", "class_scale"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"{name} is {getattr(self, name)}; it must be positive.")
        if not 0 < self.sample_rate <= 1:
            raise InputError(f"sample_rate is {self.sample_rate}; it is a share of the classes, over 0 and up to 1.")


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


@dataclass(frozen=True, kw_only=True)
class TermInputs:
    """What a term without a teacher may use."""

    rows: RankRows
    """which rows of the global batch are here"""
    student: Features
    """in the student's own space"""
    constants: Constants


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


@dataclass(frozen=True, kw_only=True)
class Term:
    """One loss as a part of an objective."""

    name: str
    """of its weight, of its column in metrics.jsonl, and of its chart in the report"""
    words: str
    """what it is, in a few plain words for the report"""
    compute: Callable[[Any], Float[Tensor, ""]]
    """from `TermInputs`, or `TeacherInputs` where it needs a teacher, to what the rows here add to the term"""
    needs: tuple[Need, ...] = ()
    default: float = 0.0
    """the weight where none is given"""


TERMS: dict[str, Term] = {}
"""Every term by its name."""


def register(
    name: str, words: str, *, needs: tuple[Need, ...] = (), default: float = 0.0
) -> Callable[[Callable[[Any], Tensor]], Term]:
    """Make the function below a term, so that every objective knows its weight; `ValueError` for a name that is taken.

    The fields of `Term` say what the arguments are.
    """
    if name in TERMS or name in constant_names():
        raise ValueError(f"There is a term or constant {name!r} already: choose another name.")
    if unknown := set(needs) - set(get_args(Need)):
        raise ValueError(f"The term {name!r} needs {sorted(unknown)}; choose from {get_args(Need)}.")
    if needs and "teacher" not in needs:
        raise ValueError(f"The term {name!r} needs {needs}: only a term that needs a teacher gets these, too.")

    def add(compute: Callable[[Any], Tensor]) -> Term:
        TERMS[name] = Term(name=name, words=words, compute=compute, needs=needs, default=default)
        return TERMS[name]

    return add


def find_term(name: str) -> Term:
    """Return a term by its name; `InputError` where none is registered."""
    if name not in TERMS:
        raise InputError(f"No term {name!r} is registered in losses/terms.py. {did_you_mean(name, TERMS)}")
    return TERMS[name]


def constant_names() -> list[str]:
    """Return the names of all constants."""
    return [field.name for field in fields(Constants)]


# Every term: which embeddings it compares, its scale, and the rows that are here.


@register("task", "contrastive loss of the student's own image and text embeddings", default=1.0)
def _task(given: TermInputs) -> Tensor:
    """The student's own loss: the sigmoid loss for a model with a bias (SigLIP), else the contrastive loss."""
    student, rows = given.student, given.rows
    if student.bias is None:
        return contrastive(student.image, student.text, scale=student.scale, rows=rows)
    # The sigmoid loss has one direction: own images against the texts of all ranks.
    keys, scale, bias = rows.all(student.text), student.scale, student.bias
    return sigmoid(student.image, keys, scale=scale, bias=bias, offset=rows.offset, count=rows.count)


@register("cluster", "CLIP-CID cluster discrimination", needs=("teacher", "centers"))
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


@register("instance", "CLIP-CID instance discrimination", needs=("teacher", "scale"))
def _instance(given: TeacherInputs) -> Tensor:
    scale, gamma = given.heads.scale("instance"), given.constants.gamma
    return instance(given.projected, given.teacher, scale=scale, gamma=gamma, rows=given.rows)


@register("relational", "CLIP-KD relational distillation (CRD)", needs=("teacher",))
def _relational(given: TeacherInputs) -> Tensor:
    """Between two models of the sigmoid loss pair by pair; else by softmaxes, which do not see a bias."""
    # The student's own embeddings, never projected: similarities need no common space.
    both = given.student.bias is not None and given.teacher.bias is not None
    return (sigmoid_relational if both else relational)(given.student, given.teacher, rows=given.rows)


@register("feature", "CLIP-KD feature distillation (FD)", needs=("teacher",))
def _feature(given: TeacherInputs) -> Tensor:
    return feature(given.projected, given.teacher, rows=given.rows)


@register("masked", "CLIP-KD masked feature distillation (MFD)", needs=("teacher", "masks"))
def _masked(given: TeacherInputs) -> Tensor:
    # The feature term on the student's embeddings of masked images.
    assert given.masked_image is not None
    own = Features(image=given.masked_image, text=given.student.text, scale=given.student.scale)
    return feature(given.heads.project(own), given.teacher, rows=given.rows)


@register("gradient", "CLIP-KD gradient distillation (GD)", needs=("teacher",))
def _gradient(given: TeacherInputs) -> Tensor:
    return gradient(given.projected, given.teacher, rows=given.rows)


@register("interactive", "CLIP-KD interactive contrast (ICL)", needs=("teacher", "scale"))
def _interactive(given: TeacherInputs) -> Tensor:
    return interactive(given.projected, given.teacher, scale=given.heads.scale("interactive"), rows=given.rows)


@register("augmented", "CLIP-KD augmented features (AFD)", needs=("teacher", "scale", "fusion"))
def _augmented(given: TeacherInputs) -> Tensor:
    fused = given.heads.fuse(given.projected, given.teacher)
    return augmented(*fused, scale=given.heads.scale("augmented"), rows=given.rows)
