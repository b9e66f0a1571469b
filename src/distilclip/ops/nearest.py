"""The nearest center of every row on the CPU: bytes propose, float64 decides, bounds skip what cannot have changed.

A row keeps an upper bound of its inner products with each group of centers. Between two rounds it grows by the group's
drift; only where it reaches the exact inner product with the row's own center is the group compared again, by a product
of codes. What the error of the codes leaves open is decided in float64, so the labels are those of all n x k inner
products in float64, the first of equal ones. Rows pass through in blocks; no n x k and no n x dim is ever held.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import no_type_check

import numpy as np
import torch
from jaxtyping import Float32, Int, Int16
from numba import njit

from distilclip.ops.centergroups import CenterTiles
from distilclip.ops.codes import SLACK, Codes, encode, product_of_bytes, product_of_floats
from distilclip.ops.points import SUM, Points, kernel_view, stored, workers

BLOCK = 1024  # rows compared at a time
PADDING = 64  # heights of products are multiples: oneDNN compiles a program for each shape
PROPOSALS = 1 << 15
UNIT = 1 << 14  # a bound b is kept as an int16, b * UNIT rounded up
LOWEST = -(1 << 15)


@dataclass(frozen=True, kw_only=True)
class Nearest:
    """What is known of each row from the round before: its center, and what no group of centers exceeds.

    `update` changes both in place.
    """

    labels: Int[np.ndarray, " n"]  # int32; -1 before the first round
    bounds: Int16[np.ndarray, "n num_groups"] | None = None

    @classmethod
    def unknown(cls, count: int, *, num_groups: int | None = None) -> Nearest:
        """Before the first round; without `num_groups` no bounds are kept and each round compares everything."""
        bounds = None if num_groups is None else np.full((count, num_groups), UNIT * 2 - 1, np.int16)
        return cls(labels=np.full(count, -1, np.int32), bounds=bounds)

    def update(self, points: Points, rows: Int[np.ndarray, " n"], tiles: CenterTiles) -> Float32[np.ndarray, " n"]:
        """Find each row's center of largest inner product; returns the cosine distances to them."""
        distance = np.empty(len(rows), np.float32)
        crew = [_Worker(self, points, rows, tiles, distance) for _ in range(torch.get_num_threads())]
        todo = iter(range(0, len(rows), BLOCK))  # shared: who is free takes the next
        with workers(len(crew)) as map_threads:
            map_threads(lambda worker: [worker.compare(first) for first in todo], crew)
        return distance


