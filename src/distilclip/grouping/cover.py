"""Keep so many rows of each group that every row removed is near a row that is kept: a cover of the group.

Groups of single linkage join by chains, so the row kept for one may be far from its ends. Here the rows of a group are
looked at in the order of their distance to the mean of the group, the nearest first. A row is kept unless one that is
kept already is near it; a row that is removed belongs to the nearest one kept. So no two rows that are kept are near
each other, and where the row nearest to the mean is near all others, it alone is kept, as `representatives` does.

The rows 0, 1, 1.9 and 2.8 are joined by links shorter than 1.2. Their mean is 1.425: first comes 1.9, which is near 1
and 2.8, and then 0, which is not near 1.9.

>>> points = Points.of(np.array([[0.0], [1.0], [1.9], [2.8]]), metric="euclidean")
>>> chosen, squared = choose_cover(points, np.zeros(4, int), near=Tolerance(1.2, "euclidean"))
>>> chosen.tolist(), squared.round(2).tolist()
([0, 2, 2, 2], [0.0, 0.81, 0.0, 0.81])
>>> cells(chosen).tolist()
[0, 1, 1, 1]
"""

from __future__ import annotations

from typing import no_type_check

import numpy as np
from jaxtyping import Float, Int
from numba import njit

from distilclip.grouping.representatives import TIE, represent_themselves, several_members, squared_to_mean
from distilclip.vectors.kernels import SUM, kernel_view, stored
from distilclip.vectors.points import Points
from distilclip.vectors.threads import in_threads
from distilclip.vectors.tolerance import Tolerance

ROUNDING = 1e-9  # of distances to a mean, far above what float64 can be wrong
DIMS_AT_ONCE = 16  # dimensions after which a sum that is already too large ends


def choose_cover(
    points: Points, group: Int[np.ndarray, " n"], *, near: Tolerance
) -> tuple[Int[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """Return of every row the kept row that stands for it, and the squared distance to it (0 for itself).

    Args:
        points: the rows.
        group: of every row, the smallest row of its group; -1 for rows in no group, which get representative -1 and an
            infinite distance. Rows that are near each other must have the same group.
        near: how near a row that is removed is to the one kept for it.

    Only rows are compared whose distances to the mean allow that they are near (triangle inequality).
    """
    chosen, squared = represent_themselves(group)
    order, bounds, several = several_members(group)
    values, limit = kernel_view(points.values), near.largest_squared
    in_threads(
        lambda start, stop: _cover(values, points.scale, order, bounds, several[start:stop], limit, chosen, squared),
        len(several),
    )
    return chosen, squared


def cells(representative: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """Return of every row the smallest row that has the same representative; -1 where there is none."""
    used = np.flatnonzero(representative >= 0)
    smallest = np.full(len(representative), len(representative))
    np.minimum.at(smallest, representative[used], used)
    return np.where(representative >= 0, smallest[representative], -1)


@njit(nogil=True, cache=True, fastmath=SUM)
@no_type_check
def _cover(values, scale, order, bounds, groups, limit, chosen, squared):
    reach = np.sqrt(limit) * (1 + ROUNDING) + ROUNDING
    for g in groups:
        # 1. The members [m] by their distance to the mean; ties of rounding go to the smaller row.
        members = order[bounds[g] : bounds[g + 1]]
        from_mean = squared_to_mean(values, scale, members)
        from_mean = np.maximum(from_mean, from_mean.min() + TIE)
        by_distance = np.argsort(from_mean, kind="mergesort")
        members, far = members[by_distance], np.sqrt(from_mean[by_distance])
        # 2. Each is kept unless a kept one is near. Those kept so far are at[:num], their `far` ascends.
        at, num, low = np.empty(len(members), np.int64), 0, 0
        for a in range(len(members)):
            while low < num and far[at[low]] < far[a] - reach:
                low += 1
            is_near = False
            for k in range(num - 1, low - 1, -1):
                if _squared_within(values, scale, members[a], members[at[k]], limit) <= limit:
                    is_near = True
                    break
            if not is_near:
                at[num] = a
                num += 1
        # 3. Each belongs to the nearest kept one, the smaller row of two.
        low = 0
        for a in range(len(members)):
            while low < num and far[at[low]] < far[a] - reach:
                low += 1
            i, best = members[a], np.inf
            for k in range(low, num):
                if far[at[k]] > far[a] + reach:
                    break
                j = members[at[k]]
                total = 0.0 if i == j else _squared_within(values, scale, i, j, min(limit, best))
                if total <= limit and (total < best or (total == best and j < chosen[i])):
                    best, chosen[i], squared[i] = total, j, total


@njit(nogil=True, cache=True, fastmath=SUM)
@no_type_check
def _squared_within(values, scale, i, j, limit):
    # The squared distance of two rows, or a part of it that is above the limit.
    total = 0.0
    for start in range(0, values.shape[1], DIMS_AT_ONCE):
        for k in range(start, min(start + DIMS_AT_ONCE, values.shape[1])):
            difference = scale[i] * stored(values[i, k]) - scale[j] * stored(values[j, k])
            total += difference * difference
        if total > limit:
            return total
    return total
