"""Weigh the terms of a distillation method: a method is a value, its weights and the constants inside its terms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from distilclip.losses.features import Features, RankRows, Sides
from distilclip.losses.terms import COMPUTE, StepClasses, TeacherInputs, TermInputs, nothing
from distilclip.methods import Term, Weights, find_term, weights_of
from distilclip.models.heads import Heads

_MISSING = {
    "teacher": "compares with a teacher: pass the teacher's features",
    "masks": "needs masked_image, the student's embeddings of masked images",
    "centers": "needs classes, the centers and labels of the step",
    "queue": "needs the batches before: make the heads with a queue_length",
}


@dataclass(frozen=True, init=False)
class Objective(Weights):
    """L = sum of weight x term; a weight of 0 leaves the term uncomputed.

    `Objective(feature=2000.0, alpha=0.9)` takes the weights of `methods.TERMS` and the `Constants` there by their
    names, and each of them can be read as an attribute. Raises `InputError` for an unknown name and for values
    that no term can have.
    """

    def terms(
        self,
        student: Features,
        teacher: Features | None,
        *,
        heads: Heads,
        others: Sequence[Features] = (),
        masked_image: Float[Tensor, "n dim"] | None = None,
        classes: StepClasses | None = None,
        rows: RankRows | None = None,
        sides: Sides | None = None,
    ) -> dict[str, Float[Tensor, ""]]:
        """Compute every term with a weight, unweighted. `student` is in its own space; `heads` projects it.

        `others` are the features of further teachers: a term is the mean over teachers by the weights that `heads` has
        for them, but the centers are the first one's. `masked_image` holds the student's embeddings of the masked
        images, `classes` the centers and labels of the step, for terms that need them. `rows` says which rows of the
        global batch are given (None: all); the values are what they add to its terms. `sides` says which rows lack a
        picture or a caption: a term is the mean over the rows that have what it compares, and 0 where none has, and
        `classes` are those of the rows with a picture. Raises `ValueError` for a term that lacks what it needs.
        """
        rows = rows or RankRows.alone(len(student))
        used = [find_term(name) for name, weight in self.weights.items() if weight]
        given = {"teacher": teacher, "masks": masked_image, "centers": classes, "queue": heads.queue}
        for term in used:
            for need in term.needs:
                if need in given and given[need] is None:
                    raise ValueError(f"The term {term.name!r} {_MISSING[need]}.")
        alone = TermInputs(rows=rows, student=student, constants=self.constants, sides=sides)
        values = {term.name: _compute(term, alone) for term in used if "teacher" not in term.needs}
        teachers = [] if teacher is None else [teacher, *others]
        compared = [term for term in used if "teacher" in term.needs]
        for place, one in enumerate(teachers if compared else []):
            own, weight = heads.each()[place], heads.weights[place]
            inputs = TeacherInputs(
                rows=rows,
                student=student,
                constants=self.constants,
                teacher=one,
                projected=own.project(student),
                heads=own,
                masked_image=masked_image,
                classes=classes,
                sides=sides,
            )
            for term in compared:
                if "centers" not in term.needs:
                    values[term.name] = values.get(term.name, 0) + weight * _compute(term, inputs)
                elif place == 0:
                    values[term.name] = _compute(term, inputs)
        return values

    def total(self, terms: Mapping[str, Float[Tensor, ""]]) -> Float[Tensor, ""]:
        """Return the weighted sum of terms; `ValueError` names a term that has a weight and was not computed."""
        missing = [name for name, weight in self.weights.items() if weight and name not in terms]
        if missing:
            raise ValueError(f"The terms {missing} have a weight and were not computed.")
        return torch.stack([self.weights[name] * value for name, value in terms.items()]).sum()


def _compute(term: Term, inputs: TermInputs) -> Float[Tensor, ""]:
    """Compute a term from the rows that it takes, where some lack a picture or a caption."""
    sides = inputs.sides
    if sides is None or term.rows == "sides":
        return COMPUTE[term.name](inputs)
    part = sides.image if term.rows == "images" else sides.pairs
    if not len(part):
        value = nothing(inputs.student)
        classes = inputs.classes if isinstance(inputs, TeacherInputs) and "centers" in term.needs else None
        return value if classes is None else value + classes.centers.sum() * 0
    changed: dict[str, Any] = {"rows": part.rows, "student": inputs.student.take(part.mine), "sides": None}
    if isinstance(inputs, TeacherInputs):
        changed |= {name: getattr(inputs, name).take(part.mine) for name in ("teacher", "projected")}
        if inputs.masked_image is not None:
            changed["masked_image"] = inputs.masked_image[part.mine]
    return COMPUTE[term.name](replace(inputs, **changed))


def objective(name: str, overrides: Mapping[str, float] | None = None) -> Objective:
    """Return a named method (`clip`, `clip-cid`, `clip-kd`) with some weights or constants replaced.

    Raises `InputError` for an unknown method, term or constant.
    """
    return Objective(**weights_of(name, overrides).values)
