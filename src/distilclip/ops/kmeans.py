"""Spherical k-means: unit centers, rows assigned by the largest inner product (SPEC 1.2).

Rows stay where they are (half precision, memory maps) and pass through in tiles; the n x k products never exist.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import no_type_check

import numpy as np
import torch
from jaxtyping import Float, Int
from numba import njit
from torch import Tensor

from distilclip.errors import InputError
from distilclip.ops.points import SUM, Points, in_threads, kernel_view, stored

TILE = 4096  # rows and centers of a product: 64 MiB of float32
REPAIRS = 10  # further rounds, at most, for clusters found empty by the last assignment


@dataclass(frozen=True, kw_only=True)
class KMeans:
    """Unit centers, each row's cluster, and its cosine distance to that center; objective is the mean distance."""

    centers: Float[np.ndarray, "k dim"]
    labels: Int[np.ndarray, " n"]
    distance: Float[np.ndarray, " n"]
    objective: float

    @property
    def sizes(self) -> Int[np.ndarray, " k"]:
        """Rows in each cluster."""
        return np.bincount(self.labels, minlength=len(self.centers))

    @property
    def gini(self) -> float:
        """Inequality of the sizes: 0 when all are equal, towards 1 when one cluster holds everything."""
        return gini(self.sizes)

    @property
    def histogram(self) -> Int[np.ndarray, " b"]:
        """Clusters with 0 rows, 1, 2 to 3, 4 to 7, 8 to 15, ... rows."""
        return size_histogram(self.sizes)


def kmeans(
    x: np.ndarray | Tensor,
    *,
    num_centers: int,
    num_iterations: int = 20,
    seed: int = 0,
    points_per_center: int | None = None,
    device: str | torch.device | None = None,
) -> KMeans:
    """Cluster rows by direction.

    Args:
        x: rows of any nonzero length, float16, float32 or float64.
        num_centers: at most the number of rows.
        num_iterations: rounds of assignment and update; fewer when no row changes its cluster.
        seed: of the sample and of the first centers. Same seed, same result on one machine.
        points_per_center: fit on a sample of at most this many rows per center; default all. Every row is assigned
            at the end.
        device: where products are computed; default the CPU.

    Raises:
        InputError: more centers than rows, or a row that is zero or not finite.
    """
    points = Points.of(x, metric="cosine")
    if not 1 <= num_centers <= len(points):
        raise InputError(f"num_centers={num_centers} must lie between 1 and the number of rows, {len(points)}.")
    random = np.random.default_rng(seed)
    rows = np.arange(len(points))
    if points_per_center is not None and points_per_center * num_centers < len(rows):
        rows = np.sort(random.choice(len(rows), points_per_center * num_centers, replace=False))
    centers = first_centers(points, rows, num_centers=num_centers, random=random, device=device)
    labels = np.full(len(rows), -1)
    for iteration in range(num_iterations + REPAIRS):
        previous = labels
        labels, _ = assign(points, centers, rows=rows, device=device)
        sizes = np.bincount(labels, minlength=num_centers)
        settled = iteration >= num_iterations or np.array_equal(labels, previous)
        if settled and sizes.all():
            break
        centers = _means(points, rows, labels, sizes, centers)
        _split_heaviest(centers, sizes)
    labels, distance = assign(points, centers, device=device)
    return KMeans(
        centers=centers, labels=labels, distance=distance, objective=float(distance.astype(np.float64).mean())
    )


