"""The first centers: rows drawn far from one another, from a sample (k-means++ in growing rounds)."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float32, Int

from distilclip.ops.assignment import Assignment, Known
from distilclip.ops.points import Points
from distilclip.ops.sketches import choose_contraction

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
    contraction = choose_contraction(points, rows, some)
    sketches = Assignment(some[:1], contraction, device=device).begin(points, rows).sketches
    chosen = np.empty(0, np.int64)
    nearest = np.full(len(rows), 2.0, np.float32)
    while len(chosen) < num_centers:
        count = min(max(1, len(chosen) // 4), num_centers - len(chosen))
        # The `count` smallest of Exponential / weight are a weighted draw without replacement. Weight 0 comes last.
        keys = random.exponential(size=len(rows)) / np.maximum(nearest.astype(np.float64), 1e-12)
        keys[chosen] = np.inf
        drawn = np.argpartition(keys, count - 1)[:count]
        drawn = drawn[np.argsort(keys[drawn], kind="stable")]
        assignment = Assignment(points.block(rows[drawn]).numpy(), contraction, device=device)
        nearest = np.minimum(nearest, assignment.update(Known.unlabelled(len(rows), sketches), points, rows))
        chosen = np.concatenate([chosen, drawn])
    return points.block(rows[chosen]).numpy()
