"""Fit centers to rows by spherical k-means: draw first centers, then assign rows and move centers in rounds (SPEC 1.2).

Rows stay where they are (half precision, memory maps) and pass through in blocks; the n x k products never exist.
Labels are exact and sums of rows are whole numbers, so the centers do not depend on tiles, threads, or how the rows are
divided. `dc.kmeans` fits rows in memory, `distilclip cluster` a store in parts; both run the same loop, `fit_centers`.

Example: rows in the directions 0, 20 and 90 degrees with first centers at 0 and 90. Round 0 labels them 0, 0, 1, and
the mean distance is (0 + 0.0603 + 0) / 3 = 0.0201. The first center moves to 10 degrees; round 1 finds the same labels
and (0.0152 + 0.0152 + 0) / 3 = 0.0101, and as no center moves any more, the fit ends.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32, Int
from torch import Tensor

from distilclip.clustering.assignment import Assignment, RowState
from distilclip.clustering.fit_options import FitOptions
from distilclip.clustering.sketches import choose_projection
from distilclip.clustering.sums import CenterSums, Tally, split
from distilclip.devices import resolve_device
from distilclip.errors import InputError
from distilclip.vectors.points import Points, as_rows
from distilclip.vectors.projection import Projection

REPAIRS = 30  # further rounds, at most, for clusters found empty by the last assignment
ROWS_PER_CENTER = 4  # of the sample that first centers are drawn from; more make them no better
LEAST_ROWS = 1 << 14  # of that sample, where there are so many


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
    x: np.ndarray | Tensor | Sequence[Any],
    *,
    num_centers: int,
    num_iterations: int = 20,
    seed: int = 0,
    points_per_center: int | None = None,
    initial: np.ndarray | Tensor | Sequence[Any] | None = None,
    tolerance: float = 0.0,
    device: str | torch.device | None = None,
) -> KMeans:
    """Cluster rows by direction.

    Args:
        x: rows of any nonzero length, float16, float32 or float64; an array, a tensor or a list of rows. Only their
            directions count, so they need not be normalised.
        num_centers: at most the number of rows.
        num_iterations: rounds of assignment and update; fewer when no row changes its cluster.
        seed: of the sample and of the first centers. Same seed, same result on one machine.
        points_per_center: fit on a sample of at most this many rows per center; default all. Every row is assigned
            at the end.
        initial: first centers, of any nonzero length; default rows drawn by `first_centers`.
        tolerance: stop when the objective falls by less than this share of it; 0 goes on until nothing changes.
        device: where products are computed; default the CPU.

    Raises:
        InputError: a wrong option, more centers than rows or than directions among them, first centers of another
            shape, or a row that is zero or not finite.
    """
    options = FitOptions(
        num_centers=num_centers,
        num_iterations=num_iterations,
        tolerance=tolerance,
        points_per_center=points_per_center,
        seed=seed,
    )
    if device is not None and not isinstance(device, torch.device):
        device = resolve_device(device)
    points = Points.of(x, metric="cosine")
    start = start_fit(len(points), lambda rows: (points, rows), options, initial=initial, device=device)
    part = _RowsInMemory(points, start, device)
    fit_centers([], part.assign, part.move, options)
    labels, distance = part.state.labels, part.distance
    if len(start.rows) < len(points):  # the fit was on a sample: label all rows
        labels, distance = part.assignment.assign(points, np.arange(len(points)))
    return KMeans(
        centers=start.centers,
        labels=labels.astype(np.int64),
        distance=distance,
        objective=float(distance.astype(np.float64).mean()),
    )


class _RowsInMemory:
    """The rounds of rows in memory: one part, whose labels and sums stay here from round to round."""

    def __init__(self, points: Points, start: Start, device: torch.device | None) -> None:
        self._points, self._start, self._device = points, start, device
        self._sums = CenterSums.zero(*start.centers.shape)
        self.assignment = self._assignment()
        self.state = self.assignment.begin(points, start.rows)
        self.distance = np.empty(0, np.float32)

    def assign(self) -> Tally:
        """Label all rows; only those that changed their cluster are added up anew."""
        before = self.state.labels.copy()
        self.distance = self.assignment.update(self.state, self._points, self._start.rows)
        self._sums.move(self._points, self._start.rows, before, self.state.labels)
        return self._sums.tally(self._start.centers)

    def move(self, tally: Tally) -> bool:
        """Move the centers to their rows, in place; return whether any changed."""
        pairs = tally.splits()
        moved = self._sums.renew(self._start.centers, tally.length).any() or len(pairs) > 0
        split(self._start.centers, pairs)
        if moved:
            self.assignment = self._assignment()
        return bool(moved)

    def _assignment(self) -> Assignment:
        return Assignment(self._start.centers, self._start.projection, device=self._device)


@dataclass(frozen=True, kw_only=True)
class Start:
    """What a fit begins with: its rows (ascending), the first centers, and how rows are sketched."""

    rows: Int[np.ndarray, " n"]
    centers: Float32[np.ndarray, "k dim"]
    projection: Projection


def start_fit(
    num_rows: int,
    read: Callable[[Int[np.ndarray, " m"]], tuple[Points, Int[np.ndarray, " m"]]],
    options: FitOptions,
    *,
    initial: np.ndarray | Tensor | Sequence[Any] | None = None,
    device: torch.device | None = None,
) -> Start:
    """Choose the rows to fit to, and draw first centers from some of them unless `initial` are given.

    `read` returns the points that hold some rows, and where among these points the rows are.

    Raises:
        InputError: fewer rows than centers, or `initial` of another shape.
    """
    if options.num_centers > num_rows:
        raise InputError(f"num_centers={options.num_centers} must lie between 1 and the number of rows, {num_rows}.")
    random = np.random.default_rng(options.seed)
    rows, sample = sample_rows(num_rows, options, random)
    points, places = read(sample)
    if initial is None:
        centers = first_centers(points, places, num_centers=options.num_centers, random=random, device=device)
    else:
        centers = _unit_centers(initial, (options.num_centers, points.dim))
    return Start(rows=rows, centers=centers, projection=choose_projection(points, places, centers))


def fit_centers(
    objectives: list[float],
    assign: Callable[[], Tally],
    move: Callable[[Tally], bool],
    options: FitOptions,
    *,
    report: Callable[[float, int], None] = lambda objective, num_empty: None,
) -> None:
    """Move centers round by round until the fit is finished; the loop of all k-means here, which holds no centers.

    Args:
        objectives: of the rounds before; each round adds its own. Their number is the number of the round.
        assign: assigns all rows to the centers of the round.
        move: begins the next round with the centers that the rows ask for; returns whether any differs.
        options: when to stop.
        report: is told the objective and the number of empty clusters after each assignment.
    """
    while True:
        tally = assign()
        objectives.append(tally.objective)
        report(objectives[-1], tally.num_empty)
        # Centers that rows were just assigned to are the last ones, or else they move; if none can, they are, too.
        if is_finished(objectives, tally.count, options) or not move(tally):
            return


def is_finished(objectives: Sequence[float], count: Int[np.ndarray, " k"], options: FitOptions) -> bool:
    """Return whether the centers that rows were just assigned to are the last.

    `objectives` are those of all assignments so far, of which the first was to the first centers; `count` are the rows
    of each cluster. Empty clusters are split further, for a while, when the iterations are used up.
    """
    num_updates = len(objectives) - 1
    if not count.all():
        return num_updates >= options.num_iterations + REPAIRS
    slow = num_updates > 0 and objectives[-2] - objectives[-1] < options.tolerance * objectives[-2]
    return slow or num_updates >= options.num_iterations


def sample_rows(
    num_rows: int, options: FitOptions, random: np.random.Generator
) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " m"]]:
    """Return the rows that centers are fitted to, and those among them that first centers are drawn from; ascending."""
    num_centers, rows = options.num_centers, np.arange(num_rows)
    if options.points_per_center is not None and options.points_per_center * num_centers < num_rows:
        rows = np.sort(random.choice(num_rows, options.points_per_center * num_centers, replace=False))
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
    device: torch.device | None = None,
) -> Float32[np.ndarray, "k dim"]:
    """Draw first centers from rows, far apart: k-means++ in growing rounds.

    A round draws up to a quarter as many rows as are chosen already, with probability proportional to the squared
    distance (2 - 2cos) to the nearest chosen one, without replacement: one row at a time for the first few, about log k
    rounds over the rows afterwards, n x k inner products in all. After k-means|| (Bahmani et al. 2012), whose
    oversampled candidates are kept as they are.
    """
    some = points.block(rows[:: max(1, len(rows) // num_centers)]).numpy()
    projection = choose_projection(points, rows, some)
    sketches = Assignment(some[:1], projection, device=device).begin(points, rows).sketches
    chosen = np.empty(0, np.int64)
    nearest = np.full(len(rows), 2.0, np.float32)  # each row's distance to the nearest chosen row
    while len(chosen) < num_centers:
        count = min(max(1, len(chosen) // 4), num_centers - len(chosen))
        # The `count` smallest of Exponential / weight are a weighted draw without replacement. Weight 0 comes last.
        keys = random.exponential(size=len(rows)) / np.maximum(nearest.astype(np.float64), 1e-12)
        keys[chosen] = np.inf
        drawn = np.argpartition(keys, count - 1)[:count]
        drawn = drawn[np.argsort(keys[drawn], kind="stable")]
        # The drawn rows as centers: how near is each row to the nearest of them?
        assignment = Assignment(points.block(rows[drawn]).numpy(), projection, device=device)
        nearest = np.minimum(nearest, assignment.update(RowState.unlabelled(len(rows), sketches), points, rows))
        chosen = np.concatenate([chosen, drawn])
    return points.block(rows[chosen]).numpy()


def _unit_centers(initial: np.ndarray | Tensor | Sequence[Any], shape: tuple[int, int]) -> Float32[np.ndarray, "k dim"]:
    values = as_rows(initial)
    if values.shape != shape:
        raise InputError(f"initial has the shape {values.shape}; {shape} is needed: num_centers x width of the rows.")
    return Points.of(values, metric="cosine").block(np.arange(len(values))).numpy()


def gini(sizes: Int[np.ndarray, " k"]) -> float:
    """Return the Gini coefficient of cluster sizes: 0 for (5, 5), 0.75 for (0, 0, 0, 8)."""
    ordered = np.sort(sizes).astype(np.float64)
    rank = np.arange(1, len(ordered) + 1)
    total = ordered.sum()
    return float(((2 * rank - len(ordered) - 1) * ordered).sum() / (len(ordered) * total)) if total else 0.0


def size_histogram(sizes: Int[np.ndarray, " k"]) -> Int[np.ndarray, " b"]:
    """Return how many clusters have 0 rows, 1, 2 to 3, 4 to 7, ... rows."""
    # frexp's exponent is the number of binary digits: 0 for 0, 1 for 1, 2 for 2 and 3, ...
    return np.bincount(np.frexp(sizes)[1])