def assign(
    points: Points,
    centers: Float[np.ndarray, "k dim"],
    *,
    rows: Int[np.ndarray, " n"] | None = None,
    device: str | torch.device | None = None,
) -> tuple[Int[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """The center of largest inner product for every row, and the cosine distance to it; ties to the first center."""
    rows = np.arange(len(points)) if rows is None else rows
    labels = np.empty(len(rows), np.int64)
    distance = np.empty(len(rows), np.float32)
    all_centers = torch.from_numpy(centers).to(device)
    for start in range(0, len(rows), TILE):
        block = points.block(rows[start : start + TILE], device=all_centers.device)
        best = torch.full((len(block),), -torch.inf, device=block.device)
        label = torch.zeros(len(block), dtype=torch.int64, device=block.device)
        for first in range(0, len(centers), TILE):
            here, index = (block @ all_centers[first : first + TILE].T).max(dim=1)
            better = here > best
            best = torch.where(better, here, best)
            label = torch.where(better, index + first, label)
        labels[start : start + TILE] = label.cpu().numpy()
        distance[start : start + TILE] = (1 - best).clamp_(min=0).cpu().numpy()
    return labels, distance


def first_centers(
    points: Points,
    rows: Int[np.ndarray, " n"],
    *,
    num_centers: int,
    random: np.random.Generator,
    device: str | torch.device | None = None,
) -> Float[np.ndarray, "k dim"]:
    """k-means++ in growing rounds: each draws up to a quarter as many rows as are chosen already, with probability
    proportional to the squared distance (2 - 2cos) to the nearest chosen one, without replacement.

    One row at a time for the first few, about log k rounds over the rows afterwards (after k-means||, Bahmani et al.
    2012, whose oversampled candidates are kept as they are).
    """
    chosen = np.empty(0, np.int64)
    nearest = np.full(len(rows), 2.0, np.float32)
    while len(chosen) < num_centers:
        count = min(max(1, len(chosen) // 4), num_centers - len(chosen))
        # The `count` smallest of Exponential / weight are a weighted draw without replacement. Weight 0 comes last.
        keys = random.exponential(size=len(rows)) / np.maximum(nearest.astype(np.float64), 1e-12)
        keys[chosen] = np.inf
        drawn = np.argpartition(keys, count - 1)[:count]
        drawn = drawn[np.argsort(keys[drawn], kind="stable")]
        _, distance = assign(points, points.block(rows[drawn]).numpy(), rows=rows, device=device)
        nearest = np.minimum(nearest, distance)
        chosen = np.concatenate([chosen, drawn])
    return points.block(rows[chosen]).numpy()


def gini(sizes: Int[np.ndarray, " k"]) -> float:
    """The Gini coefficient of cluster sizes."""
    ordered = np.sort(sizes).astype(np.float64)
    rank = np.arange(1, len(ordered) + 1)
    total = ordered.sum()
    return float(((2 * rank - len(ordered) - 1) * ordered).sum() / (len(ordered) * total)) if total else 0.0


def size_histogram(sizes: Int[np.ndarray, " k"]) -> Int[np.ndarray, " b"]:
    """How many clusters have 0 rows, 1, 2 to 3, 4 to 7, ... rows."""
    # frexp's exponent is the number of binary digits: 0 for 0, 1 for 1, 2 for 2 and 3, ...
    return np.bincount(np.frexp(sizes)[1])


def _means(
    points: Points, rows: np.ndarray, labels: np.ndarray, sizes: np.ndarray, centers: np.ndarray
) -> Float[np.ndarray, "k dim"]:
    """The directions of the clusters' mean points, summed in float64 in the order of the rows; a cluster without
    rows, or whose rows cancel, keeps its center."""
    order = rows[np.argsort(labels, kind="stable")]
    stop = np.cumsum(sizes)
    result = centers.copy()
    values = kernel_view(points.values)
    in_threads(
        lambda a, b: _mean_directions(values, points.scale, order, stop[a:b] - sizes[a:b], stop[a:b], result[a:b]),
        len(centers),
    )
    return result


def _split_heaviest(centers: Float[np.ndarray, "k dim"], sizes: Int[np.ndarray, " k"]) -> None:
    """Give each empty cluster half of the heaviest one, in place: two centers a little to either side of it."""
    sizes = sizes.copy()
    for empty in np.flatnonzero(sizes == 0):
        heaviest = int(sizes.argmax())
        sizes[empty] = sizes[heaviest] // 2
        sizes[heaviest] -= sizes[empty]
        # A fixed direction that differs from cluster to cluster, small against the spread of any real cluster.
        direction = np.random.default_rng(empty).standard_normal(centers.shape[1], np.float32)
        step = direction * np.float32(1e-3 / centers.shape[1] ** 0.5)
        for index, side in ((empty, centers[heaviest] + step), (heaviest, centers[heaviest] - step)):
            centers[index] = side / np.linalg.norm(side)


@njit(nogil=True, cache=True, fastmath=SUM)
@no_type_check
def _mean_directions(values, scale, order, start, stop, out):
    total = np.empty(values.shape[1])
    for c in range(len(start)):
        total[:] = 0.0
        for i in order[start[c] : stop[c]]:
            for k in range(len(total)):
                total[k] += scale[i] * stored(values[i, k])
        length = np.sqrt((total * total).sum())
        if length > 0:
            out[c] = total / length
