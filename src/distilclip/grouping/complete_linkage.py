"""Join groups only where all their rows are near each other: complete linkage, within what chains of near rows join.

Two groups are joined while the farthest two rows of both are near, the nearest two groups first. Of equal distances,
those are taken that SciPy's chain of nearest neighbours meets first, rows in their order.

The answer is a forest, as that of single linkage is: an edge joins the smallest rows of two groups at the distance of
the farthest two. So its edges below any threshold join the groups of that threshold.

The rows 0, 1, 1.9 and 2.8 are joined by links shorter than 1.2. First 1 and 1.9 are joined, and 2.8 with neither of
them left is 1.8 from that group:

>>> points = Points.of(np.array([[0.0], [1.0], [1.9], [2.8]]), metric="euclidean")
>>> parent, squared = link_completely(points, np.zeros(4, int))
>>> parent.tolist(), np.sqrt(squared).round(2).tolist()
([0, 0, 1, 1], [0.0, 2.8, 0.9, 1.8])
"""

from __future__ import annotations

from functools import partial
from typing import no_type_check

import numpy as np
from jaxtyping import Bool, Float, Int
from numba import njit
from scipy.cluster.hierarchy import linkage

from distilclip.errors import InputError
from distilclip.grouping.forest import Forest, largest_groups, spanning_forest
from distilclip.grouping.representatives import Represent, represent_themselves, several_members
from distilclip.vectors.kernels import SUM
from distilclip.vectors.points import Points
from distilclip.vectors.threads import in_threads
from distilclip.vectors.tolerance import Tolerance

THREAD_ROWS = 128  # at least, with half of their pairs, for each thread
MOST_ROWS = 10_000
"""Rows that chains may join, copies counted once: all their distances take 0.8 GB."""


def complete_forest(
    forest: Forest, valid: Bool[np.ndarray, " n"], *, needed: float, near: Tolerance, represent: Represent
) -> tuple[Forest, float]:
    """Return the forest of complete linkage, and up to which threshold it reaches: that of `near`, or what fits.

    Args:
        forest: of single linkage. Rows that it joins at distance 0 are one row here.
        valid: rows that belong to a group.
        needed: the threshold that it must reach; 0 for any.
        near: how near rows are that are joined, at most.
        represent: reads the rows.

    Raises:
        InputError: chains join more rows than fit, at the threshold that is needed.
    """
    # 1. The rows that are at no distance from a smaller one count once.
    copies = forest.at(slice(int(np.searchsorted(forest.distance, 0, side="right"))))
    first = copies.groups()
    counted = valid & (first == np.arange(len(first)))
    reach = min(near.threshold, _largest_fitting(forest, len(copies), first))
    if reach < needed:
        raise InputError(
            f"rule=complete compares all rows that chains join, and below {needed:g} one chain joins "
            f"{np.bincount(forest.below(needed).groups()[counted]).max():,} (copies counted once); {MOST_ROWS:,} fit. "
            f"Use rule=cover, or a threshold of at most {reach:.6g}."
        )
    near = Tolerance(reach, near.metric)
    # 2. Link what chains join below that, and keep the links below it.
    group = np.where(counted, forest.below(reach).groups(), -1)
    parent, squared = represent(link_completely, group)
    rows = np.flatnonzero((parent >= 0) & (parent != np.arange(len(parent))))
    distance = near.distance_of(squared[rows])
    rows, distance = rows[near.includes(distance)], distance[near.includes(distance)]
    left, right = np.append(copies.left, parent[rows]), np.append(copies.right, rows)
    return spanning_forest(left, right, np.append(copies.distance, distance), num_rows=len(group)), reach


def _largest_fitting(forest: Forest, num_copies: int, first: Int[np.ndarray, " n"]) -> float:
    """Return the largest threshold at which no chain joins more than `MOST_ROWS` rows; infinite where none does."""
    longer = forest.at(slice(num_copies, None))
    sizes = largest_groups(first[longer.left], first[longer.right], num_rows=len(first))  # [e + 1]
    edge = int(np.searchsorted(sizes, MOST_ROWS, side="right"))  # after this many edges, a chain is too long
    return float(longer.distance[edge - 1]) if edge < len(sizes) else np.inf


def link_completely(
    points: Points, group: Int[np.ndarray, " n"]
) -> tuple[Int[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """Return of every row the smaller row that it hangs on, and at which squared distance their groups are joined.

    The smallest row of a group hangs on itself. Below any distance, rows that hang together are a group of complete
    linkage.

    Args:
        points: the rows.
        group: of every row, the smallest row of what is linked with it; -1 for rows that hang on none.
    """
    parent, squared = represent_themselves(group)
    order, bounds, several = several_members(group)
    for g in several:
        members = order[bounds[g] : bounds[g + 1]]
        apart = _distances(points, members)
        if len(members) == 2:
            parent[members[1]], squared[members[1]] = members[0], apart[0]
        else:
            _hang(linkage(apart, "complete"), members, parent, squared)
    return parent, squared


def _distances(points: Points, members: Int[np.ndarray, " m"]) -> Float[np.ndarray, " pairs"]:
    """Return the squared distances of all pairs: the first row with all after it, then the second, and so on."""
    num = len(members)
    rows = points.scale[members, None] * points.values[members].astype(np.float64)
    apart = np.empty(num * (num - 1) // 2)
    in_threads(partial(_measure, rows, apart), (num + 1) // 2, at_least=THREAD_ROWS)
    return apart


@njit(nogil=True, cache=True, fastmath=SUM)
@no_type_check
def _measure(rows, apart, start, stop):
    # A row from the front and one from the back together have as many pairs as any other two.
    num, dim = rows.shape
    for front in range(start, stop):
        back = num - 1 - front
        for i in (front, back) if back > front else (front, num - 1):  # the last row has no pair of its own
            at = i * num - i * (i + 1) // 2 - i - 1
            for j in range(i + 1, num):
                total = 0.0
                for k in range(dim):
                    total += (rows[i, k] - rows[j, k]) ** 2
                apart[at + j] = total


@njit(nogil=True, cache=True)
@no_type_check
def _hang(merges, members, parent, squared):
    # Each line of `merges` joins two groups, single rows first, then those of the lines before.
    num = len(members)
    smallest = np.empty(2 * num - 1, np.int64)
    smallest[:num] = members
    for line in range(num - 1):
        a, b = smallest[int(merges[line, 0])], smallest[int(merges[line, 1])]
        smallest[num + line] = min(a, b)
        parent[max(a, b)], squared[max(a, b)] = min(a, b), merges[line, 2]
