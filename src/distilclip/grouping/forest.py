"""Reduce pairs of rows to a minimum spanning forest, and answer from it what any threshold would join.

A forest of at most n - 1 edges holds the groups (single linkage) at every threshold, so pairs are reduced to a forest
as they are found and never kept. Edges are ordered by (distance, left, right): the forest is then unique, and the
forest of a union of pairs is the forest of the union of their forests, in whatever order they arrive. Distances and
thresholds are compared as float32, so that cutting a forest at a threshold and searching at that threshold agree.

Five rows: a chain 0 -1- 1 -2- 2 -3- 3, a pair (0, 3) at 9 that closes a ring, and row 4 alone.

>>> left, right, distance = np.array([0, 1, 2, 0]), np.array([1, 2, 3, 3]), np.array([1, 2, 3, 9], np.float32)
>>> forest = spanning_forest(left, right, distance, num_rows=5)
>>> list(zip(forest.left.tolist(), forest.right.tolist(), forest.distance.tolist()))
[(0, 1, 1.0), (1, 2, 2.0), (2, 3, 3.0)]
>>> forest.below(3.0).groups().tolist()
[0, 0, 0, 3, 4]
>>> float(joining_distance(link_rows(forest), 0, 3))
3.0
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple, no_type_check

import numpy as np
from jaxtyping import Float, Int
from numba import njit

from distilclip.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Forest:
    """Edges of a minimum spanning forest over `num_rows` rows, sorted by (distance, left, right), left < right."""

    left: Int[np.ndarray, " e"]
    right: Int[np.ndarray, " e"]
    distance: Float[np.ndarray, " e"]
    num_rows: int

    def __len__(self) -> int:
        return len(self.left)

    def below(self, threshold: float) -> Forest:
        """Return the edges with distance < threshold: the forest of that threshold's pairs."""
        return self.at(slice(int(np.searchsorted(self.distance, np.float32(threshold), side="left"))))

    def at(self, edges: slice | Int[np.ndarray, " m"]) -> Forest:
        """Return some of the edges."""
        return replace(self, left=self.left[edges], right=self.right[edges], distance=self.distance[edges])

    def groups(self) -> Int[np.ndarray, " n"]:
        """Return of every row the smallest row of its group."""
        parent = np.arange(self.num_rows)
        _unite(self.left, self.right, parent)
        return parent


@dataclass(frozen=True, kw_only=True)
class Curve:
    """What each threshold would do: groups (single rows included), share removed, and the largest group."""

    threshold: Float[np.ndarray, " t"]
    num_groups: Int[np.ndarray, " t"]
    removed_ratio: Float[np.ndarray, " t"]
    largest_group: Int[np.ndarray, " t"]


class Links(NamedTuple):
    """The groups of a forest as trees of depth log n: the largest weight on the path between two rows joins them.

    `weight[i]` is that of the link from row i to `parent[i]`. Weights grow towards the root, whose own is infinite.
    `root[i]` is the root of row i and `top[i]` the last weight before it (0 for a root): these two answer most
    questions without a climb. Where no pair rules out another, the arrays are empty.
    """

    parent: Int[np.ndarray, " n"]
    weight: Float[np.ndarray, " n"]
    root: Int[np.ndarray, " n"]
    top: Float[np.ndarray, " n"]

    def rescale(self, change: Callable[[np.ndarray], np.ndarray]) -> Links:
        """Return the same links with every weight changed by a function that never decreases."""
        return self._replace(weight=change(self.weight), top=change(self.top))


NO_ROWS, NO_DISTANCES = np.empty(0, np.int64), np.empty(0, np.float32)
NO_LINKS = Links(parent=NO_ROWS, weight=NO_DISTANCES, root=NO_ROWS, top=NO_DISTANCES)


