"""Choose of each group the row that is kept: the one nearest to the mean of the group.

The rows 0, 1 and 1.9 have the mean 0.967, so 1 stands for them. Of the pair 10 and 10.5 both are equally far from the
mean: the smaller row, 10, is kept.

>>> points = Points.of(np.array([[0.0], [1.0], [1.9], [10.0], [10.5]]), metric="euclidean")
>>> chosen, squared = choose_representatives(points, np.array([0, 0, 0, 3, 3]))
>>> chosen.tolist(), squared.round(2).tolist()
([1, 1, 1, 3, 3], [1.0, 0.0, 0.81, 0.0, 0.25])
"""

from __future__ import annotations

from collections.abc import Callable
from typing import no_type_check

import numpy as np
from jaxtyping import Float, Int
from numba import njit

from distilclip.vectors.kernels import SUM, kernel_view, stored
from distilclip.vectors.points import Points
from distilclip.vectors.threads import in_threads

# Chooses of some rows and the group of each the representative of every row, and the squared distance to it.
Choose = Callable[[Points, np.ndarray], tuple[np.ndarray, np.ndarray]]

# Of a way to choose, and of every row's group (its smallest row, -1 for none): the representative and the squared
# distance to it. It reads the rows.
Represent = Callable[[Choose, np.ndarray], tuple[np.ndarray, np.ndarray]]

# Two members of a pair are equally far from their mean; rounding must not choose between them, the smaller row must.
TIE = 1e-12


def choose_representatives(
    points: Points, group: Int[np.ndarray, " n"]
) -> tuple[Int[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """Return of every row the representative that stands for it, and the squared distance to it (0 for itself).

    Args:
        points: the rows.
        group: of every row, the smallest row of its group; -1 for rows in no group, which get representative -1 and an
            infinite distance.

    Reads each row of the groups with more than one member a few times, group by group, and keeps one mean per thread.
    """
    chosen, squared = represent_themselves(group)
    order, bounds, several = several_members(group)
    values = kernel_view(points.values)
    in_threads(
        lambda start, stop: _choose(values, points.scale, order, bounds, several[start:stop], chosen, squared),
        len(several),
    )
    return chosen, squared


def choose_in_batches(
    choose: Choose,
    take: Callable[[Int[np.ndarray, " m"]], Points],
    group: Int[np.ndarray, " n"],
    *,
    batch_rows: int,
) -> tuple[Int[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """Choose the same rows as `choose`, for rows that do not fit into memory.

    `take` reads the rows of some groups at a time: a batch holds whole groups, at most `batch_rows` rows unless one
    group has more. Rows alone in their group are not read.
    """
    chosen, squared = represent_themselves(group)
    # Members of groups of several rows, in the order of their groups; group g is members[starts[g] : stops[g]].
    size = np.bincount(group[group >= 0], minlength=len(group))
    members = np.flatnonzero((group >= 0) & (size[group] > 1))
    members = members[np.argsort(group[members], kind="stable")]
    starts = np.flatnonzero(np.diff(group[members], prepend=-1))
    stops = np.append(starts[1:], len(members))
    begin = 0
    while begin < len(starts):
        end = max(begin + 1, int(np.searchsorted(stops, starts[begin] + batch_rows, side="right")))
        rows = np.sort(members[starts[begin] : stops[end - 1]])
        local = np.searchsorted(rows, group[rows])  # a group is called after its smallest row, which is among them
        found, squared[rows] = choose(take(rows), local)
        chosen[rows] = rows[found]
        begin = end
    return chosen, squared


def represent_themselves(group: Int[np.ndarray, " n"]) -> tuple[Int[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """Let every row of a group stand for itself."""
    return np.where(group < 0, -1, np.arange(len(group))), np.where(group < 0, np.inf, 0.0)


def several_members(
    group: Int[np.ndarray, " n"],
) -> tuple[Int[np.ndarray, " m"], Int[np.ndarray, " bounds"], Int[np.ndarray, " g"]]:
    """Return the rows in the order of their groups, where each group begins and ends there, and the groups of several.

    Group g is `order[bounds[g] : bounds[g + 1]]`, its rows ascending; rows of no group are left out.
    """
    order = np.argsort(group, kind="stable")
    order = order[np.searchsorted(group[order], 0) :]
    bounds = np.append(np.flatnonzero(np.diff(group[order], prepend=-1)), len(order))
    return order, bounds, np.flatnonzero(np.diff(bounds) > 1)


@njit(nogil=True, cache=True, fastmath=SUM)
@no_type_check
def _choose(values, scale, order, bounds, groups, chosen, squared):
    for g in groups:
        members = order[bounds[g] : bounds[g + 1]]
        # 1. The first member that is as near to the mean as the nearest, up to rounding.
        from_mean = squared_to_mean(values, scale, members)
        center = members[np.argmax(from_mean <= from_mean.min() + TIE)]
        # 2. The squared distance of every member to it.
        for i in members:
            total = 0.0
            for k in range(values.shape[1]):
                difference = scale[i] * stored(values[i, k]) - scale[center] * stored(values[center, k])
                total += difference * difference
            squared[i], chosen[i] = total, center
        squared[center] = 0.0


@njit(nogil=True, cache=True, fastmath=SUM)
@no_type_check
def squared_to_mean(values, scale, members):
    """Return the squared distance [m] of every member to the mean of all."""
    mean = np.zeros(values.shape[1])
    for i in members:
        for k in range(len(mean)):
            mean[k] += scale[i] * stored(values[i, k])
    mean /= len(members)
    squared = np.zeros(len(members))
    for m in range(len(members)):
        i = members[m]
        total = 0.0
        for k in range(len(mean)):
            difference = scale[i] * stored(values[i, k]) - mean[k]
            total += difference * difference
        squared[m] = total
    return squared
