"""Search for near pairs on the CPU: cells say which points may be near, few dimensions propose, all dimensions decide.

1. Points are projected to few dimensions and sorted into cells.
2. Each cell is compared with itself and with the points of later cells that can have a neighbour in it.
3. A product of the projected points proposes pairs; where it proposes too many, a product of the whole points does.
4. Each proposal is decided by direct difference in float64.

When only a forest is wanted, a pair whose rows the forest already joins at a smaller distance is dropped undecided: a
dense group of m rows costs m^2 / 2 comparisons of two floats but few decisions.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from jaxtyping import Float, Float32, Int

from distilclip.errors import InputError
from distilclip.grouping._tiles import (
    WIDTH,
    Rounding,
    Tile,
    as_bits,
    decide,
    exact_limit,
    fastest_product,
    lower_bounds,
    propose,
    sample_proposals,
    set_left,
)
from distilclip.grouping.cells import Cells, partition
from distilclip.grouping.forest import NO_DISTANCES, NO_LINKS, NO_ROWS, ForestBuilder, Links
from distilclip.vectors.kernels import kernel_view
from distilclip.vectors.points import Points
from distilclip.vectors.projection import Projection
from distilclip.vectors.threads import workers
from distilclip.vectors.tolerance import Tolerance

HEIGHT = 1024  # most points on the left of a product
BREADTH = 4096  # most points on the right
PROPOSALS = 1 << 15  # pairs decided at a time
NUM_SAMPLES = 2048  # entries looked at to guess how many pairs a tile proposes
DENSE = 0.05  # share of proposals above which a product of whole points is cheaper than deciding them
FIRST = 1 << 16  # of very many proposals, how many of the nearest are decided first, so that they rule out others


class AllPairs:
    """Collects every pair, from any thread."""

    links = NO_LINKS  # no pair rules out another

    def __init__(self) -> None:
        self.found: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    def add(self, left: Int[np.ndarray, " e"], right: Int[np.ndarray, " e"], distance: Float[np.ndarray, " e"]) -> None:
        """Take pairs in."""
        self.found.append((left, right, distance))

    def joined(self) -> tuple[Int[np.ndarray, " e"], Int[np.ndarray, " e"], Float[np.ndarray, " e"]]:
        """Return left rows, right rows and distances of every pair."""
        nothing = NO_ROWS, NO_ROWS, NO_DISTANCES
        left, right, distance = (np.concatenate(column) for column in zip(nothing, *self.found, strict=True))
        return left, right, distance


Collector = AllPairs | ForestBuilder


def search(
    points: Points,
    rows: Int[np.ndarray, " m"],
    tolerance: Tolerance,
    *,
    into: Collector,
    memory_gb: float | None = None,
    num_cells: int | None = None,
    num_searched: int = 0,
) -> None:
    """Hand every near pair of `rows` to `into`, once, save those that its links rule out.

    Pairs of two of the first `num_searched` rows are left out.
    """
    if len(rows) < 2:
        return
    num_cells = num_cells or default_num_cells(num_balanced(len(rows), num_searched))
    _check_memory(len(rows), num_cells, memory_gb)
    # 1. Project the points to few dimensions [m, width] and sort these into cells.
    projection = Projection.fit(points, rows, width=WIDTH)
    projected = projection.project(points, rows)
    cells = partition(projected.values, num_cells=num_cells, radius=projected.radius, num_searched=num_searched)
    rounding = Rounding.of(
        error=projected.error, radius=projected.radius, mean_length=float(projection.mean.norm()), dim=points.dim
    )
    # 2. Compare them.
    seeking = range(len(cells.gaps.centers))
    search_cells(points, rows, cells, seeking, tolerance, rounding=rounding, into=into)


def search_cells(
    points: Points,
    rows: Int[np.ndarray, " m"],
    cells: Cells,
    seeking: range,
    tolerance: Tolerance,
    *,
    rounding: Rounding,
    into: Collector,
) -> None:
    """Hand every near pair of a seeking point and any other to `into`, once, save those that its links rule out.

    Args:
        points: the points as they are; `rows` are those that were sorted into `cells`.
        cells: the projected points.
        seeking: the cells that hold points that seek.
        tolerance: what is near.
        rounding: how far a tile of projected points may err.
        into: collects the pairs.
    """
    query = _Query(
        points=points,
        cells=cells,
        rows=rows[cells.order],
        limits=cells.gaps.limits(rounding.distance(tolerance.squared), seeking),
        first=seeking.start,
        tolerance=tolerance,
        rounding=rounding,
        into=into,
    )
    # All cells by themselves, then all cells with later ones: near pairs found first rule out more of the others.
    links = _TileLinks(query)
    crew = [_Worker(query, links) for _ in range(torch.get_num_threads())]
    with workers(len(crew)) as map_threads:
        for meet in (_Worker.meet_itself, _Worker.meet_others):
            todo = iter(seeking)  # shared: who is free takes the next
            map_threads(lambda worker, meet=meet, todo=todo: [meet(worker, cell) for cell in todo], crew)


def num_balanced(num_points: int, num_searched: int) -> int:
    """Return how many points have as many pairs as these have, those of two searched points left out.

    Of few points compared with many, most of the work is to sort the many into cells, so they get fewer cells.
    """
    return int((num_points**2 - num_searched**2) ** 0.5)


def default_num_cells(num_points: int) -> int:
    """Return about two cells per square root of the points, of at least a hundred or so points each."""
    return 1 if num_points < 4096 else 1 << round(np.log2(min(2 * num_points**0.5, num_points / 128)))


def _check_memory(num_points: int, num_cells: int, memory_gb: float | None) -> None:
    """Raise `InputError` where the projected points, the tables of cells and the forest do not fit the budget."""
    needed = (num_points * 400 + num_cells**2 * 4 * (torch.get_num_threads() + 3)) / 2**30
    if memory_gb is not None and needed > memory_gb:
        raise InputError(
            f"The search of {num_points} rows needs about {needed:.2f} GB beyond the rows themselves, "
            f"but memory_gb={memory_gb}. Raise it."
        )


@dataclass(frozen=True, kw_only=True)
class _Query:
    """What all threads of a search share and none changes."""

    points: Points
    cells: Cells
    rows: Int[np.ndarray, " n"]  # in the order of the cells
    limits: Float32[np.ndarray, "q c"]  # of the gaps towards the cells whose points seek, see `Gaps.limits`
    first: int  # of these cells
    tolerance: Tolerance
    rounding: Rounding
    into: Collector


class _TileLinks:
    """A collector's links with weights as tiles say them; shared by all threads, renewed when the forest has grown."""

    def __init__(self, query: _Query) -> None:
        self._query = query
        self._lock = threading.Lock()
        self._links = self._projected = self._exact = NO_LINKS

    def current(self, *, projected: bool) -> Links:
        """Return the links for tiles of projected points, or for tiles that are lower bounds already."""
        with self._lock:
            links = self._query.into.links
            if links is not self._links:
                self._links = links
                self._projected = links.rescale(partial(self._limits, self._query.rounding.in_tile))
                self._exact = links.rescale(partial(self._limits, exact_limit))
            return self._projected if projected else self._exact

    def _limits(self, widen: Callable[[np.ndarray], np.ndarray], weight: np.ndarray) -> np.ndarray:
        """Return what a tile says at most of points at these distances."""
        return widen(self._query.tolerance.squared_of(weight.astype(np.float64))).astype(np.float32)


