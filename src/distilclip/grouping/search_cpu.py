"""Search for near pairs on the CPU: cells say which points may be near, few dimensions propose, all dimensions decide.

1. Points are projected to few dimensions and sorted into cells.
2. Each cell is compared with itself and with the later cells that can hold a neighbour.
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
from distilclip.grouping.cells import Cells, Side, partition
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
    split: int | None = None,
) -> None:
    """Hand every near pair of `rows` to `into`, once, save those that its links rule out.

    With `split`, only pairs of one of `rows[:split]` and one of `rows[split:]`.
    """
    if len(rows) < 2:
        return
    num_cells = num_cells or default_num_cells(_num_balanced(len(rows), split))
    _check_memory(len(rows), num_cells, memory_gb)
    # 1. Project the points to few dimensions [m, width] and sort these into cells.
    projection = Projection.fit(points, rows, width=WIDTH)
    projected = projection.project(points, rows)
    cells = partition(projected.values, num_cells=num_cells, radius=projected.radius)
    rounding = Rounding.of(
        error=projected.error, radius=projected.radius, mean_length=float(projection.mean.norm()), dim=points.dim
    )
    query = _Query(
        points=points,
        cells=cells,
        rows=rows[cells.order],
        tolerance=tolerance,
        rounding=rounding,
        into=into,
        meetings=_meetings(cells, split),
    )
    # 2. All cells by themselves, then all cells with later ones: near pairs found first rule out more of the others.
    links = _TileLinks(query)
    crew = [_Worker(query, links) for _ in range(torch.get_num_threads())]
    with workers(len(crew)) as map_threads:
        for meet in (_Worker.meet_itself, _Worker.meet_others):
            todo = iter(range(len(cells)))  # shared: who is free takes the next
            map_threads(lambda worker, meet=meet, todo=todo: [meet(worker, cell) for cell in todo], crew)


def _meetings(cells: Cells, split: int | None) -> list[tuple[Side, Side]]:
    """Return which points of a cell meet which of a later one: all of them all, or either side the other."""
    if split is None:
        everyone = cells.everyone()
        return [(everyone, everyone)]
    before, after = cells.sides(split)
    return [(before, after), (after, before)]


def _num_balanced(num_points: int, split: int | None) -> int:
    """Return how many points, half of them on each side of a split, have as many pairs as these do across theirs.

    Of few points compared with many, most of the work is to sort the many into cells, so they get fewer cells.
    """
    return num_points if split is None else int(2 * (split * (num_points - split)) ** 0.5)


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
    tolerance: Tolerance
    rounding: Rounding
    into: Collector
    meetings: list[tuple[Side, Side]]


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
        mine, others = self._query.meetings[0]  # one and the same side, where all meet all: then each pair once
        for number, tile in enumerate(self._tiles(mine, cell)):
            self._set_left(tile)
            for other in self._tiles(others, cell)[number if mine is others else 0 :]:
                self._right[: len(other)] = self._query.cells.z[other.start : other.stop]
                self._compare(self._rows(tile), self._rows(other), tile == other)

    def meet_others(self, cell: int) -> None:
        """Find the near pairs of a cell with later cells."""
        distance = self._query.rounding.distance(self._limit)
        for mine, others in self._query.meetings:
            tiles = self._tiles(mine, cell)
            if not tiles:
                continue
            found, values = self._found, as_bits(self._right)
            for count in self._query.cells.reach(cell, distance, among=others, found=found, rows=values):
                right = self._query.rows[found[:count]]
                for tile in tiles:
                    self._set_left(tile)
                    self._compare(self._rows(tile), right, False)

    def _tiles(self, side: Side, cell: int) -> list[range]:
        start, stop = int(side.first[cell]), int(side.last[cell])
        return [range(first, min(first + HEIGHT, stop)) for first in range(start, stop, HEIGHT)]

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
