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
>>> cells.gaps.centers[:, 0].tolist()
[1.0, 11.0, 31.5]
>>> found, rows = np.empty(4, np.int64), np.empty((4, cells.z.shape[1]), np.int16)
>>> limits = cells.gaps.limits(9.5, range(3))
>>> counts = cells.reach(0, limits[0], found=found, rows=rows)
>>> [line[cells.order[found[:count]], 0].tolist() for count in counts]
[[10.0, 11.0]]
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, no_type_check

import numpy as np
import torch
from jaxtyping import BFloat16, Bool, Float32, Int, Int16
from numba import njit
from torch import Tensor

from distilclip.grouping._tiles import add_lengths, as_bits
from distilclip.vectors.kernels import SUM, product_error, squared_product, widened
from distilclip.vectors.threads import in_threads

BLOCK = 1024  # points compared with all centers at a time
POINTS_PER_CENTER = 16  # of the sample that the centers are fitted to
NUM_ROUNDS = 3  # of k-means; the partition need not be optimal, only good


class _Table(NamedTuple):
    """What the compiled loop reads of `Cells`."""

    start: Int[np.ndarray, " c1"]
    z: Int16[np.ndarray, "n width4"]
    own: Float32[np.ndarray, " n"]


@dataclass(frozen=True, kw_only=True)
class Gaps:
    """What the cells of a partition say of the gaps of their points.

    There are k cells, or 2k: then cell k + c has the center of cell c and holds the points that look for no neighbours.
    """

    centers: Float32[np.ndarray, "k width"]
    least: Float32[np.ndarray, "c k"]  # [a, b]: the smallest gap of a point in cell a towards center b
    rounding: float  # bounds the error of a sum of two gaps

    @classmethod
    def of(cls, centers: Float32[np.ndarray, "k width"], least: Float32[np.ndarray, "c k"], *, radius: float) -> Gaps:
        """Take gaps of points no longer than `radius`."""
        return cls(centers=centers, least=least, rounding=4 * product_error(centers.shape[1], radius))

    def limits(self, distance: float, cells: range) -> Float32[np.ndarray, "q c"]:
        """Return for each of some of the first k cells and every cell what lies within a distance of both.

        A point y of cell b may be that near to a point of cell a only if its gap towards a is below the limit [a, b],
        which is what 2 t |a - b| leaves beside the smallest gap of a. Where no point of b has such a gap, it is -inf.
        """
        here = slice(cells.start, cells.stop)
        centers = torch.from_numpy(self.centers).double()
        between = torch.cdist(centers[here], centers).float().numpy()
        limit = np.float32(2 * distance * (1 + 1e-6)) * between + np.float32(self.rounding) - self.least[here]
        limit = np.tile(limit, len(self.least) // len(self.centers))
        limit[limit <= self.least[:, here].T] = -np.inf
        return limit


@dataclass(frozen=True, kw_only=True)
class Cells:
    """Points sorted by cell: `order[start[c]:start[c + 1]]` are those of cell c, and `z` holds them in that order.

    The first `num_seeking` of them look for neighbours among themselves and the others. `z` has the columns of
    `_tiles.add_lengths`.
    """

    order: Int[np.ndarray, " n"]
    start: Int[np.ndarray, " c1"]
    z: BFloat16[Tensor, "n width4"]
    own: Float32[np.ndarray, " n"]  # squared distance of each of `z` to its center
    gaps: Gaps
    num_seeking: int
    num_met: int = 0  # so many of the first were compared with each other before

    @classmethod
    def of(
        cls,
        points: BFloat16[Tensor, "n width"],
        label: Int[np.ndarray, " n"],
        own: Float32[np.ndarray, " n"],
        *,
        gaps: Gaps,
        seeking: Bool[np.ndarray, " n"],
        num_met: int = 0,
    ) -> Cells:
        """Put points in the order of their cells; of a cell those that seek first, and otherwise as they come."""
        order = np.lexsort((~seeking, label))
        return cls(
            order=order,
            start=np.searchsorted(label[order], np.arange(len(gaps.least) + 1)),
            z=add_lengths(points, torch.from_numpy(order)),
            own=own[order],
            gaps=gaps,
            num_seeking=int(seeking.sum()),
            num_met=num_met,
        )

    def seeking(self, cell: int) -> range:
        """Return the positions of the points of a cell that look for neighbours."""
        return range(min(int(self.start[cell]), self.num_seeking), min(int(self.start[cell + 1]), self.num_seeking))

    def reach(
        self,
        cell: int,
        limit: Float32[np.ndarray, " c"],
        *,
        found: Int[np.ndarray, " m"],
        rows: Int16[np.ndarray, "m width"],
    ) -> Iterator[int]:
        """Find the points behind those of the cell that seek that may be near one of these, by the cell's limits.

        Fills `found` with their positions and `rows` with their rows of `z`, as many as fit, yields how many there
        are, and goes on.
        """
        table = _Table(self.start, as_bits(self.z), self.own)
        position = max(self.seeking(cell).stop, self.num_met)
        while position < len(self.z):
            position, count = _reach(
                table, self.gaps.centers[cell % len(self.gaps.centers)], limit, position, found, rows
            )
            if count:
                yield count


def partition(points: BFloat16[Tensor, "n width"], *, num_cells: int, radius: float, num_searched: int = 0) -> Cells:
    """Sort points, none longer than `radius`, into the cells of k-means centers. The same cells each time.

    The first `num_searched` points look for no neighbours.
    """
    centers = fit_centers(points, num_cells)
    seeking = np.arange(len(points)) >= num_searched
    label, own, gaps = assign_cells(points, centers, radius=radius, seeking=seeking)
    return Cells.of(points, label, own, gaps=gaps, seeking=seeking)


def assign_cells(
    points: BFloat16[Tensor, "n width"],
    centers: Float32[Tensor, "k width"],
    *,
    radius: float,
    seeking: Bool[np.ndarray, " n"],
) -> tuple[Int[np.ndarray, " n"], Float32[np.ndarray, " n"], Gaps]:
    """Return of every point its cell and the squared distance to its center; and what the cells say of gaps.

    There are k cells if all points seek, else 2k.
    """
    num_cells = len(centers) * (1 if seeking.all() else 2)
    label = np.empty(len(points), np.int64)
    own = np.empty(len(points), np.float32)
    tables = []

    # Each point's nearest center and its distance [n], and the smallest gaps of the cells [c, k], block by block.
    def compare(start: int, stop: int) -> None:
        least = np.full((num_cells, len(centers)), np.inf, np.float32)
        for first in range(start, stop, BLOCK):
            here = slice(first, min(first + BLOCK, stop))
            squared = squared_product(points[here].float(), centers).numpy()
            nearest = squared.argmin(axis=1)  # numpy's is vectorised, torch's is not
            own[here] = np.take_along_axis(squared, nearest[:, None], axis=1)[:, 0]
            label[here] = np.where(seeking[here], nearest, nearest + len(centers))
            _lower_gaps(squared, label[here], own[here], least)
        tables.append(least)

    in_threads(compare, len(points), at_least=BLOCK)
    return label, own, Gaps.of(centers.numpy(), np.minimum.reduce(tables), radius=radius)


def fit_centers(points: BFloat16[Tensor, "n width"], num_cells: int) -> Float32[Tensor, "k width"]:
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
def _reach(table, center, limit, position, found, rows):
    """Fill `found` and `rows`; return where to go on and how many were found."""
    count = 0
    b = np.searchsorted(table.start, position, side="right") - 1  # the cell of the first point to look at
    while b < len(limit):
        if limit[b] > -np.inf:  # else its smallest gap is too large, and the cell is passed over
            for i in range(max(position, table.start[b]), table.start[b + 1]):
                # The point's own gap towards the center: |y - a|^2 - |y - b|^2.
                squared = np.float32(0)
                for k in range(len(center)):
                    difference = widened(table.z[i, k]) - center[k]
                    squared += difference * difference
                if squared - table.own[i] < limit[b]:
                    if count == len(found):
                        return i, count
                    found[count] = i
                    rows[count] = table.z[i]
                    count += 1
        b += 1
    return len(table.z), count
