"""The nearest center of every row on the CPU: sketches propose, float64 decides.

A row first has the exact inner product with the center of the round before, or with the one that its sketch likes best.
A product of sketches bounds all others from above, and the few centers whose bound reaches that are compared in
float64. So the labels are those of all n x k inner products in float64, the first of equal ones. Rows pass through in
blocks; no n x k and no n x dim is ever held.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import no_type_check

import numpy as np
import torch
from jaxtyping import Float32, Int
from numba import njit

from distilclip.clustering.sketches import Sketches, product_of_bytes, product_of_floats
from distilclip.vectors.kernels import SUM, kernel_view, stored
from distilclip.vectors.points import Points
from distilclip.vectors.projection import Projection
from distilclip.vectors.threads import workers

BLOCK = 512  # rows compared at a time
BREADTH = 1024  # centers compared at a time: a tile of 2 MiB
RUN = 64  # neighbouring bounds looked at one by one once one of them is high; breadths are multiples of it
PROPOSALS = 1 << 15
SLACK = 1e-5  # of an inner product of unit vectors: sums in float32
ABSENT = np.float32(-1e30)  # the offset where there is no center


@dataclass(frozen=True, kw_only=True)
class CenterSketches:
    """Unit centers with their sketches, padded to whole runs."""

    centers: Float32[np.ndarray, "k dim"]
    sketches: Sketches
    offset: Float32[np.ndarray, " padded"]  # x . c = (x - mean) . (c - mean) + offset + x . mean

    @classmethod
    def of(cls, centers: Float32[np.ndarray, "k dim"], projection: Projection) -> CenterSketches:
        """Sketch unit centers."""
        slots = np.minimum(np.arange(-(-len(centers) // RUN) * RUN), len(centers) - 1)
        points = Points(values=centers, scale=np.ones(len(centers)), norm=np.ones(len(centers)))
        sketches = Sketches.of(projection, points, slots)
        offset = (sketches.along - float(projection.mean.double().square().sum())).astype(np.float32)
        offset[len(centers) :] = ABSENT
        return cls(centers=centers, sketches=sketches, offset=offset)


def update_labels(
    labels: Int[np.ndarray, " n"],
    sketches: Sketches,
    points: Points,
    rows: Int[np.ndarray, " n"],
    centers: CenterSketches,
) -> Float32[np.ndarray, " n"]:
    """Write each row's center of largest inner product; the cosine distances to them.

    `labels` are guesses, good ones save time; or -1 for all. `sketches` are the rows', by the centers' projection.
    """
    distance = np.empty(len(rows), np.float32)
    crew = [_Worker(labels, sketches, points, rows, centers, distance) for _ in range(torch.get_num_threads())]
    todo = iter(range(0, len(rows), BLOCK))  # shared: who is free takes the next
    with workers(len(crew)) as map_threads:
        map_threads(lambda worker: [worker.compare(first) for first in todo], crew)
    return distance


class _Worker:
    """One thread's part of an update, with its buffers."""

    def __init__(
        self,
        labels: np.ndarray,
        sketches: Sketches,
        points: Points,
        rows: np.ndarray,
        centers: CenterSketches,
        distance: np.ndarray,
    ) -> None:
        self._labels, self._sketches, self._points, self._rows = labels, sketches, points, rows
        self._centers, self._distance = centers, distance
        self._values = kernel_view(points.values)
        in_bytes = sketches.code.dtype == np.int8
        self._product = product_of_bytes if in_bytes else product_of_floats
        self._left, self._right = torch.from_numpy(sketches.code), torch.from_numpy(centers.sketches.code)
        self._out = torch.empty(BLOCK * BREADTH, dtype=torch.int32 if in_bytes else torch.float32)
        self._proposals = np.empty((2, PROPOSALS), np.int64), np.empty(PROPOSALS, np.float32)

    def compare(self, first: int) -> None:
        """Find the centers of the block of rows that starts there."""
        here = slice(first, min(first + BLOCK, len(self._rows)))
        rows, labels = self._rows[here], self._labels[here]
        step, along = self._sketches.step[here], self._sketches.along[here]
        if labels[0] < 0:  # then all are
            self._guess(here, labels)
        best = np.empty(len(rows))
        enough = np.empty(len(rows), np.float32)  # an inner product, less x . mean, that is reached
        values, scale, centers = self._values, self._points.scale, self._centers.centers
        _reach(values, scale, rows, labels, centers, along, best, enough)
        count = 0
        (which, center), bound = self._proposals
        for tile in self._tiles():
            products = self._products(here, tile)
            error = self._error(here, tile)
            position = 0
            while position < len(rows):
                position, count = _propose(
                    products, position, step, self._centers.sketches.step[tile], self._centers.offset[tile],
                    error, enough, tile.start, which, center, bound, count,
                )  # fmt: skip
                if position < len(rows) or tile.stop == len(self._right):  # the buffer is full, or this was all
                    found = which[:count], center[:count], bound[:count]
                    _decide(values, scale, rows, centers, along, *found, labels, best, enough)
                    count = 0
        self._distance[here] = np.maximum(1 - best, 0)

    def _tiles(self) -> list[slice]:
        stop = len(self._right)
        return [slice(start, min(start + BREADTH, stop)) for start in range(0, stop, BREADTH)]

    def _products(self, here: slice, tile: slice) -> np.ndarray:
        height, breadth = here.stop - here.start, tile.stop - tile.start
        return self._product(self._left[here], self._right[tile], self._out[: height * breadth].view(height, breadth))

    def _error(self, here: slice, tile: slice) -> Float32[np.ndarray, " m"]:
        """How far bytes may take a bound below what it must bound, for any center of a tile."""
        rows, centers = self._sketches, self._centers.sketches
        loss, longest = rows.residual[here], centers.length[tile].max()
        return loss * longest + (rows.length[here] + loss) * centers.residual[tile].max() + np.float32(SLACK)

    def _guess(self, here: slice, labels: np.ndarray) -> None:
        highest = np.full(len(labels), ABSENT)
        for tile in self._tiles():
            _lead(
                self._products(here, tile), self._sketches.step[here], self._centers.sketches.step[tile],
                self._centers.offset[tile], tile.start, highest, labels,
            )  # fmt: skip


