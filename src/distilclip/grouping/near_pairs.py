"""All pairs of rows closer than a threshold, exactly; and the k nearest of every row.

A product of tiles proposes, with a margin above its worst rounding error; a direct difference in float64 decides
(2 - 2cos cancels for near-duplicates, so no product is ever believed near the threshold). On the CPU `search` compares
few of the tiles and few of the dimensions; an accelerator compares all of them (`alltiles`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from distilclip.grouping.search_cpu import AllPairs, Collector, search
from distilclip.grouping.search_gpu import compare_all
from distilclip.vectors.kernels import squared_product
from distilclip.vectors.metric import distance
from distilclip.vectors.points import Points, distinct


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
    """The k nearest other rows of every row, nearest first; where fewer exist, row is -1 and distance infinite."""

    row: Int[np.ndarray, "n k"]
    distance: Float[np.ndarray, "n k"]


def pairs_within(
    x: np.ndarray | Tensor,
    *,
    threshold: float,
    metric: str,
    memory_gb: float | None = None,
    device: str | torch.device | None = None,
) -> Pairs:
    """Every pair of rows with distance < threshold.

    Args:
        x: rows, float16, float32 or float64; a memory map is read in place.
        threshold: in the metric's own unit, compared strictly, both rounded to float32.
        metric: `euclidean`, `sqeuclidean` or `cosine` (1 - cos; rows need not have unit length).
        memory_gb: working memory beyond the rows and the pairs themselves; default 1.
        device: where products are computed; default the CPU.

    Raises:
        InputError: a threshold that is not positive, an unknown metric, a row that is not finite.
    """
    points = Points.of(x, metric=metric)
    same = distinct(points.values, np.arange(len(points)))
    pairs = AllPairs()
    near_pairs(points, same.first, threshold=threshold, metric=metric, into=pairs, memory_gb=memory_gb, device=device)
    left, right, dist = _expand(*pairs.joined(), same.position, len(same.first))
    order = np.lexsort((right, left))
    return Pairs(left=left[order], right=right[order], distance=dist[order])


def near_pairs(
    points: Points,
    rows: Int[np.ndarray, " m"],
    *,
    threshold: float,
    metric: str,
    into: Collector,
    split: int | None = None,
    memory_gb: float | None = None,
    device: str | torch.device | None = None,
) -> None:
    """Hand the pairs among `rows` (ascending) closer than the threshold to `into`, save those its links rule out.

    With `split`, only pairs of one of `rows[:split]` and one of `rows[split:]`.
    """
    if as_device(device).type == "cpu":
        search(points, rows, threshold=threshold, metric=metric, into=into, memory_gb=memory_gb, split=split)
    else:
        size = tile_rows(points.dim, memory_gb, most=1 << 14)
        compare_all(
            points,
            rows,
            threshold=threshold,
            metric=metric,
            into=into,
            size=size,
            device=as_device(device),
            split=split,
        )


def nearest(
    points: Points,
    rows: Int[np.ndarray, " m"],
    *,
    k: int,
    metric: str,
    memory_gb: float | None = None,
    device: str | torch.device | None = None,
) -> Nearest:
    """The k nearest of every one of `rows` among `rows` (ascending), itself left out; ties to the smaller row.

    Chunk by chunk as in the paper: the k nearest of each chunk, merged to the global k nearest. Each chunk proposes a
    few more than k, so that the rounding of products cannot lose one where distances are apart; equal distances
    beyond those spare places are a tie that the product decides.
    """
    size = tile_rows(points.dim, memory_gb)
    row = np.full((len(rows), k), -1, np.int64)
    best = np.full((len(rows), k), np.inf, np.float32)
    for a in range(0, len(rows), size):
        queries = rows[a : a + size]
        query_block = points.block(queries, device=as_device(device))
        for b in range(0, len(rows), size):
            chunk = rows[b : b + size]
            squared = squared_product(query_block, points.block(chunk, device=as_device(device)))
            if a == b:
                squared.fill_diagonal_(torch.inf)
            proposed = squared.topk(min(k + 8, len(chunk)), largest=False).indices.cpu().numpy()
            left = np.repeat(queries, proposed.shape[1])
            right = chunk[proposed.reshape(-1)]
            dist = distance(points.squared(left, right), metric)
            dist[left == right] = np.inf
            here = slice(a, a + len(queries))
            row[here], best[here] = _merge_nearest(
                np.concatenate([row[here], right.reshape(proposed.shape)], axis=1),
                np.concatenate([best[here], dist.reshape(proposed.shape)], axis=1),
                k,
            )
    row[np.isinf(best)] = -1
    return Nearest(row=row, distance=best)


def tile_rows(dim: int, memory_gb: float | None, *, most: int = 4096) -> int:
    """Rows of a square tile: its product, the mask and two blocks of rows fit the budget."""
    budget = (1.0 if memory_gb is None else memory_gb) * 2**30 / 4
    per_row = 3 * dim * 4
    size = int((-per_row + (per_row**2 + 4 * 9 * budget) ** 0.5) / (2 * 9))
    return max(64, min(most, size))


def as_device(device: str | torch.device | None) -> torch.device:
    """The device named; the CPU where none is."""
    return torch.device("cpu" if device is None else device)


def _expand(
    left: np.ndarray, right: np.ndarray, dist: np.ndarray, position: np.ndarray, num_distinct: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pairs of distinct rows to pairs of all rows: every copy with every copy, and copies among themselves at 0."""
    members = np.argsort(position, kind="stable")
    count = np.bincount(position, minlength=num_distinct)
    start = np.cumsum(count) - count
    copied = np.flatnonzero(count > 1)
    a = np.concatenate([position[left], copied])
    b = np.concatenate([position[right], copied])
    dist = np.concatenate([dist, np.zeros(len(copied), np.float32)])
    product = count[a] * count[b]
    pair = np.repeat(np.arange(len(a)), product)
    within = np.arange(len(pair)) - np.repeat(np.cumsum(product) - product, product)
    i = members[start[a[pair]] + within // count[b[pair]]]
    j = members[start[b[pair]] + within % count[b[pair]]]
    keep = (a[pair] != b[pair]) | (i < j)
    return np.minimum(i, j)[keep], np.maximum(i, j)[keep], dist[pair][keep]


def _merge_nearest(row: np.ndarray, dist: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    order = np.lexsort((row, dist), axis=1)[:, :k]
    return np.take_along_axis(row, order, axis=1), np.take_along_axis(dist, order, axis=1)
