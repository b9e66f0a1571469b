"""Spherical k-means: unit centers, rows assigned by the largest inner product (SPEC 1.2).

Rows stay where they are (half precision, memory maps) and pass through in blocks; the n x k products never exist.
Labels are exact and sums of rows are whole numbers, so the centers do not depend on tiles, threads, or how the rows are
divided.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float32, Int
from torch import Tensor

from distilclip.clustering.assignment import Assignment, Known
from distilclip.clustering.sketches import choose_projection
from distilclip.clustering.sums import CenterSums
from distilclip.errors import InputError
from distilclip.vectors.points import Points

REPAIRS = 30  # further rounds, at most, for clusters found empty by the last assignment


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
    initial: Float[np.ndarray, "k dim"] | None = None,
    tolerance: float = 0.0,
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
        initial: first centers, of any nonzero length; default rows drawn by `seeding.first_centers`.
        tolerance: stop when the objective falls by less than this share of it; 0 goes on until nothing changes.
        device: where products are computed; default the CPU.

    Raises:
        InputError: more centers than rows or than directions among them, first centers of another shape, or a row that
            is zero or not finite.
    """
    points = Points.of(x, metric="cosine")
    check_num_centers(num_centers, len(points))
    random = np.random.default_rng(seed)
    rows, first = sample_rows(len(points), num_centers=num_centers, points_per_center=points_per_center, random=random)
    if initial is None:
        centers = first_centers(points, first, num_centers=num_centers, random=random, device=device)
    else:
        centers = _unit_centers(initial, (num_centers, points.dim))
    projection = choose_projection(points, rows, centers)
    known = Assignment(centers, projection, device=device).begin(points, rows)
    sums = CenterSums.zero(num_centers, points.dim)
    objectives: list[float] = []
    while True:
        before = known.labels.copy()
        assignment = Assignment(centers, projection, device=device)
        distance = assignment.update(known, points, rows)
        sums.move(points, rows, before, known.labels)
        objectives.append(sums.objective(centers))
        finished = is_finished(objectives, num_iterations, sums.count, tolerance=tolerance)
        if finished or not sums.renew(centers):
            break
    labels = known.labels
    if len(rows) < len(points):
        labels, distance = assignment.assign(points, np.arange(len(points)))
    return KMeans(
        centers=centers,
        labels=labels.astype(np.int64),
        distance=distance,
        objective=float(distance.astype(np.float64).mean()),
    )


def is_finished(
    objectives: Sequence[float], num_iterations: int, count: Int[np.ndarray, " k"], *, tolerance: float
) -> bool:
    """Whether the centers that rows were just assigned to are the last.

    `objectives` are those of all assignments so far, of which the first was to the first centers; `count` are the rows
    of each cluster. Empty clusters are split further, for a while, when the iterations are used up.
    """
    num_updates = len(objectives) - 1
    if not count.all():
        return num_updates >= num_iterations + REPAIRS
    slow = num_updates > 0 and objectives[-2] - objectives[-1] < tolerance * objectives[-2]
    return slow or num_updates >= num_iterations


def check_num_centers(num_centers: int, num_rows: int) -> None:
    """Raise `InputError` unless there is a row for each center."""
    if not 1 <= num_centers <= num_rows:
        raise InputError(f"num_centers={num_centers} must lie between 1 and the number of rows, {num_rows}.")


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


def _unit_centers(initial: Float[np.ndarray, "k dim"], shape: tuple[int, int]) -> Float32[np.ndarray, "k dim"]:
    if initial.shape != shape:
        raise InputError(f"initial has the shape {initial.shape}; {shape} is needed: num_centers x width of the rows.")
    centers = Points.of(initial, metric="cosine")
    return centers.block(np.arange(len(centers))).numpy()


ROWS_PER_CENTER = 4  # of the sample that first centers are drawn from; more make them no better
LEAST_ROWS = 1 << 14  # of that sample, where there are so many


def sample_rows(
    num_rows: int, *, num_centers: int, points_per_center: int | None, random: np.random.Generator
) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " m"]]:
    """The rows that centers are fitted to, and those among them that the first centers are drawn from; ascending."""
    rows = np.arange(num_rows)
    if points_per_center is not None and points_per_center * num_centers < num_rows:
        rows = np.sort(random.choice(num_rows, points_per_center * num_centers, replace=False))
    first = rows
    num_first = max(ROWS_PER_CENTER * num_centers, LEAST_ROWS)
    if num_first < len(rows):
        first = np.sort(random.choice(rows, num_first, replace=False))
    return rows, first


def first_centers(
    points: Points,
    rows: Int[np.ndarray, " n"],
    *,
    num_centers: int,
    random: np.random.Generator,
    device: str | torch.device | None = None,
) -> Float32[np.ndarray, "k dim"]:
    """k-means++ in growing rounds: each draws up to a quarter as many rows as are chosen already, with probability
    proportional to the squared distance (2 - 2cos) to the nearest chosen one, without replacement.

    One row at a time for the first few, about log k rounds over the rows afterwards (after k-means||, Bahmani et al.
    2012, whose oversampled candidates are kept as they are): n x k inner products in all.
    """
    some = points.block(rows[:: max(1, len(rows) // num_centers)]).numpy()
    projection = choose_projection(points, rows, some)
    sketches = Assignment(some[:1], projection, device=device).begin(points, rows).sketches
    chosen = np.empty(0, np.int64)
    nearest = np.full(len(rows), 2.0, np.float32)
    while len(chosen) < num_centers:
        count = min(max(1, len(chosen) // 4), num_centers - len(chosen))
        # The `count` smallest of Exponential / weight are a weighted draw without replacement. Weight 0 comes last.
        keys = random.exponential(size=len(rows)) / np.maximum(nearest.astype(np.float64), 1e-12)
        keys[chosen] = np.inf
        drawn = np.argpartition(keys, count - 1)[:count]
        drawn = drawn[np.argsort(keys[drawn], kind="stable")]
        assignment = Assignment(points.block(rows[drawn]).numpy(), projection, device=device)
        nearest = np.minimum(nearest, assignment.update(Known.unlabelled(len(rows), sketches), points, rows))
        chosen = np.concatenate([chosen, drawn])
    return points.block(rows[chosen]).numpy()
