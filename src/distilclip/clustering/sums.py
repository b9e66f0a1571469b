"""Sum the rows of each cluster in fixed point: whole numbers, so that no order of adding changes a bit.

A coordinate of a unit vector counts in steps of 2^-34, finer than float32 can tell beside it, and half a billion rows
of one cluster fit 64 bits. Hence rows may enter and leave a sum as they change their cluster, and parts of the data be
summed anywhere and joined in any order: the centers are the same to the byte.

Example: a cluster of the rows (1, 0) and (0.6, 0.8) has the sum (1.6, 0.8), kept as (27487790694, 13743895347). Its
length is 1.7889, so its center is (0.8944, 0.4472), and the mean cosine distance of its rows 1 - 1.7889 / 2 = 0.1056.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import no_type_check

import numpy as np
from jaxtyping import Float32, Float64, Int, Int64
from numba import njit

from distilclip.errors import InputError
from distilclip.vectors.kernels import SUM, kernel_view, stored
from distilclip.vectors.points import Points
from distilclip.vectors.threads import in_threads

STEPS = 1 << 34  # of a unit
MOST_ROWS = 1 << 29  # times STEPS is the largest 64-bit sum
SPLIT = 1e-3  # how far the two halves of a cluster are moved apart to begin with
EQUAL = 1e-9  # a cluster's mean cosine distance below which its rows are one direction


@dataclass(frozen=True, kw_only=True)
class CenterSums:
    """Sum and number of the unit rows of each cluster."""

    total: Int64[np.ndarray, "k dim"]
    count: Int64[np.ndarray, " k"]

    @classmethod
    def zero(cls, num_centers: int, dim: int) -> CenterSums:
        """Return the sums of no rows."""
        return cls(total=np.zeros((num_centers, dim), np.int64), count=np.zeros(num_centers, np.int64))

    def move(
        self,
        points: Points,
        rows: Int[np.ndarray, " n"],
        before: Int[np.ndarray, " n"],
        after: Int[np.ndarray, " n"],
    ) -> int:
        """Take rows from one cluster to another, in place; -1 is none. Return how many moved."""
        # Only rows that change their cluster are read: few, after the first rounds.
        moved = np.flatnonzero(before != after)
        values = kernel_view(points.values)
        rows, before, after = rows[moved], before[moved], after[moved]
        in_threads(  # threads share the rows, each has columns of its own
            lambda a, b: _move(values, points.scale, rows, before, after, self.total, a, b),
            points.dim,
            at_least=64,
        )
        for labels, sign in ((before, -1), (after, 1)):
            self.count[:] += sign * np.bincount(labels[labels >= 0], minlength=len(self.count))
        if self.count.max() > MOST_ROWS:
            raise InputError(f"A cluster has {self.count.max()} rows, more than the {MOST_ROWS} that its sum can hold.")
        return len(moved)

    def lengths(self) -> Float64[np.ndarray, " k"]:
        """Return the length of each sum: the sum of the cosines of the cluster's rows to its mean direction."""
        lengths = np.empty(len(self.count))
        in_threads(lambda a, b: _lengths(self.total[a:b], lengths[a:b]), len(self.count), at_least=256)
        return lengths

    def renew(self, centers: Float32[np.ndarray, "k dim"]) -> bool:
        """Write the mean directions over the centers of the round before; return whether any changed.

        A cluster whose rows cancel keeps its center; one without rows gets half of the cluster whose rows have the
        largest sum of distances.
        """
        lengths = self.lengths()
        changed = np.zeros(len(centers), bool)
        in_threads(
            lambda a, b: _directions(self.total[a:b], lengths[a:b], centers[a:b], changed[a:b]),
            len(centers),
            at_least=256,
        )
        return bool(changed.any() | split_heaviest(centers, self.count, self.count - lengths))

    def objective(self, centers: Float32[np.ndarray, "k dim"]) -> float:
        """Return the mean cosine distance of all rows to their centers."""
        # The sum of x . c over the rows of a cluster is (sum of x) . c: no row is read again.
        cosines = np.empty(len(centers))
        in_threads(
            lambda a, b: _inner_products(self.total[a:b], centers[a:b], cosines[a:b]), len(cosines), at_least=256
        )
        return 1 - float(cosines.sum()) / int(self.count.sum())


def split_heaviest(
    centers: Float32[np.ndarray, "k dim"], count: Int[np.ndarray, " k"], distance: Float64[np.ndarray, " k"]
) -> bool:
    """Give each empty cluster half of the heaviest one, in place: two centers a little to either side of its own.

    Weight is the sum of the distances of a cluster's rows, so that equal rows, which no center can part, weigh nothing.
    Returns whether there was an empty cluster.

    Raises:
        InputError: all rows of all clusters are equal, so that there are fewer directions than centers.
    """
    empty = np.flatnonzero(count == 0)
    if len(empty) == 0:
        return False
    # What a cluster can gain by a second center.
    weight = np.where(distance > EQUAL * count, distance, 0)
    for index in empty:
        heaviest = int(weight.argmax())
        if weight[heaviest] == 0:
            raise InputError(
                f"{len(centers)} centers were asked for, but the rows have fewer directions. Ask for fewer centers."
            )
        # Each half counts half, so that many empty clusters do not all go to one place.
        weight[index] = weight[heaviest] = weight[heaviest] / 2
        # A fixed direction that differs from cluster to cluster, small against the spread of any real cluster.
        direction = np.random.default_rng(index).standard_normal(centers.shape[1], np.float32)
        step = direction * np.float32(SPLIT / centers.shape[1] ** 0.5)
        for place, side in ((index, centers[heaviest] + step), (heaviest, centers[heaviest] - step)):
            centers[place] = side / np.linalg.norm(side)
    return True


@njit(nogil=True, cache=True)
@no_type_check
def _move(values, scale, rows, before, after, total, start, stop):
    for e in range(len(rows)):
        row, factor = values[rows[e], start:stop], scale[rows[e]] * STEPS
        if before[e] >= 0:
            source = total[before[e], start:stop]
            for k in range(len(row)):
                source[k] -= np.int64(np.rint(factor * stored(row[k])))
        if after[e] >= 0:
            target = total[after[e], start:stop]
            for k in range(len(row)):
                target[k] += np.int64(np.rint(factor * stored(row[k])))


@njit(nogil=True, cache=True, fastmath=SUM)
@no_type_check
def _lengths(total, out):
    for c in range(len(total)):
        squared = 0.0
        for k in range(total.shape[1]):
            squared += np.float64(total[c, k]) * np.float64(total[c, k])
        out[c] = np.sqrt(squared) / STEPS


@njit(nogil=True, cache=True)
@no_type_check
def _directions(total, lengths, out, changed):
    for c in range(len(total)):
        if lengths[c] > 0:
            for k in range(total.shape[1]):
                renewed = np.float32(total[c, k] / (lengths[c] * STEPS))
                changed[c] |= renewed != out[c, k]
                out[c, k] = renewed


@njit(nogil=True, cache=True, fastmath=SUM)
@no_type_check
def _inner_products(total, centers, out):
    for c in range(len(total)):
        product = 0.0
        for k in range(total.shape[1]):
            product += np.float64(total[c, k]) * np.float64(centers[c, k])
        out[c] = product / STEPS
