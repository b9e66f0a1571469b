"""Search for near pairs on an accelerator: products of all tiles in half precision, without cells.

A tile is compared with one number, so that it is read once after it is written; what passes is decided in float64. Of
pairs that the forest already joins at a smaller distance, most are dropped undecided, as on the CPU.

A pair is near when |x - y|^2 < limit, that is xy > (|x|^2 + |y|^2 - limit) / 2. The bound of a tile takes the shortest
row of either side, so that it holds for every pair of the tile: for unit rows and limit 0.0049, xy > 0.99755.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from distilclip.grouping.forest import ForestBuilder
from distilclip.grouping.search_cpu import Collector
from distilclip.vectors.kernels import ROUNDING, float32_sums
from distilclip.vectors.points import Points
from distilclip.vectors.tolerance import Tolerance

HALF_ROUNDING = 2.0**-11  # of one float16 number, relative
HALF_LEAST = 2.0**-25  # absolute, of a number too small for that
LONGEST = 100.0  # of points whose products surely fit float16
BLOCK = 1 << 16  # rows moved to the device at a time
CANDIDATES = 1 << 24  # pairs listed at a time

Bounds = tuple[int, int]  # the first of some places, and that after the last


def compare_all(
    points: Points,
    rows: Int[np.ndarray, " m"],
    tolerance: Tolerance,
    *,
    into: Collector,
    size: int,
    device: torch.device,
    num_searched: int = 0,
) -> None:
    """Hand every near pair of `rows` to `into`, save those that its links rule out.

    Tiles have `size` rows on either side. Pairs of two of the first `num_searched` rows are left out.
    """
    lefts = [*_bounds(0, num_searched, size), *_bounds(num_searched, len(rows), size)]
    tiles = [(left, _bounds(max(left[0], num_searched), len(rows), size)) for left in lefts]
    _compare(points, rows, tolerance, tiles, into=into, device=device)


def compare_across(
    points: Points,
    rows: Int[np.ndarray, " m"],
    tolerance: Tolerance,
    *,
    into: Collector,
    size: int,
    device: torch.device,
    num_searched: int,
) -> None:
    """Hand every near pair of one of the first `num_searched` rows and one of the others to `into`."""
    rights = _bounds(num_searched, len(rows), size)
    tiles = [(left, rights) for left in _bounds(0, num_searched, size)]
    _compare(points, rows, tolerance, tiles, into=into, device=device)


def _compare(
    points: Points,
    rows: Int[np.ndarray, " m"],
    tolerance: Tolerance,
    tiles: list[tuple[Bounds, list[Bounds]]],
    *,
    into: Collector,
    device: torch.device,
) -> None:
    """Compare the rows at some places with those at others."""
    radius = float(points.norm[rows].max(initial=0.0))
    kind = torch.float16 if radius <= LONGEST else torch.float32
    error = inner_product_error(points.dim, radius, kind)
    blocks = _Blocks(points, rows, kind=kind, device=device)
    with float32_sums():
        for (a, a_stop), rights in tiles:
            left, left_block = blocks.at(a, a_stop)
            for b, b_stop in rights:
                right, right_block = blocks.at(b, b_stop)
                # 1. The tile [a, b] of inner products, and the bound below which none of its pairs is near.
                product = left_block @ right_block.T
                shortest = float(points.norm[left].min() ** 2 + points.norm[right].min() ** 2)
                bound = (shortest - tolerance.squared) / 2 - error
                near = product >= bound - 2 * HALF_ROUNDING * abs(bound)  # the number itself is rounded to the tile's
                if a == b:
                    near.triu_(diagonal=1)
                # 2. What passes the bound is decided from the rows themselves.
                for i, j in _list_places(near):
                    pairs = left[i.cpu().numpy()], right[j.cpu().numpy()]
                    _decide(points, *pairs, product[i, j].float().cpu().numpy(), error, tolerance, into)


def _bounds(start: int, stop: int, size: int) -> list[Bounds]:
    return [(first, min(first + size, stop)) for first in range(start, stop, size)]


class _Blocks:
    """Rows on the device: all of them where they fit, else those of a block as it is asked for."""

    def __init__(self, points: Points, rows: Int[np.ndarray, " m"], *, kind: torch.dtype, device: torch.device) -> None:
        self._points, self._rows, self._kind, self._device = points, rows, kind, device
        self._all: Tensor | None = None
        if 2 * len(rows) * points.dim * kind.itemsize < _free_bytes(device):
            self._all = torch.empty(len(rows), points.dim, dtype=kind, device=device)
            for start in range(0, len(rows), BLOCK):
                self._all[start : start + BLOCK] = points.block(rows[start : start + BLOCK], device=device)

    def at(self, start: int, stop: int) -> tuple[Int[np.ndarray, " b"], Float[Tensor, "b dim"]]:
        """Return the numbers and the points of the rows at some positions."""
        rows = self._rows[start:stop]
        if self._all is not None:
            return rows, self._all[start:stop]
        return rows, self._points.block(rows, device=self._device).to(self._kind)


def _free_bytes(device: torch.device) -> int:
    """Return the free memory of a CUDA device; of others nothing is known, so nothing is taken."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0


def inner_product_error(dim: int, radius: float, kind: torch.dtype) -> float:
    """Bound the error of a tile's inner product of points no longer than `radius`.

    Both factors and the product are rounded to `kind`, the sum is accumulated in float32.
    """
    one = HALF_ROUNDING if kind == torch.float16 else ROUNDING
    least = HALF_LEAST if kind == torch.float16 else 0.0
    return (3.01 * one + 2 * dim * ROUNDING) * radius**2 + 2.01 * dim**0.5 * least * (radius + 1)


def _list_places(near: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the places of a mask, so many rows at a time that the list stays short."""
    height = max(1, CANDIDATES // max(1, near.shape[1]))
    dense = int(near.count_nonzero()) > CANDIDATES
    for start in range(0, len(near), height if dense else len(near)):
        i, j = near[start : start + height if dense else None].nonzero(as_tuple=True)
        yield i + start, j


def _decide(
    points: Points,
    left: Int[np.ndarray, " p"],
    right: Int[np.ndarray, " p"],
    product: Float[np.ndarray, " p"],
    error: float,
    tolerance: Tolerance,
    into: Collector,
) -> None:
    """Hand on the pairs [p] that are near, by their distance in float64."""
    links = into.links
    if len(links.root):
        # Drop pairs of one group whose distance is surely no less than the one at which the forest joins them.
        least = points.norm[left] ** 2 + points.norm[right] ** 2 - 2 * (product + error)
        top = tolerance.squared_of(np.maximum(links.top[left], links.top[right]).astype(np.float64)) * (1 + 1e-6)
        useful = (links.root[left] != links.root[right]) | (least < top)
        left, right = left[useful], right[useful]
    distance = tolerance.distance_of(points.squared(left, right))
    near = tolerance.includes(distance)
    into.add(left[near], right[near], distance[near])
    if isinstance(into, ForestBuilder) and len(left) > CANDIDATES // 16:
        into.reduce()
