"""Say how far apart two scores are, and whether that is more than chance: by the same test images, or by several seeds.

>>> new = np.array([True, True, True, True, False, False])
>>> old = np.array([True, False, False, False, False, True])
>>> found = paired_difference([(new, old)])  # 3 images gained, 1 lost, of 6
>>> round(found.value, 3), round(found.p, 3), found.num_images
(0.333, 0.625, 6)
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool

from distilclip.sets.score import Score, mean_interval_of, mean_of

Hits = Bool[np.ndarray, " n"]
Z = 1.959963984540054  # half the width of a 95 % interval, in standard errors


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How much higher one score is than another, as a fraction, with a 95 % interval where there is one.

    `basis` says what would be drawn again: test `images` that both models saw (`num_images`, and the `p` of the paired
    test), the images of each score by itself (`scores`), or the `seeds` of the trainings.
    """

    value: float
    low: float | None = None
    high: float | None = None
    p: float | None = None
    basis: Literal["images", "scores", "seeds"] = "scores"
    num_images: int = 0

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low is not None and self.high is not None and not self.low <= 0 <= self.high


def difference(scores: Sequence[Score], baseline: Sequence[Score]) -> Difference:
    """Compare a model's mean over some sets with the baseline's on the same sets, in the same order."""
    pairs = [
        (ours, theirs)
        for one, other in zip(scores, baseline, strict=True)
        if (ours := one.hits) is not None
        and (theirs := other.hits) is not None
        and one.metric == other.metric
        and (one.num_test, one.num_unreadable) == (other.num_test, other.num_unreadable)
    ]
    if pairs and len(pairs) == len(scores):
        return paired_difference(pairs)
    mean, other_mean = mean_of(scores), mean_of(baseline)
    interval, other_interval = mean_interval_of(scores), mean_interval_of(baseline)
    if interval is None or other_interval is None:
        return Difference(value=mean - other_mean)
    # Zou and Donner 2008 (MOVER): an interval of a difference from the intervals of its two parts.
    return Difference(
        value=mean - other_mean,
        low=mean - other_mean - math.hypot(mean - interval[0], other_interval[1] - other_mean),
        high=mean - other_mean + math.hypot(interval[1] - mean, other_mean - other_interval[0]),
    )


def paired_difference(pairs: Sequence[tuple[Hits, Hits]]) -> Difference:
    """Compare two models by the same images of one set or, with equal weight, of several.

    The interval is that of Agresti and Min 2005: half an image is added to each of the four outcomes. The p of one set
    is exact (McNemar), that of several is from the normal distribution.
    """
    values, centers, variances, tables = [], [], [], []
    for ours, theirs in pairs:
        gained, lost = int((ours & ~theirs).sum()), int((theirs & ~ours).sum())
        size = len(ours) + 2
        center = (gained - lost) / size
        values.append((gained - lost) / len(ours))
        centers.append(center)
        variances.append(((gained + lost + 1) / size - center**2) / size)
        tables.append((gained, lost))
    center, error = statistics.fmean(centers), math.sqrt(sum(variances)) / len(pairs)
    if len(pairs) == 1:
        gained, lost = tables[0]
        p = _sign_test(gained, lost)
    else:
        p = 2 * statistics.NormalDist().cdf(-abs(center) / error)
    return Difference(
        value=statistics.fmean(values),
        low=center - Z * error,
        high=center + Z * error,
        p=p,
        basis="images",
        num_images=sum(len(ours) for ours, _ in pairs),
    )


def seeds_difference(values: Sequence[float], baseline: Sequence[float]) -> Difference:
    """Compare two recipes by their seeds: Welch's t interval. There is none unless both have several seeds."""
    value = statistics.fmean(values) - statistics.fmean(baseline)
    if min(len(values), len(baseline)) < 2 or not statistics.stdev([*values]) + statistics.stdev([*baseline]):
        return Difference(value=value, basis="seeds")
    # Welch: the variances of the two means add, with this many degrees of freedom (Satterthwaite).
    parts = [statistics.variance(of) / len(of) for of in (values, baseline)]
    error = math.sqrt(sum(parts))
    freedom = sum(parts) ** 2 / sum(p**2 / (len(of) - 1) for p, of in zip(parts, (values, baseline), strict=True))
    reach = t_reach(0.95, freedom) * error
    p = t_tails(abs(value) / error, freedom)
    return Difference(value=value, low=value - reach, high=value + reach, p=p, basis="seeds")


def _sign_test(gained: int, lost: int) -> float:
    """Return the exact two-sided p of McNemar's test: as uneven a split, or a more uneven one, of fair coin tosses."""
    total = gained + lost
    tail = sum(math.comb(total, k) for k in range(min(gained, lost) + 1))
    return min(1.0, 2 * tail / 2**total)


def t_tails(t: float, freedom: float) -> float:
    """Return the probability of Student's t beyond -t and t.

    With t = sqrt(freedom) tan(angle), the density is cos(angle)^(freedom - 1): smooth, so a fine sum is exact enough.

    >>> round(t_tails(2.7764, 4.0), 4)
    0.05
    """

    def mass(start: float) -> float:
        angles, step = np.linspace(start, math.pi / 2, 20_001, retstep=True)
        density = np.cos(angles) ** (freedom - 1)
        return float(step * (density.sum() - (density[0] + density[-1]) / 2))  # numpy's trapezoid came with numpy 2

    return mass(math.atan(t / math.sqrt(freedom))) / mass(0.0)


def t_reach(confidence: float, freedom: float) -> float:
    """Return the t with a `confidence` (0 to 1) of lying between -t and t, by bisection."""
    low, high = 0.0, 1.0
    while t_tails(high, freedom) > 1 - confidence:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if t_tails(middle, freedom) > 1 - confidence else (low, middle)
    return high
