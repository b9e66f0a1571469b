"""Explain what a balance did with one row: which row stands for it, and the chain of near rows that joins the two.

Rows at 0, 1 and 1.9 on a line, joined below 1.2. If row 0 stands for row 2, which is 1.9 away, then row 1 joins them:

>>> line = Forest(left=np.array([1, 0]), right=np.array([2, 1]), distance=np.array([0.9, 1.0], np.float32), num_rows=3)
>>> unit = {"threshold": 1.2, "metric": "euclidean"}
>>> why = explain_row(2, forest=line, members=np.arange(3), representative=0, distance=1.9, **unit)
>>> [(link.row, link.next_row) for link in why.chain], why.largest_link, why.chained
([(2, 1), (1, 0)], 1.0, True)
>>> print(why)
Row 2 is removed: row 0 of its group of 3 rows stands for it, at euclidean distance 1.9.
That is not below the threshold 1.2; a chain of 2 links joins them, the largest 1: 2 -0.9- 1 -1- 0
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int
from scipy.sparse import csr_array
from scipy.sparse.csgraph import breadth_first_order

from distilclip.grouping.forest import Forest
from distilclip.vectors.metric import Metric

MOST_LINKS_SHOWN = 12


@dataclass(frozen=True, kw_only=True)
class Link:
    """Two rows that are nearer to each other than the threshold."""

    row: int
    next_row: int
    distance: float


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """Why a row was removed, or that it is kept; print it for two lines of text."""

    row: int
    group: int
    """the smallest row of its group"""
    num_members: int
    """rows of the group"""
    representative: int
    """the row that stands for it, itself if it is kept"""
    distance: float
    """from the row to its representative, in the metric's unit"""
    threshold: float
    metric: Metric
    chain: tuple[Link, ...]
    """the links of the forest from the row to its representative, each below the threshold; none if it is kept"""

    @property
    def keep(self) -> bool:
        """Whether the row is its own representative."""
        return self.row == self.representative

    @property
    def chained(self) -> bool:
        """Whether only a chain of others joins the two: their own distance is not below the threshold."""
        return not self.keep and bool(np.float32(self.distance) >= np.float32(self.threshold))

    @property
    def largest_link(self) -> float:
        """The largest distance in the chain: below this threshold, the two would be apart. 0 if the row is kept."""
        return max((link.distance for link in self.chain), default=0.0)

    def __str__(self) -> str:
        if self.keep:
            what = f"stands for its group of {self.num_members} rows" if self.num_members > 1 else "is alone"
            return f"Row {self.row} is kept: it {what}."
        first = (
            f"Row {self.row} is removed: row {self.representative} of its group of {self.num_members} rows stands for "
            f"it, at {self.metric} distance {self.distance:.4g}."
        )
        links = "1 link" if len(self.chain) == 1 else f"{len(self.chain)} links"
        whether = "not below" if self.chained else "below"
        shown = "".join(f" -{link.distance:.4g}- {link.next_row}" for link in self.chain[:MOST_LINKS_SHOWN])
        more = len(self.chain) - MOST_LINKS_SHOWN
        rest = f" ... and {more} more" if more > 0 else ""
        largest = f"a chain of {links} joins them, the largest {self.largest_link:.4g}"
        return f"{first}\nThat is {whether} the threshold {self.threshold:.4g}; {largest}: {self.row}{shown}{rest}"


def explain_row(
    row: int,
    *,
    forest: Forest,
    members: Int[np.ndarray, " m"],
    representative: int,
    distance: float,
    threshold: float,
    metric: Metric,
) -> Explanation:
    """Return the explanation of a row, with its path to its representative through `forest`.

    Args:
        row: one of `members`.
        forest: of the links below the threshold.
        members: the rows of the row's group, ascending.
        representative: the row of the group that stands for it.
        distance: between the two.
        threshold: rows with a distance below it are joined.
        metric: unit of all distances.
    """
    return Explanation(
        row=row,
        group=int(members[0]),
        num_members=len(members),
        representative=representative,
        distance=distance,
        threshold=threshold,
        metric=metric,
        chain=_find_chain(row, representative, forest, members),
    )


def _find_chain(row: int, end: int, forest: Forest, members: Int[np.ndarray, " m"]) -> tuple[Link, ...]:
    # 1. The edges of this group, between places in `members`: a tree.
    inside = np.isin(forest.left, members)
    left, right = (np.searchsorted(members, side[inside]) for side in (forest.left, forest.right))
    distance = forest.distance[inside]
    # 2. From the representative outwards, every member's next one towards it.
    tree = csr_array((np.ones(len(left)), (left, right)), shape=(len(members), len(members)))
    start, goal = np.searchsorted(members, [row, end])
    towards = breadth_first_order(tree, goal, directed=False)[1]
    length = {(int(a), int(b)): float(d) for a, b, d in zip(left, right, distance, strict=True)}
    # 3. Along these to the representative.
    chain, here = [], int(start)
    while here != goal:
        there = int(towards[here])
        chain.append(
            Link(
                row=int(members[here]),
                next_row=int(members[there]),
                distance=length[min(here, there), max(here, there)],
            )
        )
        here = there
    return tuple(chain)
