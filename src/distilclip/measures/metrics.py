"""Compute ranks, accuracies and their intervals.

One rule settles every tie: among equal scores the smaller index comes first. A rank is the number of candidates
strictly ahead of the target plus the equal ones with a smaller index, so a constant scorer gets chance, not 100 %.

Example: in scores (0, 2, 2) the rank of candidate 2 is 1: none is larger, and candidate 1 is equal and comes first.
Of 4 rows with class 0, 3 of them right, and 1 row with class 2, which is wrong, top-1 is 3/5 and the mean per class
(3/4 + 0) / 2 = 3/8. The 95 % interval of 2 hits in 4 rows is that of Beta(2.5, 2.5): 0.12 to 0.88.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy import special, stats
from torch import Tensor

TILE_ELEMENTS = 1 << 22  # scores in memory at once: 16 MiB in float32


def row_tiles(num_rows: int, num_columns: int, *, tile_elements: int = TILE_ELEMENTS) -> Iterator[slice]:
    """Cut rows into slices such that rows x columns stays within `tile_elements` (one row at the least)."""
    step = max(1, tile_elements // max(1, num_columns))
    for start in range(0, num_rows, step):
        yield slice(start, min(num_rows, start + step))


def target_rank(scores: Float[Tensor, "n k"], target: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
    """Return the position of each row's target among its k scores; 0 is first.

    Raises `ValueError` for scores that are not finite: NaN compares as "not ahead" and would read as a perfect rank.
    """
    if not torch.isfinite(scores.sum()):
        raise ValueError("scores hold NaN or infinity: the model's outputs are broken")
    own = scores.gather(1, target[:, None])
    # Counted in floats, exact below 2^24 columns: a comparison into booleans and their sum take several times as long.
    buffer = torch.empty_like(scores)
    rank = torch.gt(scores, own, out=buffer).sum(dim=1).long()
    # Ties are rare: only rows where another score equals the target's are looked at again.
    level = torch.eq(scores, own, out=buffer).sum(dim=1)
    tied = (level > 1).nonzero()[:, 0]
    if len(tied):
        column = torch.arange(scores.shape[1], device=scores.device)
        rank[tied] += ((scores[tied] == own[tied]) & (column < target[tied, None])).sum(dim=1)
    return rank


def mean_per_class(correct: Bool[Tensor, " n"], labels: Int[Tensor, " n"]) -> float:
    """Average each class's share of correct rows over the classes that occur in `labels`."""
    # [k] rows and hits of each class; classes without a row have no share.
    total = torch.bincount(labels)
    hits = torch.bincount(labels[correct], minlength=len(total))
    present = total > 0
    return (hits[present].double() / total[present].double()).mean().item()


def mean_interval(values: Sequence[float], *, confidence: float = 0.95) -> tuple[float, float]:
    """Return Student's t interval of the mean of a few independent values, as the accuracies of several folds."""
    mean, spread = statistics.fmean(values), statistics.stdev(values)
    reach = float(stats.t.ppf((1 + confidence) / 2, len(values) - 1)) * spread / math.sqrt(len(values))
    return mean - reach, mean + reach


def share_interval(
    hits: Bool[np.ndarray, " n"],
    *,
    strata: Int[np.ndarray, " n"] | None = None,
    clusters: Int[np.ndarray, " n"] | None = None,
    confidence: float = 0.95,
) -> tuple[float, float]:
    """Return the smoothed Bayesian bootstrap interval of the share of hits.

    With weights drawn for n rows (Rubin 1981) and for half a row that hits and half a row that misses, the share of s
    hits is distributed as Beta(s + 1/2, n - s + 1/2), so its quantiles are taken and nothing is drawn. The two halves
    give all hits and no hits an interval of some width (it is Jeffreys' interval; Brown, Cai and DasGupta 2001).

    Args:
        hits: of every row, whether it counts.
        strata: the rows' classes: the share is the mean of the classes' shares, and classes are fixed.
        clusters: what rows stand or fall with, as captions with their image: clusters are drawn, not rows.
        confidence: the probability that the interval holds the true share.

    Strata and clusters take the number of independent rows with the same variance in place of n (Korn and Graubard
    1998).
    """
    # The share, and the number of independent rows that would leave it as uncertain.
    share, size = hits.mean(), float(len(hits))
    if strata is not None:
        share, size = _share_of_strata(hits, strata)
    elif clusters is not None:
        size = _num_independent(hits, clusters)
    tail = (1 - confidence) / 2
    low, high = special.betaincinv(size * share + 0.5, size * (1 - share) + 0.5, [tail, 1 - tail])
    # As Brown et al. do: the quantile would leave out the share itself.
    return 0.0 if share == 0 else float(low), 1.0 if share == 1 else float(high)


def _share_of_strata(hits: Bool[np.ndarray, " n"], strata: Int[np.ndarray, " n"]) -> tuple[float, float]:
    """Return the mean of the strata's shares, and the number of independent rows with the same variance.

    A stratum's variance is taken from its share drawn towards the mean by one row, s, since few rows of its own may all
    hit. Where strata are alike, s (1 - s) is on average 1 - n / (n + 1)^2 of the true p (1 - p), and divided by that;
    where they differ, it comes out too large, the less the more rows they have.
    """
    total = np.bincount(strata)
    num_hits = np.bincount(strata, weights=hits)[total > 0]
    total = total[total > 0]
    mean = (num_hits / total).mean()
    # Where all strata hit alike, the variance of the mean of k shares is p (1 - p) sum(1 / n_j) / k^2.
    size = len(total) ** 2 / (1 / total).sum()
    if 0 < mean < 1:
        drawn = (num_hits + mean) / (total + 1)
        # Of each stratum's share, drawn towards the mean and corrected for that.
        variance = drawn * (1 - drawn) / (1 - total / (total + 1) ** 2)
        size = mean * (1 - mean) / ((variance / total).sum() / len(total) ** 2)
    return mean, size


def _num_independent(hits: Bool[np.ndarray, " n"], clusters: Int[np.ndarray, " n"]) -> float:
    """Return the number of independent rows whose share has the variance of drawing clusters, at most n.

    Where all rows or none hit, clusters count as one row each (unequal ones as fewer): nothing shows how alike their
    rows are.
    """
    total = np.bincount(clusters)
    num_hits = np.bincount(clusters, weights=hits)[total > 0]
    total = total[total > 0]
    share = hits.mean()
    if not 0 < share < 1 or len(total) < 2:
        return len(hits) ** 2 / np.square(total).sum()
    # The variance of the share over resampled clusters, then the number of rows with that variance.
    spread = np.square(num_hits - share * total).sum() * len(total) / (len(total) - 1)
    return min(float(len(hits)), share * (1 - share) * len(hits) ** 2 / spread) if spread else float(len(hits))