class ForestBuilder:
    """Reduces edges to their minimum spanning forest as they come, from any thread, in any order.

    At most about as many edges wait as the forest has, at least `batch`; so memory grows with the rows only.
    """

    def __init__(self, num_rows: int, *, batch: int = 1 << 16) -> None:
        self._batch = batch
        self._lock = threading.Lock()
        self._waiting: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self._num_waiting = 0
        self._forest = Forest(left=NO_ROWS, right=NO_ROWS, distance=NO_DISTANCES, num_rows=num_rows)
        self._links: Links | None = None

    @property
    def links(self) -> Links:
        """Which edges cannot be in the forest, as far as its last reduction knows."""
        with self._lock:
            if self._links is None:
                self._links = link_rows(self._forest)
            return self._links

    def add(self, left: Int[np.ndarray, " e"], right: Int[np.ndarray, " e"], distance: Float[np.ndarray, " e"]) -> None:
        """Take edges in."""
        with self._lock:
            self._waiting.append((left, right, distance))
            self._num_waiting += len(left)
            if self._num_waiting >= max(self._batch, len(self._forest)):
                self._reduce()

    def reduce(self) -> None:
        """Let `links` know of every edge added so far."""
        with self._lock:
            self._reduce()

    def forest(self) -> Forest:
        """Return the forest of every edge added so far."""
        self.reduce()
        return self._forest

    def _reduce(self) -> None:
        if not self._num_waiting:
            return
        forest = self._forest
        edges = [(forest.left, forest.right, forest.distance), *self._waiting]
        left, right, distance = (np.concatenate(column) for column in zip(*edges, strict=True))
        self._forest = spanning_forest(left, right, distance, num_rows=forest.num_rows)
        self._waiting, self._num_waiting = [], 0
        self._links = None  # made anew for whoever asks


def spanning_forest(
    left: Int[np.ndarray, " e"],
    right: Int[np.ndarray, " e"],
    distance: Float[np.ndarray, " e"],
    *,
    num_rows: int,
) -> Forest:
    """Return the minimum spanning forest of some edges (Kruskal)."""
    # 1. One order for all edges [e]: ties of the distance are broken by the rows, so that the forest is unique.
    left, right = np.minimum(left, right), np.maximum(left, right)
    order = np.lexsort((right, left, distance))
    left, right, distance = left[order], right[order], distance[order]
    # 2. Of the edges in that order, take each that joins two groups.
    chosen = _kruskal(left, right, np.arange(num_rows))
    return Forest(left=left[chosen], right=right[chosen], distance=distance[chosen], num_rows=num_rows)


def threshold_curve(forest: Forest, *, thresholds: Float[np.ndarray, " t"], num_valid: int) -> Curve:
    """Return groups, removed share and largest group at each threshold (ascending), in one pass over the forest."""
    # An edge of a forest always joins two groups, so the edges below a threshold [t] count the rows removed there.
    edges_below = np.searchsorted(forest.distance, thresholds.astype(np.float32), side="left")
    largest = largest_groups(forest.left, forest.right, num_rows=forest.num_rows)  # [e + 1]
    return Curve(
        threshold=np.asarray(thresholds, np.float64),
        num_groups=num_valid - edges_below,
        removed_ratio=edges_below / max(num_valid, 1),
        largest_group=np.minimum(largest[edges_below], num_valid),
    )


def threshold_for(forest: Forest, *, removed_ratio: float, num_valid: int) -> float:
    """Return the threshold whose removed share is nearest to the one asked for.

    Between two distinct distances of the forest every threshold gives the same groups; the smallest is returned.

    Raises:
        InputError: the forest ends before that share is removed.
    """
    wanted = removed_ratio * num_valid
    if wanted > len(forest):
        raise InputError(
            f"target_removed={removed_ratio!r} is out of reach: below the largest threshold searched only "
            f"{len(forest) / max(num_valid, 1):.4f} would be removed. Raise max_threshold."
        )
    # Rows removed by a threshold just above each distinct distance.
    values, first = np.unique(forest.distance, return_index=True)
    removed = np.append(first[1:], len(forest))
    best = int(np.abs(removed - wanted).argmin())
    return float(np.nextafter(values[best], np.float32(np.inf)))


