"""Sort points into cells, and find the points of other cells that can lie within a distance of a cell.

For two centers a and b, the gap of a point x in cell a is |x - b|^2 - |x - a|^2, that is 2|a - b| times the distance of
x from the plane half way between. A segment from x to y in cell b crosses that plane at right angles for at least both
distances, so |x - y| < t needs gap(x) + gap(y) < 2 t |a - b|. It holds for any x and y, whatever the partition; a gap
may be negative.

Ten points on a line make three cells with the centers 1, 11 and 31.5. Which points of later cells may lie within 9.5 of
a point of the first cell? Its smallest gap towards 11 is that of 2: |2 - 11|^2 - |2 - 1|^2 = 80. The gap of 11 is 100,
and 80 + 100 < 2 * 9.5 * 10 = 190: it may. The gap of 12 is 120: it cannot.

>>> line = torch.tensor([0.0, 1, 2, 10, 11, 12, 30, 31, 32, 33]).bfloat16()[:, None]
>>> cells = partition(line, num_cells=3, radius=33.0)
>>> cells.centers[:, 0].tolist()
[1.0, 11.0, 31.5]
>>> found, rows = np.empty(4, np.int64), np.empty((4, cells.z.shape[1]), np.int16)
>>> counts = cells.reach(0, 9.5, among=cells.everyone(), found=found, rows=rows)
>>> [line[cells.order[found[:count]], 0].tolist() for count in counts]
[[10.0, 11.0]]
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, no_type_check

import numpy as np
import torch
from jaxtyping import BFloat16, Float32, Int, Int16
from numba import njit
from torch import Tensor

from distilclip.grouping._tiles import add_lengths, as_bits
from distilclip.vectors.kernels import SUM, product_error, squared_product, widened
from distilclip.vectors.threads import in_threads

BLOCK = 1024  # points compared with all centers at a time
POINTS_PER_CENTER = 16  # of the sample that the centers are fitted to
NUM_ROUNDS = 3  # of k-means; the partition need not be optimal, only good


class Side(NamedTuple):
    """The points of one side of a search: in cell c, those at positions `first[c]` to before `last[c]`."""

    first: Int[np.ndarray, " k"]
    last: Int[np.ndarray, " k"]


class _Table(NamedTuple):
    """What the compiled loop reads of `Cells`."""

    start: Int[np.ndarray, " k1"]
    z: Int16[np.ndarray, "n width4"]
    centers: Float32[np.ndarray, "k width"]
    own: Float32[np.ndarray, " n"]
    least_gap: Float32[np.ndarray, "k k"]
    between: Float32[np.ndarray, "k k"]


@dataclass(frozen=True, kw_only=True)
class Cells:
    """Points sorted by cell: `order[start[c]:start[c + 1]]` are those of cell c, and `z` holds them in that order.

    `z` has the columns of `_tiles.add_lengths`.
    """

    order: Int[np.ndarray, " n"]
    start: Int[np.ndarray, " k1"]
    z: BFloat16[Tensor, "n width4"]
    centers: Float32[np.ndarray, "k width"]
    own: Float32[np.ndarray, " n"]  # squared distance of each of `z` to its center
    least_gap: Float32[np.ndarray, "k k"]  # [a, b]: the smallest gap of a point in cell a towards center b
    between: Float32[np.ndarray, "k k"]  # distances of centers
    rounding: float  # bounds the error of a sum of two gaps

    def __len__(self) -> int:
        return len(self.centers)

    def everyone(self) -> Side:
        """Return all points as one side."""
        return Side(self.start[:-1], self.start[1:])

    def sides(self, split: int) -> tuple[Side, Side]:
        """Return the points that come before the split, and those that come after it."""
        # A cell holds its points in ascending order, so those before the split come first.
        middle = self.start[:-1] + np.diff(np.cumsum(np.append(0, self.order < split))[self.start])
        return Side(self.start[:-1], middle), Side(middle, self.start[1:])

    def reach(
        self,
        cell: int,
        distance: float,
        *,
        among: Side,
        found: Int[np.ndarray, " m"],
        rows: Int16[np.ndarray, "m width"],
    ) -> Iterator[int]:
        """Find the points of later cells that may lie within a distance of a point of the cell.

        Fills `found` with their positions and `rows` with their rows of `z`, as many as fit, yields how many there
        are, and goes on.
        """
        table = _Table(self.start, as_bits(self.z), self.centers, self.own, self.least_gap, self.between)
        twice, rounding = np.float32(2 * distance * (1 + 1e-6)), np.float32(self.rounding)
        position = int(self.start[cell + 1])
        while position < len(self.z):
            position, count = _reach(table, cell, position, among, twice, rounding, found, rows)
            if count:
                yield count


def partition(points: BFloat16[Tensor, "n width"], *, num_cells: int, radius: float) -> Cells:
    """Sort points, none longer than `radius`, into the cells of k-means centers. The same cells each time."""
    # 1. Centers [k, width] from a sample.
    centers = _fit(points, num_cells)
    label = np.empty(len(points), np.int64)
    own = np.empty(len(points), np.float32)
    gaps = []

    # 2. Each point's nearest center and its distance [n], and the smallest gaps of the cells [k, k], block by block.
    def compare(start: int, stop: int) -> None:
        least_gap = np.full((len(centers), len(centers)), np.inf, np.float32)
        for first in range(start, stop, BLOCK):
            here = slice(first, min(first + BLOCK, stop))
            squared = squared_product(points[here].float(), centers).numpy()
            label[here] = squared.argmin(axis=1)  # numpy's is vectorised, torch's is not
            own[here] = np.take_along_axis(squared, label[here, None], axis=1)[:, 0]
            _lower_gaps(squared, label[here], own[here], least_gap)
        gaps.append(least_gap)

    in_threads(compare, len(points), at_least=BLOCK)
    # 3. Points in the order of their cells, those of one cell in their own order.
    order = np.argsort(label, kind="stable")
    return Cells(
        order=order,
        start=np.searchsorted(label[order], np.arange(len(centers) + 1)),
        z=add_lengths(points, torch.from_numpy(order)),
        centers=centers.numpy(),
        own=own[order],
        least_gap=np.minimum.reduce(gaps),
        between=torch.cdist(centers.double(), centers.double()).float().numpy(),
        rounding=4 * product_error(points.shape[1], radius),
    )


def _fit(points: BFloat16[Tensor, "n width"], num_cells: int) -> Float32[Tensor, "k width"]:
    """Fit k-means centers to a sample, from evenly spaced points of it. A center without points stays where it is."""
    sample = points[:: max(1, len(points) // (num_cells * POINTS_PER_CENTER))].float()
    centers = sample[:: max(1, len(sample) // num_cells)][:num_cells].clone()
    label = np.empty(len(sample), np.int64)

    def assign(start: int, stop: int) -> None:
        for first in range(start, stop, BLOCK):
            here = slice(first, min(first + BLOCK, stop))
            label[here] = squared_product(sample[here], centers).numpy().argmin(axis=1)

    for _ in range(NUM_ROUNDS if num_cells > 1 else 0):
        # Assign every point to its nearest center, then move each center to the mean of its points.
        in_threads(assign, len(sample), at_least=BLOCK)
        chosen = torch.from_numpy(label)
        count = torch.bincount(chosen, minlength=len(centers))[:, None]
        total = torch.zeros_like(centers).index_add_(0, chosen, sample)
        centers = torch.where(count > 0, total / count.clamp(min=1), centers)
    return centers


@njit(nogil=True, cache=True)
@no_type_check
def _lower_gaps(squared, label, own, least_gap):
    # Lower a cell's smallest gap towards every center to the gap of each of its points.
    for i in range(len(label)):
        gap, row = least_gap[label[i]], squared[i]
        for c in range(len(row)):
            value = row[c] - own[i]
            gap[c] = value if value < gap[c] else gap[c]


@njit(nogil=True, cache=True, fastmath=SUM)
@no_type_check
def _reach(table, cell, position, among, twice, rounding, found, rows):
    """Fill `found` and `rows`; return where to go on and how many were found."""
    center = table.centers[cell]
    count = 0
    b = np.searchsorted(table.start, position, side="right") - 1  # the cell of the first point to look at
    while b < len(table.centers):
        # What is left of 2 t |a - b| for a point of cell b; if its smallest gap is too large, the cell is passed over.
        limit = twice * table.between[cell, b] + rounding - table.least_gap[cell, b]
        if table.least_gap[b, cell] < limit:
            for i in range(max(position, among.first[b]), among.last[b]):
                # The point's own gap towards the center of `cell`: |y - a|^2 - |y - b|^2.
                squared = np.float32(0)
                for k in range(len(center)):
                    difference = widened(table.z[i, k]) - center[k]
                    squared += difference * difference
                if squared - table.own[i] < limit:
                    if count == len(found):
                        return i, count
                    found[count] = i
                    rows[count] = table.z[i]
                    count += 1
        b += 1
    return len(table.z), count
