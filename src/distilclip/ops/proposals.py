"""Kernels that read a tile of approximate squared distances and propose the pairs worth deciding exactly."""

from __future__ import annotations

from typing import no_type_check

import numpy as np
from numba import njit

from distilclip.ops.groups import joining_distance
from distilclip.ops.points import squared_distance, widened

STRIP = 128  # entries of a row that are passed over together where none is small enough


@njit(nogil=True, cache=True)
@no_type_check
def propose(squared, left, right, diagonal, position, low, high, bounds, out):
    """Pairs with low <= squared < high that are not ruled out, from an entry of the tile on, until `out` is full.

    Args:
        squared: [a, b] tile of float32, or of bfloat16 as int16.
        left, right: rows that the tile's rows and columns stand for.
        diagonal: whether only entries right of the diagonal count.
        position: a * width + b of the first entry to look at.
        low, high: the window.
        bounds: (in use, parent, weight, root, top), see `groups.Links`, weights as squared distances.
        out: [2, m], receives left and right rows.

    Returns where to go on, and the number of pairs.
    """
    height, width = squared.shape
    count = 0
    first = position % width
    for a in range(position // width, height):
        if diagonal:
            first = max(first, a + 1)
        row = squared[a]
        for start in range(first, width, STRIP):
            strip = row[start : start + STRIP]
            some = 0
            for b in range(len(strip)):  # counted first, because that is vectorised
                some += widened(strip[b]) < high
            if not some:
                continue
            for b in range(len(strip)):
                value = widened(strip[b])
                if low <= value < high and _useful(value, left[a], right[start + b], bounds):
                    if count == out.shape[1]:
                        return a * width + start + b, count
                    out[0, count] = left[a]
                    out[1, count] = right[start + b]
                    count += 1
        first = 0
    return height * width, count


@njit(nogil=True, cache=True)
@no_type_check
def sample_proposals(squared, left, right, diagonal, high, bounds, num_samples):
    """Of entries drawn from the tile, those that `propose` would propose."""
    seen = np.empty(num_samples, np.float32)
    count = 0
    width = np.uint64(squared.shape[1])
    size = np.uint64(squared.shape[0]) * width
    state = np.uint64(1)
    for _ in range(num_samples):
        state = state * np.uint64(6364136223846793005) + np.uint64(1442695040888963407)  # Knuth's MMIX generator
        draw = (state >> np.uint64(33)) % size
        a, b = np.int64(draw // width), np.int64(draw % width)
        value = widened(squared[a, b])
        if value < high and (not diagonal or b > a) and _useful(value, left[a], right[b], bounds):
            seen[count] = value
            count += 1
    return seen[:count]


@njit(nogil=True, cache=True)
@no_type_check
def decide(values, scale, left, right, limit, out):
    """Squared distances of pairs in float64, infinite where they are above the limit."""
    for e in range(len(left)):
        out[e] = squared_distance(values, scale, left[e], right[e], limit)


@njit(nogil=True, cache=True)
@no_type_check
def _useful(squared, i, j, bounds):
    """Whether a pair at no less than this squared distance may still belong to the forest."""
    in_use, parent, weight, root, top = bounds
    if not in_use or root[i] != root[j]:
        return True
    if squared >= max(top[i], top[j]):
        return False
    return squared < joining_distance(parent, weight, i, j)