class _Worker:
    """One thread's part of an update, with its buffers."""

    def __init__(
        self, known: Nearest, points: Points, rows: np.ndarray, tiles: CenterTiles, distance: np.ndarray
    ) -> None:
        self._known, self._points, self._rows, self._tiles, self._distance = known, points, rows, tiles, distance
        self._values = kernel_view(points.values)
        dtype = tiles.codes.code.dtype.type
        self._product = product_of_bytes if dtype == np.int8 else product_of_floats
        self._codes = Codes.empty(BLOCK, points.dim, dtype)
        self._all, self._left = torch.from_numpy(self._codes.code), torch.from_numpy(np.zeros_like(self._codes.code))
        num_groups = tiles.groups.num_groups
        self._which = np.empty((num_groups, BLOCK), np.int64)
        self._count = np.empty(num_groups, np.int64)
        num_tiles, width = tiles.groups.order.shape
        self._right = torch.from_numpy(tiles.codes.code).view(num_tiles, width, points.dim)
        self._of_tile = [
            (tiles.codes.step[t], tiles.offset[t], tiles.codes.residual[t], tiles.codes.length[t], order)
            for t, order in ((slice(i * width, (i + 1) * width), tiles.groups.order[i]) for i in range(num_tiles))
        ]
        self._proposals = np.empty((2, PROPOSALS), np.int64), np.empty(PROPOSALS, np.float32)

    def compare(self, first: int) -> None:
        """Find the centers of the block of rows that starts there."""
        here = slice(first, min(first + BLOCK, len(self._rows)))
        rows, labels = self._rows[here], self._known.labels[here]
        bounds = np.empty((0, 0), np.int16) if self._known.bounds is None else self._known.bounds[here]
        encode(self._values, self._points.scale, rows, self._tiles.origin, self._codes)
        best = np.full(len(rows), -np.inf)
        enough = np.full(len(rows), -1e30, np.float32)  # an inner product less x . origin, known to be reached
        self._reach(rows, labels, best, enough)
        self._select(labels, bounds, enough)
        tiles_per_group = len(self._of_tile) // len(self._count)
        count = 0
        for group, height in enumerate(self._count):
            if height == 0:
                continue
            which = self._which[group, :height]
            left = self._all
            if height < len(rows):
                left = self._left
                np.take(self._codes.code, which, axis=0, out=left.numpy()[:height], mode="clip")  # "raise" would copy
            for part in range(tiles_per_group):
                tile = group * tiles_per_group + part
                values = self._product(left[: -(-height // PADDING) * PADDING], self._right[tile])
                position = 0
                while position < height:
                    position, count = _propose(
                        values, which, position, *self._codes[1:], enough, *self._of_tile[tile],
                        group, part == 0, bounds, *self._proposals, count,
                    )  # fmt: skip
                    if position < height:  # the buffer is full
                        count = self._decide(rows, labels, best, enough, count)
        self._decide(rows, labels, best, enough, count)
        self._distance[here] = np.maximum(1 - best, 0)

    def _reach(self, rows: np.ndarray, labels: np.ndarray, best: np.ndarray, enough: np.ndarray) -> None:
        """The exact inner products with the rows' own centers, where they have one."""
        if labels[0] >= 0:  # then all have
            _own(self._values, self._points.scale, rows, labels, self._tiles.centers, self._codes.along, best, enough)

    def _select(self, labels: np.ndarray, bounds: np.ndarray, enough: np.ndarray) -> None:
        """Which rows each group must be compared with."""
        if bounds.size == 0 or labels[0] < 0 or self._tiles.moved is None:
            self._which[:, : len(labels)] = np.arange(len(labels))
            self._count[:] = len(labels)
            return
        drift = self._tiles.drift(float(self._codes.length[: len(labels)].max()) * (1 + 1e-3) + SLACK)
        _exceeding(bounds, drift, self._codes.along, enough, self._which, self._count)

    def _decide(self, rows: np.ndarray, labels: np.ndarray, best: np.ndarray, enough: np.ndarray, count: int) -> int:
        (which, center), high = self._proposals
        _decide(
            self._values, self._points.scale, rows, self._tiles.centers, self._codes.along,
            which[:count], center[:count], high[:count], labels, best, enough,
        )  # fmt: skip
        return 0


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
def _own(values, scale, rows, labels, centers, along, best, enough):
    for i in range(len(rows)):
        best[i] = inner_product(values[rows[i]], scale[rows[i]], centers[labels[i]])
        enough[i] = best[i] - along[i]


@njit(nogil=True, cache=True)
@no_type_check
def _exceeding(bounds, drift, along, enough, which, count):
    """Raise the bounds by the drift and list, for each group, the rows whose bound reaches what they have."""
    count[:] = 0
    rise = np.empty(len(drift), np.int64)
    for g in range(len(drift)):
        rise[g] = np.int64(np.ceil((drift[g] + SLACK) * UNIT)) if drift[g] > 0 else 0
    for i in range(len(bounds)):
        limit = np.int64(np.floor((enough[i] + along[i] - SLACK) * UNIT))
        for g in range(len(drift)):
            bound = min(bounds[i, g] + rise[g], 2 * UNIT - 1)
            bounds[i, g] = bound
            if bound >= limit:
                which[g, count[g]] = i
                count[g] += 1


@njit(nogil=True, cache=True, fastmath=SUM | {"nnan"})
@no_type_check
def _propose(
    values, which, position, row_step, row_residual, row_length, along, enough,
    step, offset, residual, length, order, group, fresh, bounds, pairs, high, count,
):  # fmt: skip
    """Pairs whose inner product may reach what the row has; new bounds. Returns where to go on and how many pairs."""
    width = len(step)
    for r in range(position, len(which)):
        i = which[r]
        scale, loss, size = row_step[i], row_residual[i], row_length[i] + row_residual[i]
        upper, lower = np.float32(-1e30), np.float32(-1e30)
        for j in range(width):
            middle = np.float32(values[r, j]) * (scale * step[j]) + offset[j]
            error = loss * length[j] + size * residual[j]
            upper = max(upper, middle + error)
            lower = max(lower, middle - error)
        enough[i] = max(enough[i], lower - np.float32(SLACK))
        if upper + np.float32(SLACK) >= enough[i]:
            if count + width > len(high):
                return r, count
            for j in range(width):
                middle = np.float32(values[r, j]) * (scale * step[j]) + offset[j]
                reach = middle + loss * length[j] + size * residual[j] + np.float32(SLACK)
                if reach >= enough[i]:
                    pairs[0, count], pairs[1, count], high[count] = i, order[j], reach
                    count += 1
        if bounds.size:
            bound = np.int64(np.ceil((upper + along[i] + SLACK) * UNIT))
            bound = min(max(bound, LOWEST), 2 * UNIT - 1)
            bounds[i, group] = bound if fresh else max(bound, np.int64(bounds[i, group]))
    return len(which), count


@njit(nogil=True, cache=True)
@no_type_check
def _decide(values, scale, rows, centers, along, which, center, high, labels, best, enough):
    """Compare the pairs in float64; of equal centers the first wins."""
    for e in range(len(which)):
        i, j = which[e], center[e]
        if high[e] >= enough[i] and j != labels[i]:
            exact = inner_product(values[rows[i]], scale[rows[i]], centers[j])
            if exact > best[i] or (exact == best[i] and j < labels[i]):
                best[i], labels[i] = exact, j
                enough[i] = max(enough[i], np.float32(exact - along[i]) - np.float32(SLACK))
