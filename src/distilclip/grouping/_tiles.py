"""Compute tiles of approximate squared distances and propose from them the pairs that may be near.

1. Columns. Four columns beside a point make one product a squared distance: `[x, h, l, 1, 1]` times `[-2y, 1, 1, h, l]`
   is |x|^2 + |y|^2 - 2xy, where h + l is a squared length, kept as two numbers of 8 bits each.
2. Product. A tile is the product of two blocks of such rows, in bfloat16 where that is fast.
3. Rounding. The limit that a tile is compared with is widened by all that rounding may add: no near pair is lost.
4. Proposals. Entries below the limit are proposed, save pairs that the links of the forest rule out; `decide` computes
   their distances from the rows themselves.

For the points 3 and 5, left [-10, 1, 1, 25, 0] times right [3, 9, 0, 1, 1] is -30 + 9 + 0 + 25 + 0 = 4 = (3 - 5)^2:

>>> points = torch.tensor([[3.0], [5.0]]).bfloat16()
>>> right = add_lengths(points)
>>> left = torch.empty_like(right)
>>> set_left(left, right)
>>> (left @ right.T).tolist()
[[0.0, 4.0], [4.0, 0.0]]
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple, no_type_check

import numpy as np
import torch
from jaxtyping import BFloat16, Float32, Int, Int16
from numba import njit
from torch import Tensor

from distilclip.grouping.forest import joining_distance
from distilclip.vectors.kernels import ROUNDING, product_error, squared_distance, squared_product, widened

WIDTH = 60  # projected dimensions; with the four columns for lengths, 64 in a product
COLUMNS = 4
BLOCK = 4096  # points given their columns at a time
STRIP = 128  # entries of a row that are passed over together where none is small enough


def add_lengths(points: BFloat16[Tensor, "n width"], order: Int[Tensor, " n"] | None = None) -> Tensor:
    """Return `[x, h, l, 1, 1]` of every point, in another order if one is given: the right side of a product."""
    right = torch.ones(len(points), points.shape[1] + COLUMNS, dtype=torch.bfloat16)
    for start in range(0, len(points), BLOCK):
        here = right[start : start + BLOCK]
        here[:, :-COLUMNS] = points[start : start + BLOCK] if order is None else points[order[start : start + BLOCK]]
        # The squared length, rounded to 8 bits, and then what that rounding left over.
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
    """Return the same memory as numpy and numba can see it."""
    return z.view(torch.int16).numpy()


def product_in_bfloat16(left: Tensor, right: Tensor, height: int, breadth: int) -> np.ndarray:
    """Multiply the first rows of both sides, in bfloat16 seen as int16. Both have room for the rows that pad them."""
    # Few different shapes, because oneDNN compiles a program for each.
    tall, broad = -(-height // 64) * 64, max(64, 1 << (breadth - 1).bit_length())
    return as_bits(torch.mm(left[:tall], right[:broad].T))[:height, :breadth]


def product_in_float32(left: Tensor, right: Tensor, height: int, breadth: int) -> np.ndarray:
    """Multiply the first rows of both sides in float32."""
    return torch.mm(left[:height].float(), right[:breadth].float().T).numpy()


@cache
def fastest_product() -> Callable[[Tensor, Tensor, int, int], np.ndarray]:
    """Return the faster of the two products on this machine. No result depends on which it is."""
    left, right = torch.ones(256, 64, dtype=torch.bfloat16), torch.ones(2048, 64, dtype=torch.bfloat16)

    def seconds(product: Callable[[Tensor, Tensor, int, int], np.ndarray]) -> float:
        product(left, right, len(left), len(right))
        start = time.perf_counter()
        product(left, right, len(left), len(right))
        return time.perf_counter() - start

    return min(product_in_bfloat16, product_in_float32, key=seconds)


@dataclass(frozen=True, kw_only=True)
class Rounding:
    """How far rounding may move what a tile says, so that a limit can be widened by it."""

    error: float  # of one point, as a distance
    product_error: float  # of a squared distance that a product computed

    @classmethod
    def of(cls, *, error: float, radius: float, mean_length: float, dim: int) -> Rounding:
        """Bound the rounding for points no farther than `radius` from the mean, each projected within `error`."""
        widest = max(dim, WIDTH + COLUMNS)
        return cls(
            error=error + 4 * ROUNDING * (radius + mean_length),
            product_error=product_error(widest, radius) + 2.0**-16 * radius**2,
        )

    def distance(self, squared: float) -> float:
        """Return how far projected points may be when the points are no farther than the root of `squared`."""
        return (squared**0.5 + 2 * self.error) * (1 + 1e-6)

    def in_tile(self, squared: Any) -> Any:
        """Return the most that a tile can say of points at this squared distance."""
        # Both points err, then the product errs, and an entry in bfloat16 is itself rounded to 8 bits.
        return ((np.sqrt(squared) + 2 * self.error) ** 2 + self.product_error) * (1 + 2.0**-8)


def exact_limit(squared: Any) -> Any:
    """Widen a squared distance by its own rounding to float32 only."""
    return squared * (1 + 1e-6)


def lower_bounds(a: Float32[Tensor, "n dim"], b: Float32[Tensor, "m dim"]) -> Float32[Tensor, "n m"]:
    """Return squared distances of points by a product in float32, less all that rounding may have added.

    Both blocks are centered in place.
    """
    # A product errs by a share of squared lengths, so move both blocks to where they are short.
    center = a.mean(dim=0)
    a.sub_(center), b.sub_(center)
    radius = float(torch.stack([x.square().sum(1).max() for x in (a, b)]).max()) ** 0.5 * (1 + 1e-3)
    error = 4 * ROUNDING * (radius + float(center.norm()))  # of a point
    return squared_product(a, b).sub_(product_error(a.shape[1], radius) + 8 * error * radius)


class Tile(NamedTuple):
    """What a product says of the squared distances between two blocks of rows, and up to where they may be near."""

    values: np.ndarray  # [a, b], float32, or bfloat16 seen as int16
    left: Int[np.ndarray, " a"]  # the rows that the tile's rows stand for
    right: Int[np.ndarray, " b"]  # the rows that its columns stand for
    diagonal: bool  # both blocks are the same: only entries right of the diagonal count
    projected: bool  # of projected points; else of the points as they are, and a lower bound
    high: np.float32  # an entry from here on is no near pair


@njit(nogil=True, cache=True)
@no_type_check
def propose(tile, links, position, low, high, out):
    """Write the pairs with low <= entry < high that the links do not rule out, until `out` is full.

    Args:
        tile: a `Tile`.
        links: `Links` with weights in the tile's unit.
        position: a * width + b of the first entry to look at.
        low, high: the window.
        out: [2, m], receives left and right rows.

    Returns where to go on, and the number of pairs.
    """
    height, width = tile.values.shape
    count = 0
    first = position % width
    for a in range(position // width, height):
        if tile.diagonal:
            first = max(first, a + 1)
        row = tile.values[a]
        for start in range(first, width, STRIP):
            # Count the small entries of a strip first, because counting is vectorised; most strips have none.
            strip = row[start : start + STRIP]
            some = 0
            for b in range(len(strip)):
                some += widened(strip[b]) < high
            if not some:
                continue
            for b in range(len(strip)):
                value = widened(strip[b])
                if low <= value < high and _is_useful(value, tile.left[a], tile.right[start + b], links):
                    if count == out.shape[1]:
                        return a * width + start + b, count
                    out[0, count] = tile.left[a]
                    out[1, count] = tile.right[start + b]
                    count += 1
        first = 0
    return height * width, count


@njit(nogil=True, cache=True)
@no_type_check
def sample_proposals(tile, links, num_samples):
    """Draw entries from the tile and return those that `propose` would propose."""
    seen = np.empty(num_samples, np.float32)
    count = 0
    width = np.uint64(tile.values.shape[1])
    size = np.uint64(tile.values.shape[0]) * width
    state = np.uint64(1)
    for _ in range(num_samples):
        state = state * np.uint64(6364136223846793005) + np.uint64(1442695040888963407)  # Knuth's MMIX generator
        draw = (state >> np.uint64(33)) % size
        a, b = np.int64(draw // width), np.int64(draw % width)
        value = widened(tile.values[a, b])
        if value < tile.high and (not tile.diagonal or b > a) and _is_useful(value, tile.left[a], tile.right[b], links):
            seen[count] = value
            count += 1
    return seen[:count]


@njit(nogil=True, cache=True)
@no_type_check
def decide(values, scale, left, right, limit, out):
    """Write the squared distances of pairs in float64, infinite where they are above the limit."""
    for e in range(len(left)):
        out[e] = squared_distance(values, scale, left[e], right[e], limit)


@njit(nogil=True, cache=True)
@no_type_check
def _is_useful(squared, i, j, links):
    """Return whether a pair at no less than this squared distance may still belong to the forest."""
    # Without links every pair counts; rows of two groups are always worth deciding.
    if len(links.root) == 0 or links.root[i] != links.root[j]:
        return True
    # Two rows of one group are joined at no more than the larger of their top weights, often at less.
    if squared >= max(links.top[i], links.top[j]):
        return False
    return squared < joining_distance(links, i, j)
