"""The row kept of each group: nearest to the group's mean; and further ones where a group is wider than a radius."""

from __future__ import annotations

from collections.abc import Callable
from typing import no_type_check

import numpy as np
from jaxtyping import Float, Int
from numba import njit

from distilclip.ops.metric import squared_threshold
from distilclip.ops.points import SUM, Points, in_threads, kernel_view, stored

# Two members of a pair are equally far from their mean; rounding must not choose between them, the smaller row must.
TIE = 1e-12


def representatives(
    points: Points,
    group: Int[np.ndarray, " n"],
    *,
    metric: str,
    max_radius: float | None = None,
) -> tuple[Int[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """Of every row, the representative that stands for it, and the squared distance to it (0 for itself).

    Args:
        points: the rows.
        group: of every row, the smallest row of its group; -1 for rows in no group, which get representative -1.
        metric: the unit of `max_radius`.
        max_radius: members farther than this from every representative of their group are covered by more: again and
            again the uncovered member nearest to the mean of the uncovered becomes one. A member belongs to the
            nearest representative.

    Returns the representative and the squared distance, infinite where there is none. Reads each row of the groups
    with more than one member a few times, group by group, and keeps one mean per thread.
    """
    alone = np.arange(len(group))
    chosen = np.where(group < 0, -1, alone)
    squared = np.where(group < 0, np.inf, 0.0)
    order = np.argsort(group, kind="stable")
    order = order[np.searchsorted(group[order], 0) :]
    first = np.flatnonzero(np.diff(group[order], prepend=-1))
    bounds = np.append(first, len(order))
    several = np.flatnonzero(np.diff(bounds) > 1)
    limit = np.inf if max_radius is None else squared_threshold(max_radius, metric) * (1 + 1e-7)
    values = kernel_view(points.values)
    in_threads(
        lambda start, stop: _choose(
            values, points.scale, order, bounds, several[start:stop], limit, TIE, chosen, squared
        ),
        len(several),
    )
    return chosen, squared


def representatives_in_batches(
    take: Callable[[Int[np.ndarray, " m"]], Float[np.ndarray, "m dim"]],
    group: Int[np.ndarray, " n"],
    *,
    metric: str,
    batch_rows: int,
    max_radius: float | None = None,
) -> tuple[Int[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """The same for rows that do not fit into memory: `take` reads those of several groups at a time.

    A batch holds whole groups, at most `batch_rows` rows unless one group has more. Rows alone in their group are not
    read.
    """
    alone = np.arange(len(group))
    chosen = np.where(group < 0, -1, alone)
    squared = np.where(group < 0, np.inf, 0.0)
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
        found, squared[rows] = representatives(
            Points.of(take(rows), metric=metric), local, metric=metric, max_radius=max_radius
        )
        chosen[rows] = rows[found]
        begin = end
    return chosen, squared


@njit(nogil=True, cache=True, fastmath=SUM)
@no_type_check
def _choose(values, scale, order, bounds, groups, limit, tie, chosen, squared):
    for g in groups:
        members = order[bounds[g] : bounds[g + 1]]
        squared[members] = np.inf
        uncovered = members
        while len(uncovered):
            center = _nearest_to_mean(values, scale, uncovered, tie)
            for i in members:
                total = 0.0
                for k in range(values.shape[1]):
                    difference = scale[i] * stored(values[i, k]) - scale[center] * stored(values[center, k])
                    total += difference * difference
                if total < squared[i]:
                    squared[i], chosen[i] = total, center
            squared[center], chosen[center] = 0.0, center
            uncovered = uncovered[squared[uncovered] > limit]


@njit(nogil=True, cache=True, fastmath=SUM)
@no_type_check
def _nearest_to_mean(values, scale, members, tie):
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
    least = squared.min()
    for m in range(len(members)):
        if squared[m] <= least + tie:
            return members[m]
    return members[0]
