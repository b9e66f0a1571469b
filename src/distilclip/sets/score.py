"""Define a score, the words for its task and metric, and the means over sets. Imports no torch: the report reads it."""

from __future__ import annotations

import base64
import dataclasses
import math
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Bool

from distilclip.sets.catalogue import CATALOGUE, GROUPS

TASKS = {
    "zero-shot": "Zero-shot",
    "linear-probe": "Linear probe",
    "retrieval": "Retrieval",
    "agreement": "Agreement with the teacher",
}
METRICS = {
    "top1": "top-1",
    "top5": "top-5",
    "mean_per_class": "mean per class",
    **{f"image_to_text_r{k}": f"image to text R@{k}" for k in (1, 5, 10)},
    **{f"text_to_image_r{k}": f"text to image R@{k}" for k in (1, 5, 10)},
    "top1_agreement": "same top-1",
    "top5_agreement": "shared top-5",
    "cka": "CKA",
    "cosine": "cosine",
    "kl": "KL, nats",
}
AVERAGED = ("zero-shot", "linear-probe")
"""Tasks whose scores may be averaged over sets."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """Hold one number of a model on a set: a row of an evaluate folder's result.json.

    `value`, `low` and `high` (a 95 % interval), `chance` and `majority` are fractions; only the metric `kl` is in nats.
    The interval is a Bayesian bootstrap over the test images (within each class for mean per class). For a mean over
    folds it is Student's t interval over the folds.

    `value` is None where there is none, and `reason` says why. `headline` marks the metric that the set is known by.
    `chance` is what guessing gets, `majority` what always answering the most frequent class gets. `details` say how the
    score was measured. `outcomes` say which test images counted (see `hits`), so that two models can be compared image
    by image.
    """

    model: str = ""
    model_digest: str = ""
    set: str
    task: str
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
    outcomes: str = ""

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Score:
        """Read a row of result.json; fields that another version wrote are left out."""
        names = {found.name for found in dataclasses.fields(cls)}
        return cls(**{"headline": True, **{name: value for name, value in row.items() if name in names}})

    def row(self) -> dict[str, Any]:
        """Return the score as a row of result.json."""
        return dataclasses.asdict(self)

    def without_value(self, reason: str) -> Score:
        """Return the same score without a value, and the reason."""
        return dataclasses.replace(self, value=None, headline=True, reason=reason)

    def with_details(self, **details: Any) -> Score:
        """Return the same score with more details of how it was measured."""
        return dataclasses.replace(self, details={**self.details, **details})

    def with_hits(self, hits: Bool[np.ndarray, " n"]) -> Score:
        """Return the same score with whether each test image counted: bits in base64, in the order of the set."""
        return dataclasses.replace(self, outcomes=base64.b64encode(np.packbits(hits).tobytes()).decode())

    @property
    def hits(self) -> Bool[np.ndarray, " n"] | None:
        """Whether each test image counted, in the order of the set; None where that was not written down."""
        if not self.outcomes:
            return None
        packed = np.frombuffer(base64.b64decode(self.outcomes), np.uint8)
        return np.unpackbits(packed, count=self.num_test).astype(bool)


@dataclass(frozen=True)
class Mean:
    """Name a mean over sets; the name says over how many and, where some have no score, of how many."""

    name: str
    sets: tuple[str, ...]


def title(name: str) -> str:
    """Return the words for a task or metric."""
    return TASKS.get(name) or METRICS.get(name) or name.replace("_", " ")


def means(sets: Sequence[str], *, scored: Collection[str]) -> list[Mean]:
    """List the means of a task: over each group of the papers' sets and, where there are sets of one's own, over all.

    `sets` are those of the task, `scored` those that some model has a score on. One set has no mean.
    """
    groups = {"papers' ": GROUPS["paper"], "robustness ": GROUPS["robustness"]}
    unique = tuple(dict.fromkeys(sets))
    if not CATALOGUE.keys() >= set(unique):
        groups[""] = unique
    found = []
    for group, members in groups.items():
        there = tuple(name for name in unique if name in members and name in scored)
        if len(there) > 1:
            of_all = f" of {len(members)}" if len(there) < len(members) else ""
            found.append(Mean(f"mean of {len(there)}{of_all} {group}sets", there))
    return found


def mean_of(scores: Sequence[Score]) -> float:
    """Return the mean of some scores, which all have a value."""
    return statistics.fmean(score.value for score in scores if score.value is not None)


def mean_interval_of(scores: Sequence[Score]) -> tuple[float, float] | None:
    """Return the 95 % interval of the mean over sets, whose images are independent; None where a score has none.

    >>> one = Score(set="a", task="zero-shot", metric="top1", value=0.5, low=0.4, high=0.6)
    >>> [round(bound, 4) for bound in mean_interval_of([one, one])]  # half of sqrt(2) tenths to either side
    [0.4293, 0.5707]
    """
    below, above = [], []
    for score in scores:
        if score.value is None or score.low is None or score.high is None:
            return None
        below.append(score.value - score.low)
        above.append(score.high - score.value)
    mean = mean_of(scores)
    return mean - math.hypot(*below) / len(scores), mean + math.hypot(*above) / len(scores)
