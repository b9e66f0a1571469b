"""Tell from a sample, before a search, that its farthest distance is too small for the share that is to be removed.

A row without a neighbour is its own group and stays, so no more can be removed than the share of rows that have one.
Every group of s rows loses s - 1, at least half: so half of that share is always removed.

>>> reach = Reach(nearest=np.array([0.1, 0.2, 0.3, 0.4]), num_near=1, num_rows=1000)
>>> reach.threshold_for(0.5), reach.threshold_for(1.0)
(0.2, 0.4)
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy import stats
from torch import Tensor

from distilclip.data.images import ImageMatrix
from distilclip.errors import InputError
from distilclip.grouping.rule import Rule
from distilclip.vectors.kernels import product_error, squared_product
from distilclip.vectors.points import Points
from distilclip.vectors.threads import in_threads
from distilclip.vectors.tolerance import Tolerance

LOOKS = (64, 1024)
"""Rows that are sampled; the second look is only taken where the first leaves a doubt."""

CHANCE = float(stats.norm.sf(5))
"""With which a look may wrongly find a target out of reach: that of five standard deviations, 1 in 3.5 million."""

BLOCK = 1 << 14  # rows read at a time
TILE = 1 << 12  # rows compared with the sample at a time


@dataclass(frozen=True, kw_only=True)
class Reach:
    """Hold how far off the nearest other row of each sampled row is, and how many of these are near.

    `nearest` ascends, in the metric's own unit. `num_near` counts what may be near by the rounding of products, too, so
    it is never too small. `num_rows` is the number of rows that were sampled from.
    """

    nearest: Float[np.ndarray, " m"]
    num_near: int
    num_rows: int

    @property
    def most(self) -> float:
        """Return what share of all rows has a neighbour at most, but for `CHANCE` (Clopper and Pearson 1934)."""
        num_far = len(self.nearest) - self.num_near
        return float(stats.beta.isf(CHANCE, self.num_near + 1, num_far)) if num_far else 1.0

    def threshold_for(self, share: float) -> float:
        """Return a distance within which this share of the sample has a neighbour."""
        return float(self.nearest[max(0, int(np.ceil(share * len(self.nearest))) - 1)])


def check_reach(
    images: ImageMatrix,
    valid: Bool[np.ndarray, " n"],
    rule: Rule,
    *,
    copied: Int[np.ndarray, " c"],
    device: torch.device,
) -> None:
    """Raise `InputError` where a sample shows that `rule.target_removed` is out of reach of `rule.farthest`.

    The sample is the same each time. It is compared with all rows, which are read once for each look.

    Args:
        images: the rows.
        valid: which of them belong to a group.
        rule: with a `target_removed`.
        copied: rows that are joined to another one whatever their distance.
        device: where products are computed.
    """
    assert rule.target_removed is not None
    rows = np.flatnonzero(valid)
    drawn = np.random.default_rng(0).permutation(rows)[: LOOKS[-1]]
    for look in LOOKS:
        reach = measure_reach(images, valid, np.sort(drawn[:look]), rule, copied=copied, device=device)
        if reach.most < rule.target_removed:
            raise InputError(_refusal(reach, rule))
        if reach.num_near >= rule.target_removed * len(reach.nearest):
            return


def measure_reach(
    images: ImageMatrix,
    valid: Bool[np.ndarray, " n"],
    sample: Int[np.ndarray, " m"],
    rule: Rule,
    *,
    copied: Int[np.ndarray, " c"],
    device: torch.device,
) -> Reach:
    """Find the nearest other valid row of every sampled row (ascending), by a product of all rows with the sample."""
    queries = Points.of(images.take(sample), metric=rule.metric)
    search = _Nearest(queries.block(np.arange(len(sample)), device=device), sample, radius=float(queries.norm.max()))

    def look(first: int, last: int) -> None:
        for start in range(first * BLOCK, last * BLOCK, BLOCK):
            here = valid[start : start + BLOCK]
            if here.any():
                points = Points.of(images.read(start, start + len(here)), metric=rule.metric, valid=here)
                search.meet(points, np.flatnonzero(here), start)

    num_blocks = -(-len(valid) // BLOCK)
    in_threads(look, num_blocks) if device.type == "cpu" else look(0, num_blocks)
    found = search.found
    # Their distances in float64. The nearest row by a product may be farther than the nearest, by twice its error.
    pairs = Points.of(images.take(np.concatenate([sample, np.maximum(found, 0)])), metric=rule.metric)
    exact = pairs.squared(np.arange(len(sample)), len(sample) + np.arange(len(sample)))
    exact[found < 0] = np.inf
    exact[np.isin(sample, copied)] = 0
    tolerance = Tolerance(rule.farthest, rule.metric)
    limit = tolerance.squared * (1 + 1e-6) + 2 * product_error(images.store.dim, search.radius)
    return Reach(
        nearest=np.sort(tolerance.distance_of(exact).astype(np.float64)),
        num_near=int((exact < limit).sum()),
        num_rows=int(valid.sum()),
    )


class _Nearest:
    """The nearest row of each sampled row among those met so far; blocks may be met by several threads."""

    def __init__(self, queries: Float[Tensor, "m dim"], sample: Int[np.ndarray, " m"], *, radius: float) -> None:
        self._queries, self._sample = queries, sample
        self._lock = threading.Lock()
        self._least = np.full(len(sample), np.inf, np.float32)
        self.found = np.full(len(sample), -1)
        self.radius = radius

    def meet(self, points: Points, within: Int[np.ndarray, " b"], start: int) -> None:
        """Compare the sample with some rows of a block that begins at row `start`."""
        for first in range(0, len(within), TILE):
            rows = within[first : first + TILE]
            # 1. A tile [m, b] of squared distances; a row is not its own neighbour.
            squared = squared_product(self._queries, points.block(rows, device=self._queries.device))
            own = np.flatnonzero(np.isin(self._sample, start + rows))
            squared[own, np.searchsorted(start + rows, self._sample[own])] = torch.inf
            # 2. The nearest so far; of equal ones the first, whoever comes first.
            least, place = (found.cpu().numpy() for found in squared.min(dim=1))
            row = start + rows[place]
            with self._lock:
                nearer = (least < self._least) | ((least == self._least) & (row < self.found))
                self._least[nearer], self.found[nearer] = least[nearer], row[nearer]
                self.radius = max(self.radius, float(points.norm[rows].max()))


def _refusal(reach: Reach, rule: Rule) -> str:
    target = rule.target_removed
    assert target is not None
    enough = (
        f"; {reach.threshold_for(2 * target):.4g}, where twice as many have one, should always be enough"
        if 2 * target <= 1
        else ""
    )
    return (
        f"target_removed={target!r} is out of reach of max_threshold={rule.farthest!r} ({rule.metric}): of "
        f"{len(reach.nearest):,} sampled images {reach.num_near:,} have another one that near, so at most "
        f"{reach.most:.2%} of all {reach.num_rows:,} have, and only they can be removed. Nothing was searched. Give a "
        f"larger --max-threshold: {target:.4g} of the sample has a neighbour within {reach.threshold_for(target):.4g}"
        f"{enough}."
    )
