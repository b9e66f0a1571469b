"""Compute how often the rows of each cluster are drawn: by the cluster's size, or by how much there is to learn in it.

By size: a cluster of n rows has a share of the draws in proportion to n^power. Power 1 leaves the shares as they are,
and with power 0 all clusters have the same.

By complexity: density-based pruning (Abbas et al. 2024, "Effective pruning of web-scale datasets based on complexity
of concept clusters"). Clusters that are wide and far from others need more rows. With c the center of cluster j, N the
number of rows to keep and t a temperature (Tab. 4 and 5 of the paper, and its code):

    d_intra = mean of 1 - cos(row, c) over the cluster's rows        d_inter = the same from c to its 20 nearest centers
    p_j = softmax(d_intra d_inter / t)        the quota x minimises |x - N p|^2 with sum x = N and 1 <= x_j <= size_j

>>> quotas(np.array([0.5, 0.3, 0.2]), sizes=np.array([2, 9, 9]), num_rows=10).round(9).tolist()
[2.0, 4.5, 3.5]
>>> round_quotas(np.array([2.0, 4.5, 3.5])).tolist()
[2, 5, 3]
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float, Float32, Float64, Int64, Integer

from distilclip.errors import InputError

NUM_NEAREST = 20
"""Centers that the distance of a center to others is the mean over, as in the paper's code."""
BLOCK_CENTERS = 1024


def power_weights(sizes: Integer[np.ndarray, " k"], *, power: float) -> Float64[np.ndarray, " k"]:
    """Return the weight of a row of each cluster, size^(power - 1), so that a cluster has size^power; 0 if empty."""
    return np.where(sizes > 0, np.maximum(sizes, 1).astype(np.float64) ** (power - 1), 0.0)


def distances_between(centers: Float32[np.ndarray, "k dim"]) -> Float64[np.ndarray, " k"]:
    """Return the mean of 1 - cos from each center to its 20 nearest others, or to all where there are fewer.

    Raises:
        InputError: there is only one center.
    """
    near = min(NUM_NEAREST, len(centers) - 1)
    if near < 1:
        raise InputError(
            "A quota compares clusters, and only one has rows. Run `distilclip cluster` with more centers."
        )
    found = np.empty(len(centers))
    for start in range(0, len(centers), BLOCK_CENTERS):
        block = centers[start : start + BLOCK_CENTERS]
        cosine = block @ centers.T
        own = np.arange(len(block))
        cosine[own, start + own] = -np.inf
        nearest = np.argpartition(cosine, -near, axis=1)[:, -near:]
        # Products again, in a fixed order of additions: those above depend on the number of threads.
        for place in own:
            exact = (centers[np.sort(nearest[place])].astype(np.float64) * block[place]).sum(axis=1)
            found[start + place] = (1 - exact).mean()
    return found


def complexities(
    centers: Float32[np.ndarray, "k dim"], cluster: Integer[np.ndarray, " n"], distance: Float32[np.ndarray, " n"]
) -> Float64[np.ndarray, " k"]:
    """Return d_intra x d_inter of every cluster, NaN of one without rows; `distance` is each row's to its center."""
    sizes = np.bincount(cluster, minlength=len(centers))
    inside = np.bincount(cluster, distance.astype(np.float64), len(centers)) / np.maximum(sizes, 1)
    found = np.full(len(centers), np.nan)
    found[sizes > 0] = inside[sizes > 0] * distances_between(centers[sizes > 0])
    return found


def softmax(values: Float64[np.ndarray, " k"], *, temperature: float) -> Float64[np.ndarray, " k"]:
    """Return shares in proportion to exp(value / temperature); NaN has none."""
    raised = np.exp((values - np.nanmax(values)) / temperature)
    raised[np.isnan(values)] = 0
    return raised / raised.sum()


def quotas(
    shares: Float64[np.ndarray, " k"], *, sizes: Integer[np.ndarray, " k"], num_rows: int
) -> Float64[np.ndarray, " k"]:
    """Return how many of `num_rows` rows each cluster gets: nearest to its share of them, at least 1 and at most all.

    It is the paper's quadratic program, solved exactly: the quotas are num_rows x shares + a constant, held within
    their bounds. Their sum grows with the constant in straight pieces, so the right one is found by sorting the ends
    of the pieces.

    Raises:
        InputError: there are fewer rows to give than clusters with rows, or more than all have.
    """
    least, most = np.minimum(sizes, 1).astype(np.float64), sizes.astype(np.float64)
    if not least.sum() <= num_rows <= most.sum():
        raise InputError(
            f"A quota of {num_rows:,} rows is not possible: each of the {int(least.sum()):,} clusters with rows keeps "
            f"at least one, and all have {int(most.sum()):,}. Change --quota, or cluster with fewer --num-centers."
        )
    wanted = num_rows * shares
    ends = np.concatenate([least - wanted, most - wanted])
    order = np.argsort(ends, kind="stable")
    ends = ends[order]
    rising = np.cumsum(np.repeat([1.0, -1.0], len(sizes))[order])  # clusters between their bounds, after each end
    sums = least.sum() + np.concatenate([[0.0], np.cumsum(rising[:-1] * np.diff(ends))])
    piece = min(int(np.searchsorted(sums, num_rows, side="right")) - 1, len(ends) - 1)
    rest = num_rows - sums[piece]
    constant = ends[piece] + (rest / rising[piece] if rising[piece] > 0 else 0.0)
    return np.clip(wanted + constant, least, most)


def round_quotas(quota: Float64[np.ndarray, " k"]) -> Int64[np.ndarray, " k"]:
    """Return whole quotas of the same sum: rounded down, and one more for those with the largest fractions."""
    whole = np.floor(quota + 1e-9).astype(np.int64)
    missing = round(float(quota.sum())) - int(whole.sum())
    whole[np.argsort(whole - quota, kind="stable")[:missing]] += 1
    return whole


def farthest_rows(
    cluster: Integer[np.ndarray, " n"], distance: Float[np.ndarray, " n"], quota: Integer[np.ndarray, " k"]
) -> Bool[np.ndarray, " n"]:
    """Return which rows fill the quota of their cluster: those farthest from its center; of equals the first ones."""
    order = np.lexsort((-distance, cluster))
    begins = np.searchsorted(cluster[order], np.arange(len(quota)))
    chosen = np.zeros(len(cluster), bool)
    chosen[order] = np.arange(len(cluster)) - begins[cluster[order]] < quota[cluster[order]]
    return chosen


def cluster_curve(
    before: Float64[np.ndarray, " k"], after: Float64[np.ndarray, " k"], *, num_points: int = 20
) -> list[dict[str, float]]:
    """Return what share of all draws the largest 5, 10, ... 100 % of the clusters have, before and after weighing."""
    ends = np.ceil(np.arange(1, num_points + 1) / num_points * len(before)).astype(int) - 1
    held = [np.cumsum(np.sort(sums)[::-1])[ends] / sums.sum() for sums in (before, after)]
    return [
        {"clusters": number / num_points, "before": float(old), "after": float(new)}
        for number, old, new in zip(range(1, num_points + 1), *held, strict=True)
    ]
