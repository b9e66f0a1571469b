"""Scores: every number of a model on a set, with its interval, its baselines and what it was measured with."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from distilclip.evaluate.agreement import Agreement
from distilclip.evaluate.retrieval import Retrieval
from distilclip.evaluate.zero_shot import ZeroShot
from distilclip.ops.metrics import bootstrap_interval, mean_per_class
from distilclip.ops.probe import Probe

Task = Literal["zero-shot", "linear-probe", "retrieval", "agreement"]
RECALL_AT = (1, 5, 10)


@dataclass(frozen=True, kw_only=True)
class Score:
    """One number. `value`, `low` and `high` (a 95 % bootstrap interval), `chance` and `majority` are fractions.

    `value` is None where there is none, and `reason` says why. `headline` marks the metric that the set is known by.
    `chance` is what guessing gets, `majority` what always answering the most frequent class gets. `details` say how it
    was measured.
    """

    set: str
    task: Task
    metric: str
    value: float | None
    headline: bool = False
    low: float | None = None
    high: float | None = None
    chance: float | None = None
    majority: float | None = None
    num_test: int = 0
    num_unreadable: int = 0
    num_classes: int | None = None
    reason: str = ""
    details: dict[str, Any] = field(default_factory=dict)

    def missing(self, reason: str) -> Score:
        """The row of a score that cannot be had."""
        return dataclasses.replace(self, value=None, headline=True, reason=reason)

    def with_details(self, **details: Any) -> Score:
        """The same score, saying more about how it was measured."""
        return dataclasses.replace(self, details={**self.details, **details})

    def row(self, *, model: str, digest: str) -> dict[str, Any]:
        """The score as a row of result.json."""
        return {"model": model, "model_digest": digest, **dataclasses.asdict(self)}


def zero_shot_scores(found: ZeroShot, base: Score, *, headline: str, seed: int) -> list[Score]:
    """Top-1, top-5 (of more than five classes) and mean per class."""
    return _accuracies(found.rank == 0, found.labels, base, headline=headline, seed=seed, top5=found.rank < 5)


def probe_scores(found: Probe, labels: Int[Tensor, " n"], base: Score, *, headline: str, seed: int) -> list[Score]:
    """Top-1 and mean per class, with the penalty and how it was found."""
    sweep = [list(point) for point in found.sweep]
    base = base.with_details(l2=found.l2, sweep=sweep, converged=found.converged)
    return _accuracies(found.predictions.cpu() == labels, labels, base, headline=headline, seed=seed)


def retrieval_scores(found: Retrieval, pairs: Int[Tensor, " m"], base: Score, *, seed: int) -> list[Score]:
    """Recall at 1, 5 and 10, both ways."""
    num_images, num_captions = len(found.image_to_text), len(found.text_to_image)
    owned = torch.bincount(pairs)
    scores = []
    for direction, ranks, chance in (
        ("image_to_text", found.image_to_text, lambda k: _chance_of_any(owned, num_captions, k)),
        ("text_to_image", found.text_to_image, lambda k: min(1.0, k / num_images)),
    ):
        for k in RECALL_AT:
            hits = ranks < k
            low, high = bootstrap_interval(hits.numpy(), seed=seed)
            scores.append(
                dataclasses.replace(
                    base,
                    metric=f"{direction}_r{k}",
                    value=hits.double().mean().item(),
                    headline=k == 1,
                    low=low,
                    high=high,
                    chance=chance(k),
                    num_test=len(hits),
                )
            )
    return scores


def agreement_scores(found: Agreement, base: Score) -> list[Score]:
    """CKA, where the widths match mean cosine and, for a labelled set, top-1 agreement and KL."""
    values = {"cka": found.cka, "cosine": found.cosine}
    if base.num_classes is not None:
        values = {"top1_agreement": found.top1, "kl": found.kl, **values}
    reasons = {"cosine": "the embeddings of student and teacher differ in width"}
    return [
        dataclasses.replace(
            base,
            metric=metric,
            value=value,
            headline=metric in ("top1_agreement", "cka"),
            reason="" if value is not None else reasons.get(metric, "the classes have numbers but no names"),
        )
        for metric, value in values.items()
    ]


def _accuracies(
    correct: Bool[Tensor, " n"],
    labels: Int[Tensor, " n"],
    base: Score,
    *,
    headline: str,
    seed: int,
    top5: Bool[Tensor, " n"] | None = None,
) -> list[Score]:
    assert base.num_classes is not None
    strata = labels.numpy()
    majority = torch.bincount(labels).max().item() / len(labels)
    found: list[tuple[str, Bool[Tensor, " n"], Int[np.ndarray, " n"] | None]] = [("top1", correct, None)]
    if top5 is not None and base.num_classes > 5:
        found.append(("top5", top5, None))
    found.append(("mean_per_class", correct, strata))
    scores = []
    for metric, hits, within in found:
        low, high = bootstrap_interval(hits.numpy(), strata=within, seed=seed)
        scores.append(
            dataclasses.replace(
                base,
                metric=metric,
                value=hits.double().mean().item() if within is None else mean_per_class(hits, labels),
                headline=metric == headline,
                low=low,
                high=high,
                chance=(5 if metric == "top5" else 1) / base.num_classes,
                majority=majority if metric == "top1" else None,
                num_test=len(labels),
            )
        )
    return scores


def _chance_of_any(owned: Int[Tensor, " n"], num_captions: int, k: int) -> float:
    """The mean probability that k captions drawn at random hold one of an image's own."""
    counts, images = torch.unique(owned, return_counts=True)
    misses = [
        math.comb(num_captions - int(c), k) / math.comb(num_captions, k) if k <= num_captions else 0.0 for c in counts
    ]
    return 1 - sum(m * int(n) for m, n in zip(misses, images, strict=True)) / len(owned)