def largest_groups(
    left: Int[np.ndarray, " e"], right: Int[np.ndarray, " e"], *, num_rows: int
) -> Int[np.ndarray, " e1"]:
    """Return the members of the largest group before any edge of a forest, and after each of them."""
    return _largest_after_each_edge(left, right, np.arange(num_rows))


def link_rows(forest: Forest) -> Links:
    """Return the links of a forest."""
    parent, weight = np.arange(forest.num_rows), np.full(forest.num_rows, np.inf, np.float32)
    _link_roots(forest.left, forest.right, forest.distance, parent, weight)
    root, top = parent.copy(), np.zeros(forest.num_rows, np.float32)
    _climb(parent, weight, root, top)
    return Links(parent=parent, weight=weight, root=root, top=top)


@njit(nogil=True, cache=True)
@no_type_check
def joining_distance(links, i, j):
    """Return the largest weight on the path between two rows; infinite where there is no path."""
    largest = np.float32(-np.inf)
    while i != j:
        # Climb from the row whose next link is lighter: weights grow upwards, so the paths meet at the first ancestor
        # that both have.
        if links.weight[j] < links.weight[i]:
            i, j = j, i
        if links.parent[i] == i:
            return np.float32(np.inf)
        largest = links.weight[i]
        i = links.parent[i]
    return largest


@njit(nogil=True, cache=True)
@no_type_check
def _find(parent, i):
    # Halve the path on the way: every row is hung under its grandparent.
    while parent[i] != i:
        parent[i] = parent[parent[i]]
        i = parent[i]
    return i


@njit(nogil=True, cache=True)
@no_type_check
def _unite(left, right, parent):
    # The smaller root wins, so a root is the smallest row of its group.
    for e in range(len(left)):
        a, b = _find(parent, left[e]), _find(parent, right[e])
        if a < b:
            parent[b] = a
        else:
            parent[a] = b
    for i in range(len(parent)):
        parent[i] = parent[parent[i]]  # parents are smaller, hence already roots


@njit(nogil=True, cache=True)
@no_type_check
def _kruskal(left, right, parent):
    chosen = np.zeros(len(left), np.bool_)
    for e in range(len(left)):
        a, b = _find(parent, left[e]), _find(parent, right[e])
        if a != b:
            parent[max(a, b)] = min(a, b)
            chosen[e] = True
    return chosen


@njit(nogil=True, cache=True)
@no_type_check
def _largest_after_each_edge(left, right, parent):
    # largest[e]: members of the largest group once the first e edges are in.
    size = np.ones(len(parent), np.int64)
    largest = np.ones(len(left) + 1, np.int64)
    for e in range(len(left)):
        a, b = _find(parent, left[e]), _find(parent, right[e])
        parent[max(a, b)] = min(a, b)
        size[min(a, b)] = size[a] + size[b]
        largest[e + 1] = max(largest[e], size[min(a, b)])
    return largest


@njit(nogil=True, cache=True)
@no_type_check
def _link_roots(left, right, distance, parent, weight):
    # Edges ascend and the smaller tree goes below the root of the larger, so no way up is longer than log2 n.
    size = np.ones(len(parent), np.int64)
    for e in range(len(left)):
        a, b = left[e], right[e]
        while parent[a] != a:
            a = parent[a]
        while parent[b] != b:
            b = parent[b]
        if size[a] > size[b]:
            a, b = b, a
        parent[a], weight[a] = b, distance[e]
        size[b] += size[a]


@njit(nogil=True, cache=True)
@no_type_check
def _climb(parent, weight, root, top):
    for i in range(len(parent)):
        a = i
        while parent[a] != a:
            top[i] = weight[a]
            a = parent[a]
        root[i] = a
