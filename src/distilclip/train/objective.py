"""Weigh the terms of a distillation method: a method is a value, its weights and the constants inside its terms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from distilclip.losses.features import Features, RankRows
from distilclip.losses.terms import COMPUTE, StepClasses, TeacherInputs, TermInputs
from distilclip.methods import Weights, find_term, weights_of
from distilclip.models.heads import Heads

_MISSING = {
    "teacher": "compares with a teacher: pass the teacher's features",
    "masks": "needs masked_image, the student's embeddings of masked images",
    "centers": "needs classes, the centers and labels of the step",
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
    ) -> dict[str, Float[Tensor, ""]]:
        """Compute every term with a weight, unweighted. `student` is in its own space; `heads` projects it.

        `others` are the features of further teachers: a term is the mean over teachers by the weights that `heads` has
        for them, but the centers are the first one's. `masked_image` holds the student's embeddings of the masked
        images, `classes` the centers and labels of the step, for terms that need them. `rows` says which rows of the
        global batch are given (None: all); the values are what they add to its terms. Raises `ValueError` for a term
        that lacks what it needs.
        """
        rows = rows or RankRows.alone(len(student))
        used = [find_term(name) for name, weight in self.weights.items() if weight]
        given = {"teacher": teacher, "masks": masked_image, "centers": classes}
        for term in used:
            for need in term.needs:
                if need in given and given[need] is None:
                    raise ValueError(f"The term {term.name!r} {_MISSING[need]}.")
        alone = TermInputs(rows=rows, student=student, constants=self.constants)
        values = {term.name: COMPUTE[term.name](alone) for term in used if "teacher" not in term.needs}
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
            )
            for term in compared:
                if "centers" not in term.needs:
                    values[term.name] = values.get(term.name, 0) + weight * COMPUTE[term.name](inputs)
                elif place == 0:
                    values[term.name] = COMPUTE[term.name](inputs)
        return values

    def total(self, terms: Mapping[str, Float[Tensor, ""]]) -> Float[Tensor, ""]:
        """Return the weighted sum of terms; `ValueError` names a term that has a weight and was not computed."""
        missing = [name for name, weight in self.weights.items() if weight and name not in terms]
        if missing:
            raise ValueError(f"The terms {missing} have a weight and were not computed.")
        return torch.stack([self.weights[name] * value for name, value in terms.items()]).sum()


def objective(name: str, overrides: Mapping[str, float] | None = None) -> Objective:
    """Return a named method (`clip`, `clip-cid`, `clip-kd`) with some weights or constants replaced.

    Raises `InputError` for an unknown method, term or constant.
    """
    return Objective(**weights_of(name, overrides).values)