@njit(nogil=True, cache=True, fastmath=SUM)
@no_type_check
def inner_product(row, factor, center):
    """x . c in float64."""
    total = 0.0
    for k in range(len(center)):
        total += stored(row[k]) * np.float64(center[k])
    return factor * total


@njit(nogil=True, cache=True)
@no_type_check
def _reach(values, scale, rows, labels, centers, along, best, enough):
    """The exact inner products with the rows' own centers."""
    for i in range(len(rows)):
        best[i] = inner_product(values[rows[i]], scale[rows[i]], centers[labels[i]])
        enough[i] = best[i] - along[i]


@njit(nogil=True, cache=True, fastmath=SUM)
@no_type_check
def _reaching(products, scale, step, offset, limit):
    """How many bounds of a row over a run of centers reach the limit: counting fills vector registers, max does not."""
    count = 0
    for j in range(len(step)):
        count += np.float32(products[j]) * (scale * step[j]) + offset[j] >= limit
    return count


@njit(nogil=True, cache=True)
@no_type_check
def _lead(products, row_step, step, offset, first, highest, labels):
    """Raise `highest` to the largest bound of each row and note whose it is."""
    for i in range(len(products)):
        scale = row_step[i]
        for start in range(0, len(step), RUN):
            run = slice(start, start + RUN)
            if _reaching(products[i, run], scale, step[run], offset[run], highest[i]):
                for j in range(start, start + RUN):
                    value = np.float32(products[i, j]) * (scale * step[j]) + offset[j]
                    if value > highest[i]:
                        highest[i], labels[i] = value, first + j


@njit(nogil=True, cache=True)
@no_type_check
def _propose(products, position, row_step, step, offset, error, enough, first, which, center, bound, count):
    """List the pairs whose bound reaches what the row has; returns where to go on and how many there are."""
    for i in range(position, len(products)):
        if count + len(step) > len(which):
            return i, count
        scale, limit = row_step[i], enough[i] - error[i]
        for start in range(0, len(step), RUN):
            run = slice(start, start + RUN)
            if _reaching(products[i, run], scale, step[run], offset[run], limit):
                for j in range(start, start + RUN):
                    value = np.float32(products[i, j]) * (scale * step[j]) + offset[j]
                    if value >= limit:
                        which[count], center[count], bound[count] = i, first + j, value + error[i]
                        count += 1
    return len(products), count


@njit(nogil=True, cache=True)
@no_type_check
def _decide(values, scale, rows, centers, along, which, center, bound, labels, best, enough):
    """Compare the pairs in float64; of equal centers the first wins."""
    for e in range(len(which)):
        i, j = which[e], center[e]
        if bound[e] >= enough[i] and j != labels[i]:
            exact = inner_product(values[rows[i]], scale[rows[i]], centers[j])
            if exact > best[i] or (exact == best[i] and j < labels[i]):
                best[i], labels[i] = exact, j
                enough[i] = max(enough[i], np.float32(exact - along[i]) - np.float32(SLACK))
