"""Find all pairs of rows closer than a threshold, exactly, and the k nearest rows of every row.

A product of tiles proposes, with a margin above its worst rounding error; a direct difference in float64 decides. For
near copies 2 - 2cos cancels, so no product is ever believed near the threshold. On the CPU `search_cpu` compares few of
the tiles and few of the dimensions; on an accelerator `search_gpu` compares all of them.

>>> x = np.array([[0.0, 0.0], [3.0, 4.0], [3.0, 4.5]])
>>> pairs = pairs_within(x, threshold=5.0, metric="euclidean")  # rows 0 and 1 are 5 apart, and 5 < 5 is false
>>> pairs.left.tolist(), pairs.right.tolist(), pairs.distance.tolist()
([1], [2], [0.5])
"""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from distilclip.devices import resolve_device
from distilclip.errors import InputError
from distilclip.grouping.search_cpu import AllPairs, Collector, search
from distilclip.grouping.search_gpu import compare_all
from distilclip.vectors.kernels import squared_product
from distilclip.vectors.metric import Metric
from distilclip.vectors.points import Points, distinct
from distilclip.vectors.tolerance import Tolerance


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Pairs of rows, each once with left < right, sorted; `distance` in the metric's own unit."""

    left: Int[np.ndarray, " m"]
    right: Int[np.ndarray, " m"]
    distance: Float[np.ndarray, " m"]

    def __len__(self) -> int:
        return len(self.left)


@dataclass(frozen=True, kw_only=True)
class Nearest:
    """The k nearest other rows of every row, nearest first; where fewer are near, row is -1 and distance infinite."""

    row: Int[np.ndarray, "n k"]
    distance: Float[np.ndarray, "n k"]


def pairs_within(
    x: np.ndarray | Tensor | Sequence[Any],
    *,
    threshold: float,
    metric: Metric,
    memory_gb: float | None = None,
    device: str | torch.device | None = None,
) -> Pairs:
    """Return every pair of rows with distance < threshold.

    Args:
        x: rows, as an array or tensor of float16, float32 or float64, or as lists; a memory map is read in place.
        threshold: in the metric's own unit, compared strictly, both rounded to float32.
        metric: `euclidean`, `sqeuclidean` or `cosine` (1 - cos; rows need not have unit length).
        memory_gb: working memory beyond the rows and the pairs themselves; default 1.
        device: where products are computed; default the CPU.

    Raises:
        InputError: a threshold that is not positive, an unknown metric, a row that is not finite.
    """
    tolerance = Tolerance(threshold, metric)
    points = Points.of(x, metric=metric)
    # 1. Search among the distinct rows only.
    same = distinct(points.values, np.arange(len(points)))
    found = AllPairs()
    near_pairs(points, same.first, tolerance, into=found, memory_gb=memory_gb, device=device)
    # 2. Give every copy the pairs of its original, and sort.
    left, right, distance = _expand(*found.joined(), same.position, len(same.first))
    order = np.lexsort((right, left))
    return Pairs(left=left[order], right=right[order], distance=distance[order])


def near_pairs(
    points: Points,
    rows: Int[np.ndarray, " m"],
    tolerance: Tolerance,
    *,
    into: Collector,
    num_searched: int = 0,
    memory_gb: float | None = None,
    device: str | torch.device | None = None,
) -> None:
    """Hand the near pairs among `rows` (ascending) to `into`, save those that its links rule out.

    Pairs of two of the first `num_searched` rows are left out.
    """
    check_budget(memory_gb)
    where = as_device(device)
    if where.type == "cpu":
        search(points, rows, tolerance, into=into, memory_gb=memory_gb, num_searched=num_searched)
    else:
        size = tile_rows(points.dim, memory_gb, most=1 << 14)
        compare_all(points, rows, tolerance, into=into, size=size, device=where, num_searched=num_searched)


