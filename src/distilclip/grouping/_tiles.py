"""Tiles of approximate squared distances between contracted points, and how far rounding may take them from the truth.

Four columns beside a point make one product a squared distance: `[x, h, l, 1, 1]` times `[-2y, 1, 1, h, l]`, where
h + l is a squared length, kept as two numbers of 8 bits each.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, no_type_check

import numpy as np
import torch
from jaxtyping import BFloat16, Float32, Int, Int16
from numba import njit
from torch import Tensor

from distilclip.grouping.forest import joining_distance
from distilclip.vectors.kernels import ROUNDING, product_error, squared_distance, squared_product, widened

WIDTH = 60  # contracted dimensions; with the four columns for lengths, 64 in a product
COLUMNS = 4
BLOCK = 4096  # points given their columns at a time


@dataclass(frozen=True, kw_only=True)
class Rounding:
    """How rounding widens a limit, so that nothing below it is ever lost."""

    error: float  # of a point, contracted or as it is, as a distance
    product_error: float  # of a squared distance

    @classmethod
    def of(cls, *, error: float, radius: float, mean_length: float, dim: int) -> Rounding:
        """For points no farther than `radius` from the mean, whose images err by `error`."""
        widest = max(dim, WIDTH + COLUMNS)
        return cls(
            error=error + 4 * ROUNDING * (radius + mean_length),
            product_error=product_error(widest, radius) + 2.0**-16 * radius**2,
        )

    def distance(self, squared: float) -> float:
        """Images farther apart than this stand for points farther apart than the root of `squared`."""
        return (squared**0.5 + 2 * self.error) * (1 + 1e-6)

    def in_tile(self, squared: Any) -> Any:
        """What a tile says at most of points at this squared distance; in bfloat16 it is rounded to 8 bits itself."""
        return ((np.sqrt(squared) + 2 * self.error) ** 2 + self.product_error) * (1 + 2.0**-8)


def exact_limit(squared: Any) -> Any:
    """The limit of a squared distance where only its own rounding to float32 matters."""
    return squared * (1 + 1e-6)


def lower_bounds(a: Float32[Tensor, "n dim"], b: Float32[Tensor, "m dim"]) -> Float32[Tensor, "n m"]:
    """Squared distances between points by a product in float32, less all that rounding may have added.

    Both blocks are moved in place to where they are small, for a product errs by a share of squared lengths.
    """
    center = a.mean(dim=0)
    a.sub_(center), b.sub_(center)
    radius = float(torch.stack([x.square().sum(1).max() for x in (a, b)]).max()) ** 0.5 * (1 + 1e-3)
    error = 4 * ROUNDING * (radius + float(center.norm()))  # of a point
    return squared_product(a, b).sub_(product_error(a.shape[1], radius) + 8 * error * radius)


def with_lengths(image: BFloat16[Tensor, "n width"], order: Int[Tensor, " n"] | None = None) -> Tensor:
    """`[x, h, l, 1, 1]` of every image, in another order if one is given: the right side of a product."""
    right = torch.ones(len(image), image.shape[1] + COLUMNS, dtype=torch.bfloat16)
    for start in range(0, len(image), BLOCK):
        here = right[start : start + BLOCK]
        here[:, :-COLUMNS] = image[start : start + BLOCK] if order is None else image[order[start : start + BLOCK]]
        length = here[:, :-COLUMNS].float().square().sum(1)
        here[:, -4] = length
        here[:, -3] = length - here[:, -4].float()
    return right


def set_left(left: BFloat16[Tensor, "m width4"], right: BFloat16[Tensor, "m width4"]) -> None:
    """Write `[-2y, 1, 1, h, l]` into `left`, from the same points as the right side of a product has them."""
    torch.mul(right[:, :-COLUMNS], -2, out=left[:, :-COLUMNS])
    left[:, -4:-2] = 1
    left[:, -2:] = right[:, -4:-2]


def as_bits(z: BFloat16[Tensor, "*shape"]) -> Int16[np.ndarray, "*shape"]:
    """The same memory as numpy and numba can see it."""
    return z.view(torch.int16).numpy()


def product_in_bfloat16(left: Tensor, right: Tensor, height: int, breadth: int) -> np.ndarray:
    """The first rows of both sides multiplied: bfloat16, seen as int16. Both have room for the rows that pad them."""
    # Few different shapes, because oneDNN compiles a program for each.
    tall, broad = -(-height // 64) * 64, max(64, 1 << (breadth - 1).bit_length())
    return as_bits(torch.mm(left[:tall], right[:broad].T))[:height, :breadth]


def product_in_float32(left: Tensor, right: Tensor, height: int, breadth: int) -> np.ndarray:
    """The same in float32."""
    return torch.mm(left[:height].float(), right[:breadth].float().T).numpy()


@cache
def fastest_product() -> Callable[[Tensor, Tensor, int, int], np.ndarray]:
    """In bfloat16 where the machine has instructions for it, else in float32: no result depends on it."""
    left, right = torch.ones(256, 64, dtype=torch.bfloat16), torch.ones(2048, 64, dtype=torch.bfloat16)

    def seconds(product: Callable[[Tensor, Tensor, int, int], np.ndarray]) -> float:
        product(left, right, len(left), len(right))
        start = time.perf_counter()
        product(left, right, len(left), len(right))
        return time.perf_counter() - start

    return min(product_in_bfloat16, product_in_float32, key=seconds)


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
