"""Sum the rows of each cluster in fixed point: whole numbers, so that no order of adding changes a bit.

A coordinate of a unit vector counts in steps of 2^-34, finer than float32 can tell beside it, and half a billion rows
of one cluster fit 64 bits. Hence rows may enter and leave a sum as they change their cluster, and parts of the data be
summed anywhere and joined in any order: the centers are the same to the byte.

Example: a cluster of the rows (1, 0) and (0.6, 0.8) has the sum (1.6, 0.8), kept as (27487790694, 13743895347). Its
length is 1.7889, so its center is (0.8944, 0.4472), and the mean cosine distance of its rows 1 - 1.7889 / 2 = 0.1056.
"""

from __future__ import annotations

import heapq
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from typing import no_type_check

import numpy as np
import torch
from jaxtyping import Bool, Float32, Float64, Int, Int64
from numba import njit
from torch import Tensor

from distilclip.errors import InputError
from distilclip.vectors.kernels import SUM, kernel_view, stored
from distilclip.vectors.points import Points
from distilclip.vectors.threads import in_threads

STEPS = 1 << 34  # of a unit
BLOCK = 8192  # rows summed at a time on a device: 160 MiB of float64 and int64 at 1280 dimensions
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
        check_count(self.count)
        return len(moved)

    def add(self, points: Points, rows: Int[np.ndarray, " n"], labels: Int[np.ndarray, " n"]) -> None:
        """Add rows to the clusters of their labels."""
        self.move(points, rows, np.full(len(rows), -1, np.int32), labels)

    def on_host(self) -> CenterSums:
        """Return these sums, as those of a device do."""
        return self

    def tally(self, centers: Float32[np.ndarray, "k dim"]) -> Tally:
        """Say of each cluster how many rows it has, and how they lie about their sum and about their center."""
        length, cosine = np.empty(len(centers)), np.empty(len(centers))

        def count_cosines(first: int, last: int) -> None:
            here = slice(first, last)
            _lengths(self.total[here], length[here])
            # The sum of x . c over the rows of a cluster is (sum of x) . c: no row is read again.
            _inner_products(self.total[here], centers[here], cosine[here])

        in_threads(count_cosines, len(centers), at_least=256)
        return Tally(count=self.count.copy(), length=length, cosine=cosine)

    def renew(self, centers: Float32[np.ndarray, "k dim"], length: Float64[np.ndarray, " k"]) -> Bool[np.ndarray, " k"]:
        """Write the mean directions over the centers of the round before; return which of them changed.

        `length` are the lengths of the sums. A cluster whose rows cancel, or that has none, keeps its center.
        """
        changed = np.zeros(len(centers), bool)
        in_threads(
            lambda a, b: _directions(self.total[a:b], length[a:b], centers[a:b], changed[a:b]),
            len(centers),
            at_least=256,
        )
        return changed


def check_count(count: Int64[np.ndarray, " k"]) -> None:
    """Raise `InputError` where a cluster has more rows than its sum can hold."""
    if count.max() > MOST_ROWS:
        raise InputError(f"A cluster has {count.max()} rows, more than the {MOST_ROWS} that its sum can hold.")


class DeviceSums:
    """The sums of `CenterSums` on an accelerator, with the same bits: adding whole numbers is exact in any order."""

    def __init__(self, num_centers: int, dim: int, device: torch.device) -> None:
        self._total = torch.zeros((num_centers, dim), dtype=torch.int64, device=device)
        self._count = torch.zeros(num_centers, dtype=torch.int64, device=device)

    def add(self, points: Points, rows: Int[np.ndarray, " n"], labels: Int[np.ndarray, " n"]) -> None:
        """Add rows to the clusters of their labels; a block of rows at a time is on the device, as it is stored."""
        device = self._total.device
        for start in range(0, len(rows), BLOCK):
            here = rows[start : start + BLOCK]
            values, scale = (torch.from_numpy(array[here]).to(device) for array in (points.values, points.scale))
            self.add_block(values, scale, torch.from_numpy(labels[start : start + BLOCK]).to(device))

    def add_block(self, values: Tensor, scale: Float64[Tensor, " m"], labels: Int[Tensor, " m"]) -> None:
        """Add stored rows that lie on the device."""
        steps = (values.double() * (scale * STEPS)[:, None]).round_().long()
        labels = labels.long()
        self._total.index_add_(0, labels, steps)
        self._count.index_add_(0, labels, torch.ones_like(labels))

    def on_host(self) -> CenterSums:
        """Return the sums in the memory of the host.

        Raises:
            InputError: a cluster has more rows than its sum can hold.
        """
        sums = CenterSums(total=self._total.cpu().numpy(), count=self._count.cpu().numpy())
        check_count(sums.count)
        return sums


@dataclass(frozen=True, kw_only=True)
class Tally:
    """What an assignment found of each cluster: all that the end of a fit and the splitting of clusters depend on."""

    count: Int64[np.ndarray, " k"]
    """rows of the cluster"""
    length: Float64[np.ndarray, " k"]
    """of the sum of its rows: the sum of their cosines to their mean direction"""
    cosine: Float64[np.ndarray, " k"]
    """sum of the cosines of its rows to its center"""

    @property
    def objective(self) -> float:
        """The mean cosine distance of all rows to their centers."""
        return 1 - float(self.cosine.sum()) / int(self.count.sum())

    @property
    def num_empty(self) -> int:
        """Clusters without rows."""
        return int((self.count == 0).sum())

    def splits(self) -> list[tuple[int, int]]:
        """Choose, for each cluster without rows, the heaviest one, of which it gets half; in this order.

        Weight is the sum of the distances of a cluster's rows to their mean direction, so that equal rows, which no
        center can part, weigh nothing. Each half counts half, so that many empty clusters do not all go to one place.

        Raises:
            InputError: all rows of all clusters are equal, so that there are fewer directions than centers.
        """
        empty = np.flatnonzero(self.count == 0).tolist()
        if not empty:
            return []
        distance = self.count - self.length
        weight = np.where(distance > EQUAL * self.count, distance, 0)
        heaviest = np.argsort(-weight, kind="stable")[: len(empty)]  # no others can be chosen
        heap = [(-weight[index], int(index)) for index in heaviest]  # sorted, so it is a heap; the first of equal ones
        pairs = []
        for index in empty:
            negative, chosen = heap[0]
            if negative == 0:
                raise InputError(
                    f"{len(weight)} centers were asked for, but the rows have fewer directions. Ask for fewer centers."
                )
            heapq.heapreplace(heap, (negative / 2, chosen))
            heapq.heappush(heap, (negative / 2, index))
            pairs.append((index, chosen))
        return pairs


def split(
    centers: Float32[np.ndarray, "k dim"] | MutableMapping[int, Float32[np.ndarray, " dim"]],
    pairs: Sequence[tuple[int, int]],
) -> None:
    """Put the two centers of each pair of `Tally.splits` a little to either side of the second, in place."""
    for index, heaviest in pairs:
        center = centers[heaviest]
        # A fixed direction that differs from cluster to cluster, small against the spread of any real cluster.
        direction = np.random.default_rng(index).standard_normal(len(center), np.float32)
        step = direction * np.float32(SPLIT / len(center) ** 0.5)
        for place, side in ((index, center + step), (heaviest, center - step)):
            centers[place] = side / np.linalg.norm(side)


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