def nearest(
    points: Points,
    rows: Int[np.ndarray, " m"],
    tolerance: Tolerance,
    *,
    k: int,
    memory_gb: float | None = None,
    device: str | torch.device | None = None,
) -> Nearest:
    """Return of every one of `rows` (ascending) its k nearest among the others that are near; ties to the smaller row.

    Chunk by chunk as in the paper: the k nearest of each chunk, merged to the global k nearest. Each chunk proposes a
    few more than k, so that the rounding of products cannot lose one where distances are apart; equal distances
    beyond those spare places are a tie that the product decides.
    """
    size, where = tile_rows(points.dim, memory_gb), as_device(device)
    row = np.full((len(rows), k), -1, np.int64)
    best = np.full((len(rows), k), np.inf, np.float32)
    for a in range(0, len(rows), size):
        queries = rows[a : a + size]
        query_block = points.block(queries, device=where)
        for b in range(0, len(rows), size):
            # 1. A tile [a, b] of squared distances by a product proposes k + 8 rows of the chunk to every query.
            chunk = rows[b : b + size]
            squared = squared_product(query_block, points.block(chunk, device=where))
            if a == b:
                squared.fill_diagonal_(torch.inf)
            proposed = squared.topk(min(k + 8, len(chunk)), largest=False).indices.cpu().numpy()
            # 2. Their distances in float64 [a * (k + 8)].
            left = np.repeat(queries, proposed.shape[1])
            right = chunk[proposed.reshape(-1)]
            distance = tolerance.distance_of(points.squared(left, right))
            distance[left == right] = np.inf
            # 3. The k best of these and of those of earlier chunks.
            here = slice(a, a + len(queries))
            row[here], best[here] = _merge_nearest(
                np.concatenate([row[here], right.reshape(proposed.shape)], axis=1),
                np.concatenate([best[here], distance.reshape(proposed.shape)], axis=1),
                k,
            )
    far = ~tolerance.includes(best)
    row[far], best[far] = -1, np.inf
    return Nearest(row=row, distance=best)


def tile_rows(dim: int, memory_gb: float | None, *, most: int = 4096) -> int:
    """Return the rows of a square tile whose product, mask and two blocks of rows fit the budget."""
    check_budget(memory_gb)
    budget = (1.0 if memory_gb is None else memory_gb) * 2**30 / 4
    per_row = 3 * dim * 4
    size = int((-per_row + (per_row**2 + 4 * 9 * budget) ** 0.5) / (2 * 9))
    return max(64, min(most, size))


def check_budget(memory_gb: float | None) -> None:
    """Raise `InputError` unless the budget is a positive number, or left to the default."""
    if memory_gb is not None and not (isinstance(memory_gb, numbers.Real) and memory_gb > 0):
        raise InputError(f"memory_gb={memory_gb!r}: a budget is a positive number.")


def as_device(device: str | torch.device | None) -> torch.device:
    """Return the device named; the CPU where none is."""
    return device if isinstance(device, torch.device) else resolve_device(device or "cpu")


def _expand(
    left: np.ndarray, right: np.ndarray, dist: np.ndarray, position: np.ndarray, num_distinct: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Turn pairs of distinct rows into pairs of all rows: every copy with every copy, copies among themselves at 0.

    `position` gives every row's place among the distinct rows. With rows 0 and 2 equal and row 1 near them, the pair
    (0, 1) of the distinct rows becomes (0, 1), (1, 2) and, at distance 0, (0, 2).
    """
    # 1. The copies of distinct row d are members[start[d] : start[d] + count[d]].
    members = np.argsort(position, kind="stable")
    count = np.bincount(position, minlength=num_distinct)
    start = np.cumsum(count) - count
    # 2. Pairs (a, b) of distinct rows; a distinct row with copies pairs with itself.
    copied = np.flatnonzero(count > 1)
    a = np.concatenate([position[left], copied])
    b = np.concatenate([position[right], copied])
    dist = np.concatenate([dist, np.zeros(len(copied), np.float32)])
    # 3. Each of these stands for count[a] * count[b] pairs (i, j), counted through by `within`.
    product = count[a] * count[b]
    pair = np.repeat(np.arange(len(a)), product)
    within = np.arange(len(pair)) - np.repeat(np.cumsum(product) - product, product)
    i = members[start[a[pair]] + within // count[b[pair]]]
    j = members[start[b[pair]] + within % count[b[pair]]]
    # 4. Of a row with itself and of (i, j) beside (j, i), keep one.
    keep = (a[pair] != b[pair]) | (i < j)
    return np.minimum(i, j)[keep], np.maximum(i, j)[keep], dist[pair][keep]


def _merge_nearest(row: np.ndarray, dist: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Keep of every query's candidates [n, m] the k nearest, ties to the smaller row."""
    order = np.lexsort((row, dist), axis=1)[:, :k]
    return np.take_along_axis(row, order, axis=1), np.take_along_axis(dist, order, axis=1)
