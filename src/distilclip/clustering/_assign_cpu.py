"""Find the nearest center of every row on the CPU: sketches propose centers, float64 decides.

A row first has the exact inner product with the center of the round before, or with the one that its sketch likes best.
A product of sketches bounds all others from above, and the few centers whose bound reaches that are compared in
float64. So the labels are those of all n x k inner products in float64, the first of equal ones. Rows pass through in
blocks; no n x k and no n x dim is ever held.

Example: a row has the exact inner product 0.80 with its old center. The bounds of four centers are 0.95, 0.70, 0.85 and
0.60: only the first and the third can be better, and only they are computed in float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, no_type_check

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
    """Write each row's center of largest inner product; return the cosine distances to them.

    `labels` are guesses, good ones save time; or -1 for all. `sketches` are the rows', by the centers' projection.
    """
    distance = np.empty(len(rows), np.float32)
    crew = [_Worker(points, sketches, centers) for _ in range(torch.get_num_threads())]
    todo = iter(range(0, len(rows), BLOCK))  # shared: who is free takes the next

    def work(worker: _Worker) -> None:
        for first in todo:
            here = slice(first, min(first + BLOCK, len(rows)))
            distance[here] = worker.compare(here, rows[here], labels[here])

    with workers(len(crew)) as map_threads:
        map_threads(work, crew)
    return distance


# Kernels take these records as plain tuples: numba would compile them anew in each process for a class of ours.


class _Block(NamedTuple):
    """The m rows compared at a time, and what their sketches say of them."""

    values: np.ndarray  # [n, dim] all rows, as kernels take them
    scale: np.ndarray  # [n]
    rows: np.ndarray  # [m] which rows these are
    step: np.ndarray  # [m] of the codes
    along: np.ndarray  # [m] x . mean


class _Tile(NamedTuple):
    """The centers compared at a time."""

    first: int  # the number of the first one
    step: np.ndarray  # [b] of the codes
    offset: np.ndarray  # [b]


class _Best(NamedTuple):
    """The best center of each row of a block so far."""

    label: np.ndarray  # [m]
    product: np.ndarray  # [m] the exact inner product with it, float64
    reach: np.ndarray  # [m] that, less x . mean: what a bound must reach


class _Proposals(NamedTuple):
    """Pairs of a row of a block and a center that may be nearer than its best."""

    row: np.ndarray
    center: np.ndarray
    bound: np.ndarray  # of the inner product, less x . mean


class _Worker:
    """What one thread compares, with its buffers."""

    def __init__(self, points: Points, sketches: Sketches, centers: CenterSketches) -> None:
        self._values, self._scale = kernel_view(points.values), points.scale
        self._sketches, self._centers = sketches, centers
        in_bytes = sketches.code.dtype == np.int8
        self._product = product_of_bytes if in_bytes else product_of_floats
        self._left, self._right = torch.from_numpy(sketches.code), torch.from_numpy(centers.sketches.code)
        self._out = torch.empty(BLOCK * BREADTH, dtype=torch.int32 if in_bytes else torch.float32)
        buffers = np.empty((2, PROPOSALS), np.int64), np.empty(PROPOSALS, np.float32)
        self._proposals = _Proposals(row=buffers[0][0], center=buffers[0][1], bound=buffers[1])

    def compare(
        self, here: slice, rows: Int[np.ndarray, " m"], labels: Int[np.ndarray, " m"]
    ) -> Float32[np.ndarray, " m"]:
        """Write the labels of a block of rows, which are at `here` of the sketches; return the distances."""
        step, along = self._sketches.step[here], self._sketches.along[here]
        block = _Block(values=self._values, scale=self._scale, rows=rows, step=step, along=along)
        best = _Best(label=labels, product=np.empty(len(rows)), reach=np.empty(len(rows), np.float32))
        centers, tiles = self._centers.centers, self._tiles()
        # Begin with the guess, or without one (all labels -1, or none) with the center of the largest bound.
        if labels[0] < 0:
            best.reach[:] = ABSENT
            for place, tile in tiles:
                _guess(self._products(here, place), tuple(block), tuple(tile), tuple(best))
        _begin(tuple(block), centers, tuple(best))
        # Tile by tile: list the pairs that may be better, and decide once the buffer is full or the tiles are over.
        count = 0
        for place, tile in tiles:
            products, error = self._products(here, place), self._error(here, place)
            position = 0
            while position < len(rows):
                position, count = _propose(
                    products, position, tuple(block), tuple(tile), error, tuple(best), tuple(self._proposals), count
                )
                if position < len(rows) or place.stop == len(self._right):
                    _decide(tuple(block), centers, tuple(self._proposals), count, tuple(best))
                    count = 0
        return np.maximum(1 - best.product, 0).astype(np.float32)

    def _tiles(self) -> list[tuple[slice, _Tile]]:
        places = [slice(s, min(s + BREADTH, len(self._right))) for s in range(0, len(self._right), BREADTH)]
        step, offset = self._centers.sketches.step, self._centers.offset
        return [(place, _Tile(first=place.start, step=step[place], offset=offset[place])) for place in places]

    def _products(self, here: slice, place: slice) -> np.ndarray:
        height, breadth = here.stop - here.start, place.stop - place.start
        return self._product(self._left[here], self._right[place], self._out[: height * breadth].view(height, breadth))

    def _error(self, here: slice, place: slice) -> Float32[np.ndarray, " m"]:
        """Return how far codes may take a bound below what it must bound, for any center of a tile."""
        rows, centers = self._sketches, self._centers.sketches
        loss, longest = rows.residual[here], centers.length[place].max()
        return loss * longest + (rows.length[here] + loss) * centers.residual[place].max() + np.float32(SLACK)


@njit(nogil=True, cache=True, fastmath=SUM)
@no_type_check
def inner_product(row, factor, center):
    """Return x . c in float64."""
    total = 0.0
    for k in range(len(center)):
        total += stored(row[k]) * np.float64(center[k])
    return factor * total


@njit(nogil=True, cache=True)
@no_type_check
def _begin(block, centers, best):
    """Compute the exact inner products of the rows with the centers of their labels."""
    values, scale, rows, _, along = block
    label, product, reach = best
    for i in range(len(rows)):
        product[i] = inner_product(values[rows[i]], scale[rows[i]], centers[label[i]])
        reach[i] = product[i] - along[i]


@njit(nogil=True, cache=True, fastmath=SUM)
@no_type_check
def _count_reaching(products, scale, step, offset, limit):
    """Count the bounds of a row over a run of centers that reach the limit; unlike max, it fills vector registers."""
    count = 0
    for j in range(len(step)):
        count += np.float32(products[j]) * (scale * step[j]) + offset[j] >= limit
    return count


@njit(nogil=True, cache=True)
@no_type_check
def _guess(products, block, tile, best):
    """Label each row with the center of its largest bound, where one of this tile is larger than `best.reach`."""
    first, step, offset = tile
    labels, _, highest = best
    row_step = block[3]
    for i in range(len(products)):
        scale = row_step[i]
        for start in range(0, len(step), RUN):
            run = slice(start, start + RUN)
            if _count_reaching(products[i, run], scale, step[run], offset[run], highest[i]):
                for j in range(start, start + RUN):
                    value = np.float32(products[i, j]) * (scale * step[j]) + offset[j]
                    if value > highest[i]:
                        highest[i], labels[i] = value, first + j


@njit(nogil=True, cache=True)
@no_type_check
def _propose(products, position, block, tile, error, best, proposals, count):
    """List the pairs whose bound reaches what the row has; return the row to go on with, and how many are listed."""
    first, step, offset = tile
    row, center, bound = proposals
    row_step, reach = block[3], best[2]
    for i in range(position, len(products)):
        # A row may add a whole tile: stop before one for which there might be no room.
        if count + len(step) > len(row):
            return i, count
        scale, limit = row_step[i], reach[i] - error[i]
        for start in range(0, len(step), RUN):
            run = slice(start, start + RUN)
            # Most runs hold no candidate, and are left after a count.
            if _count_reaching(products[i, run], scale, step[run], offset[run], limit):
                for j in range(start, start + RUN):
                    value = np.float32(products[i, j]) * (scale * step[j]) + offset[j]
                    if value >= limit:
                        row[count], center[count], bound[count] = i, first + j, value + error[i]
                        count += 1
    return len(products), count


@njit(nogil=True, cache=True)
@no_type_check
def _decide(block, centers, proposals, count, best):
    """Compare the listed pairs in float64; of equal centers the first wins."""
    values, scale, rows, _, along = block
    row, center, bound = proposals
    label, product, reach = best
    for e in range(count):
        i, j = row[e], center[e]
        # `reach` has grown with every better center: some pairs are settled without being computed.
        if bound[e] >= reach[i] and j != label[i]:
            exact = inner_product(values[rows[i]], scale[rows[i]], centers[j])
            if exact > product[i] or (exact == product[i] and j < label[i]):
                product[i], label[i] = exact, j
                reach[i] = max(reach[i], np.float32(exact - along[i]) - np.float32(SLACK))