class _Worker:
    """One thread's part of the search, with its buffers."""

    def __init__(self, query: _Query, links: _TileLinks) -> None:
        self._query, self._links = query, links
        self._limit = query.tolerance.squared
        self._high = np.float32(query.rounding.in_tile(self._limit))
        width = query.cells.z.shape[1]
        self._left = torch.zeros(HEIGHT, width, dtype=torch.bfloat16)
        self._right = torch.zeros(BREADTH, width, dtype=torch.bfloat16)
        self._found = np.empty(BREADTH, np.int64)
        self._pairs = np.empty((2, PROPOSALS), np.int64)
        self._product = fastest_product()

    def meet_itself(self, cell: int) -> None:
        """Find the near pairs inside a cell."""
        tiles = self._tiles(cell)
        for number, tile in enumerate(tiles):
            self._set_left(tile)
            for other in [other for other in tiles[number:] if other.start >= self._query.cells.num_met]:
                self._right[: len(other)] = self._query.cells.z[other.start : other.stop]
                self._compare(self._rows(tile), self._rows(other), tile == other)

    def meet_others(self, cell: int) -> None:
        """Find the near pairs of a cell with what comes after it."""
        tiles = self._tiles(cell)
        if not tiles:
            return
        found, values = self._found, as_bits(self._right)
        limit = self._query.limits[cell - self._query.first]
        for count in self._query.cells.reach(cell, limit, found=found, rows=values):
            right = self._query.rows[found[:count]]
            for tile in tiles:
                self._set_left(tile)
                self._compare(self._rows(tile), right, False)

    def _tiles(self, cell: int) -> list[range]:
        seeking = self._query.cells.seeking(cell)
        return [range(first, min(first + HEIGHT, seeking.stop)) for first in range(seeking.start, seeking.stop, HEIGHT)]

    def _rows(self, tile: range) -> Int[np.ndarray, " a"]:
        return self._query.rows[tile.start : tile.stop]

    def _set_left(self, tile: range) -> None:
        set_left(self._left[: len(tile)], self._query.cells.z[tile.start : tile.stop])

    def _compare(self, left: Int[np.ndarray, " a"], right: Int[np.ndarray, " b"], diagonal: bool) -> None:
        """Find the near pairs of the rows whose points the buffers hold; each pair once on the diagonal."""
        # 1. The tile [a, b] of projected points, and a sample of what it proposes.
        values = self._product(self._left, self._right, len(left), len(right))
        tile = Tile(values, left, right, diagonal, projected=True, high=self._high)
        seen = self._sample(tile)
        # 2. If it proposes too many, a tile of the whole points.
        if len(seen) > DENSE * NUM_SAMPLES:
            values = lower_bounds(self._query.points.block(left), self._query.points.block(right)).numpy()
            tile = Tile(values, left, right, diagonal, projected=False, high=np.float32(exact_limit(self._limit)))
            seen = self._sample(tile)
        # 3. If a forest is wanted and there are very many, the nearest first: they rule out most of the others.
        low = np.float32(-np.inf)
        into = self._query.into
        expected = len(seen) / NUM_SAMPLES * values.size
        if isinstance(into, ForestBuilder) and expected > 2 * FIRST:
            nearest = np.float32(np.quantile(seen, FIRST / expected))
            self._decide_all(tile, low, nearest)
            into.reduce()
            low = nearest
        self._decide_all(tile, low, tile.high)

    def _sample(self, tile: Tile) -> Float32[np.ndarray, " s"]:
        return sample_proposals(tile, self._links.current(projected=tile.projected), NUM_SAMPLES)

    def _decide_all(self, tile: Tile, low: np.float32, high: np.float32) -> None:
        position = 0
        while position < tile.values.size:
            links = self._links.current(projected=tile.projected)
            position, count = propose(tile, links, position, low, high, self._pairs)
            self._decide(*self._pairs[:, :count])

    def _decide(self, left: Int[np.ndarray, " p"], right: Int[np.ndarray, " p"]) -> None:
        """Hand on the proposals [p] that are near, by their distance in float64."""
        points, tolerance = self._query.points, self._query.tolerance
        exact = np.empty(len(left))
        decide(kernel_view(points.values), points.scale, left, right, self._limit * (1 + 1e-6), exact)
        distance = tolerance.distance_of(exact)
        near = tolerance.includes(distance)
        if near.any():
            self._query.into.add(left[near], right[near], distance[near])
