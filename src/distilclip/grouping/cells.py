"""A partition of points into cells, and which points of other cells can lie within a distance of a cell.

For two centers a and b, the gap of a point x in cell a is |x - b|^2 - |x - a|^2, that is 2|a - b| times the distance of
x from the plane half way between. A segment from x to y in cell b crosses that plane at right angles for at least both
distances, so |x - y| < t needs gap(x) + gap(y) < 2 t |a - b|. It holds for any x and y, whatever the partition; a gap
may be negative.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import no_type_check

import numpy as np
import torch
from jaxtyping import BFloat16, Float32, Int, Int16
from numba import njit
from torch import Tensor

from distilclip.grouping._tiles import as_bits, with_lengths
from distilclip.vectors.kernels import SUM, product_error, squared_product, widened
from distilclip.vectors.threads import in_threads

BLOCK = 1024  # points compared with all centers at a time
POINTS_PER_CENTER = 16  # of the sample that the centers are fitted to
NUM_ROUNDS = 3  # of k-means; the partition need not be optimal, only good


Side = tuple[Int[np.ndarray, " k"], Int[np.ndarray, " k"]]  # of every cell, its first position and its last, plus 1


@dataclass(frozen=True, kw_only=True)
class Cells:
    """Points sorted by cell: `order[start[c]:start[c + 1]]` are those of cell c, and `z` holds them in that order.

    `z` has the columns of `tiles.with_lengths`.
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

    def sides(self, split: int) -> tuple[Side, Side]:
        """Of every cell, the positions of the points that come before the split, and of those that come after it."""
        # A cell holds its points in ascending order, so those before the split come first.
        middle = self.start[:-1] + np.diff(np.cumsum(np.append(0, self.order < split))[self.start])
        return (self.start[:-1], middle), (middle, self.start[1:])

    def within_reach(
        self,
        cell: int,
        distance: float,
        *,
        among: Side,
        found: Int[np.ndarray, " m"],
        image: Int16[np.ndarray, "m width"],
    ) -> Iterator[int]:
        """Points of later cells that may lie within a distance of a point of the cell, as many at a time as fit.

        Fills `found` with their positions and `image` with their rows of `z`, and yields how many there are.
        """
        z = as_bits(self.z)
        position = int(self.start[cell + 1])
        while position < len(z):
            position, count = _within_reach(
                cell,
                position,
                self.start,
                *among,
                z,
                self.centers,
                self.own,
                self.least_gap,
                self.between,
                np.float32(2 * distance * (1 + 1e-6)),
                np.float32(self.rounding),
                found,
                image,
            )
            if count:
                yield count


def partition(points: BFloat16[Tensor, "n width"], *, num_cells: int, radius: float) -> Cells:
    """Sort points, none longer than `radius`, into the cells of k-means centers. The same cells each time."""
    centers = _fit(points, num_cells)
    label = np.empty(len(points), np.int64)
    own = np.empty(len(points), np.float32)
    gaps = []

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
    order = np.argsort(label, kind="stable")
    return Cells(
        order=order,
        start=np.searchsorted(label[order], np.arange(len(centers) + 1)),
        z=with_lengths(points, torch.from_numpy(order)),
        centers=centers.numpy(),
        own=own[order],
        least_gap=np.minimum.reduce(gaps),
        between=torch.cdist(centers.double(), centers.double()).float().numpy(),
        rounding=4 * product_error(points.shape[1], radius),
    )


def _fit(points: BFloat16[Tensor, "n width"], num_cells: int) -> Float32[Tensor, "k width"]:
    """k-means on a sample, from evenly spaced points of it. A center without points stays where it is."""
    sample = points[:: max(1, len(points) // (num_cells * POINTS_PER_CENTER))].float()
    centers = sample[:: max(1, len(sample) // num_cells)][:num_cells].clone()
    label = np.empty(len(sample), np.int64)

    def assign(start: int, stop: int) -> None:
        for first in range(start, stop, BLOCK):
            here = slice(first, min(first + BLOCK, stop))
            label[here] = squared_product(sample[here], centers).numpy().argmin(axis=1)

    for _ in range(NUM_ROUNDS if num_cells > 1 else 0):
        in_threads(assign, len(sample), at_least=BLOCK)
        chosen = torch.from_numpy(label)
        count = torch.bincount(chosen, minlength=len(centers))[:, None]
        total = torch.zeros_like(centers).index_add_(0, chosen, sample)
        centers = torch.where(count > 0, total / count.clamp(min=1), centers)
    return centers


@njit(nogil=True, cache=True)
@no_type_check
def _lower_gaps(squared, label, own, least_gap):
    for i in range(len(label)):
        gap, row = least_gap[label[i]], squared[i]
        for c in range(len(row)):
            value = row[c] - own[i]
            gap[c] = value if value < gap[c] else gap[c]


@njit(nogil=True, cache=True, fastmath=SUM)
@no_type_check
def _within_reach(
    cell, position, start, first, last, z, centers, own, least_gap, between, twice, rounding, found, image
):
    """Fill `found` and `image`; returns where to go on and how many were found."""
    center = centers[cell]
    count = 0
    b = np.searchsorted(start, position, side="right") - 1
    while b < len(centers):
        limit = twice * between[cell, b] + rounding - least_gap[cell, b]
        if least_gap[b, cell] < limit:
            for i in range(max(position, first[b]), last[b]):
                squared = np.float32(0)
                for k in range(len(center)):
                    difference = widened(z[i, k]) - center[k]
                    squared += difference * difference
                if squared - own[i] < limit:
                    if count == len(found):
                        return i, count
                    found[count] = i
                    image[count] = z[i]
                    count += 1
        b += 1
    return len(z), count
