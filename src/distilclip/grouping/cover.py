"""Keep so many rows of each group that every row removed is near a row that is kept: a cover of the group.

Groups of single linkage join by chains, so the row kept for one may be far from its ends. Here the rows of a group are
looked at in the order of their distance to the mean of the group, the nearest first. A row is kept unless one that is
kept already is near it; a row that is removed belongs to the nearest one kept. So no two rows that are kept are near
each other, and where the row nearest to the mean is near all others, it alone is kept, as `representatives` does.

The rows 0, 1, 1.9 and 2.8 are joined by links shorter than 1.2. Their mean is 1.425: first comes 1, which is near 0
and 1.9, and last 2.8, which is not near 1.

>>> points = Points.of(np.array([[0.0], [1.0], [1.9], [2.8]]), metric="euclidean")
>>> chosen, squared = choose_cover(points, np.zeros(4, int), near=Tolerance(1.2, "euclidean"))
>>> chosen.tolist(), squared.round(2).tolist()
([1, 1, 1, 3], [1.0, 0.0, 0.81, 0.0])
>>> cells(chosen).tolist()
[0, 0, 0, 3]
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple, no_type_check

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
LARGE, BLOCK = 4096, 2048  # members from which on a group is shared among threads, and how many are looked at at a time


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
    values, scale, limit = kernel_view(points.values), points.scale, near.largest_squared
    is_large = np.diff(bounds)[several] >= LARGE
    small = several[~is_large]
    in_threads(
        lambda start, stop: _cover(values, scale, order, bounds, small[start:stop], limit, chosen, squared), len(small)
    )
    for g in several[is_large]:
        members, far = _by_distance(values, scale, order[bounds[g] : bounds[g + 1]])
        _cover_large(Ordered(values, scale, members, far, limit), chosen, squared)
    return chosen, squared


def cells(representative: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """Return of every row the smallest row that has the same representative; -1 where there is none."""
    used = np.flatnonzero(representative >= 0)
    smallest = np.full(len(representative), len(representative))
    np.minimum.at(smallest, representative[used], used)
    return np.where(representative >= 0, smallest[representative], -1)


class Ordered(NamedTuple):
    """The members of a group in the order of their distances to its mean, `far`, and what compares them."""

    values: np.ndarray  # [n, dim], of all rows
    scale: Float[np.ndarray, " n"]
    members: Int[np.ndarray, " m"]
    far: Float[np.ndarray, " m"]
    limit: float  # the largest squared distance that is near


def _cover_large(group: Ordered, chosen: Int[np.ndarray, " n"], squared: Float[np.ndarray, " n"]) -> None:
    """Cover one group as `_cover` does, with its rows shared among threads."""
    kept = np.empty(0, np.int64)
    for start in range(0, len(group.members), BLOCK):
        is_near = np.zeros(min(BLOCK, len(group.members) - start), np.bool_)
        in_threads(partial(_mark_near, group, kept, is_near, start), len(is_near))
        kept = np.concatenate([kept, _keep_rest(group, start + np.flatnonzero(~is_near))])
    in_threads(partial(_assign, group, kept, chosen, squared), len(group.members))


@njit(nogil=True, cache=True, fastmath=SUM)
@no_type_check
def _cover(values, scale, order, bounds, groups, limit, chosen, squared):
    for g in groups:
        members, far = _by_distance(values, scale, order[bounds[g] : bounds[g + 1]])
        group = Ordered(values, scale, members, far, limit)
        kept = _keep_rest(group, np.arange(len(members)))
        _assign(group, kept, chosen, squared, 0, len(members))


@njit(nogil=True, cache=True, fastmath=SUM)
@no_type_check
def _by_distance(values, scale, members):
    # The members by their distance to the mean, and that distance; ties of rounding go to the smaller row.
    from_mean = squared_to_mean(values, scale, members)
    from_mean = np.maximum(from_mean, from_mean.min() + TIE)
    by_distance = np.argsort(from_mean, kind="mergesort")
    return members[by_distance], np.sqrt(from_mean[by_distance])


# In the kernels below, `kept` and `places` are places in `group.members`, ascending, so that `far` ascends along them.


@njit(nogil=True, cache=True, fastmath=SUM)
@no_type_check
def _mark_near(group, kept, is_near, offset, start, stop):
    # Whether a kept member is near, for the members from offset + start to before offset + stop.
    distances, reach = group.far[kept], _reach(group.limit)
    for a in range(offset + start, offset + stop):
        low = np.searchsorted(distances, group.far[a] - reach)
        for k in range(len(kept) - 1, low - 1, -1):
            if _squared_within(group, group.members[a], group.members[kept[k]], group.limit) <= group.limit:
                is_near[a - offset] = True
                break


@njit(nogil=True, cache=True, fastmath=SUM)
@no_type_check
def _keep_rest(group, places):
    # Of some places, those that are kept: each that is near to none of them kept before.
    far, reach = group.far, _reach(group.limit)
    kept, num, low = np.empty(len(places), np.int64), 0, 0
    for a in places:
        while low < num and far[kept[low]] < far[a] - reach:
            low += 1
        is_near = False
        for k in range(num - 1, low - 1, -1):
            if _squared_within(group, group.members[a], group.members[kept[k]], group.limit) <= group.limit:
                is_near = True
                break
        if not is_near:
            kept[num] = a
            num += 1
    return kept[:num].copy()


@njit(nogil=True, cache=True, fastmath=SUM)
@no_type_check
def _assign(group, kept, chosen, squared, start, stop):
    # Of each member, the nearest kept one, the smaller row of two.
    distances, reach = group.far[kept], _reach(group.limit)
    for a in range(start, stop):
        i, best = group.members[a], np.inf
        for k in range(np.searchsorted(distances, group.far[a] - reach), len(kept)):
            if distances[k] > group.far[a] + reach:
                break
            j = group.members[kept[k]]
            total = 0.0 if i == j else _squared_within(group, i, j, min(group.limit, best))
            if total <= group.limit and (total < best or (total == best and j < chosen[i])):
                best, chosen[i], squared[i] = total, j, total


@njit(nogil=True, cache=True)
@no_type_check
def _reach(limit):
    return np.sqrt(limit) * (1 + ROUNDING) + ROUNDING


@njit(nogil=True, cache=True, fastmath=SUM)
@no_type_check
def _squared_within(group, i, j, limit):
    # The squared distance of two rows, or a part of it that is above the limit.
    values, scale, total = group.values, group.scale, 0.0
    for start in range(0, values.shape[1], DIMS_AT_ONCE):
        for k in range(start, min(start + DIMS_AT_ONCE, values.shape[1])):
            difference = scale[i] * stored(values[i, k]) - scale[j] * stored(values[j, k])
            total += difference * difference
        if total > limit:
            return total
    return total
