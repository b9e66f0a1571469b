"""The probes of a set on features that are already there: linear, k nearest neighbours, few-shot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from distilclip.evaluate.few_shot import few_shot
from distilclip.evaluate.knn_probe import NUM_NEIGHBOURS, TEMPERATURE, knn_predictions
from distilclip.evaluate.scores import Score, Task, few_shot_scores, knn_scores, probe_scores
from distilclip.ops.probe import Probe, linear_probe

Examples = tuple[Float[Tensor, "_ dim"], Int[Tensor, " _"]]
"""Features with their labels, on the device where probes are computed."""

_ONE_EACH = "one training image a class leaves none to choose the penalty on: give --probe-l2"


@dataclass(frozen=True, kw_only=True)
class ProbeInputs:
    """A set's splits as features. `folds` are rows of `train`, of which each makes a training set of its own."""

    train: Examples
    test: Examples
    validation: Examples | None = None
    folds: Sequence[Int[Tensor, " _"]] = field(default_factory=tuple)

    @property
    def pool(self) -> Examples:
        """Everything that is not tested."""
        if self.validation is None:
            return self.train
        return torch.cat([self.train[0], self.validation[0]]), torch.cat([self.train[1], self.validation[1]])


def measure_probes(
    inputs: ProbeInputs, bases: Mapping[Task, Score], *, metric: str, l2: float | None, seed: int
) -> list[Score]:
    """The scores of every probe in `bases`, each made from its base; what cannot be fitted says why."""
    scores: list[Score] = []
    labels = inputs.test[1].cpu()
    alone = inputs.validation is None and l2 is None and int(torch.bincount(inputs.train[1]).max()) < 2
    if "linear-probe" in bases:
        base = bases["linear-probe"]
        if alone:
            scores.append(base.missing(_ONE_EACH))
        else:
            found = linear_probes(inputs, l2=l2, seed=seed)
            scores += probe_scores(found, labels, base, headline=metric)
    if "knn-probe" in bases:
        base = bases["knn-probe"].with_details(num_neighbours=NUM_NEIGHBOURS, temperature=TEMPERATURE)
        predictions = knn_predictions(*inputs.pool, inputs.test[0])
        scores += knn_scores(predictions, labels, base, headline=metric)
    if "few-shot" in bases:
        base = bases["few-shot"]
        if alone:
            scores.append(base.missing(_ONE_EACH))
        else:
            shots = few_shot(*inputs.pool, *inputs.test, l2=l2, seed=seed)
            scores += few_shot_scores(shots, labels, base, metric=metric)
    return scores


def linear_probes(inputs: ProbeInputs, *, l2: float | None, seed: int) -> list[Probe]:
    """The linear probe, or one of each fold."""
    train, labels = inputs.train
    folds: Sequence[Int[Tensor, " f"] | slice] = inputs.folds or [slice(None)]
    return [
        linear_probe(train[fold], labels[fold], *inputs.test, l2=l2, validation=inputs.validation, seed=seed)
        for fold in folds
    ]
