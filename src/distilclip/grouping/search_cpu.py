"""The search for near pairs on the CPU: cells say which points may meet, few dimensions propose, all of them decide.

Points are contracted to few dimensions and sorted into cells. A cell meets itself and what its gaps let through of
later cells. A product of the contracted points proposes pairs; where it lets too many through, a product of the points
themselves does. Each proposal is decided by direct difference in float64. When only a forest is wanted, a pair whose
rows the forest already joins at a smaller distance is dropped undecided, so a dense group of m rows costs m^2 / 2
comparisons of two floats but few decisions.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float32, Int

from distilclip.errors import InputError
from distilclip.grouping._tiles import (
    WIDTH,
    Rounding,
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
from distilclip.grouping.forest import ForestBuilder, Links
from distilclip.vectors.kernels import kernel_view
from distilclip.vectors.metric import distance, squared, squared_threshold
from distilclip.vectors.points import Points
from distilclip.vectors.projection import Projection
from distilclip.vectors.threads import workers

HEIGHT = 1024  # most points on the left of a product
BREADTH = 4096  # most points on the right
PROPOSALS = 1 << 15  # pairs decided at a time
NUM_SAMPLES = 2048  # entries looked at to guess how many pairs a tile proposes
DENSE = 0.05  # share of proposals above which a product of whole points is cheaper than deciding them
FIRST = 1 << 16  # of very many proposals, how many of the nearest are decided first, so that they rule out others


class AllPairs:
    """Collects every pair, from any thread."""

    links: Links | None = None  # no pair rules out another

    def __init__(self) -> None:
        self.found: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    def add(self, left: Int[np.ndarray, " e"], right: Int[np.ndarray, " e"], distance: Float[np.ndarray, " e"]) -> None:
        """Take pairs in."""
        self.found.append((left, right, distance))

    def joined(self) -> tuple[Int[np.ndarray, " e"], Int[np.ndarray, " e"], Float[np.ndarray, " e"]]:
        """Left rows, right rows, distances of every pair."""
        nothing = np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32)
        left, right, distance = (np.concatenate(column) for column in zip(nothing, *self.found, strict=True))
        return left, right, distance


Collector = AllPairs | ForestBuilder


def search(
    points: Points,
    rows: Int[np.ndarray, " m"],
    *,
    threshold: float,
    metric: str,
    into: Collector,
    memory_gb: float | None = None,
    num_cells: int | None = None,
    split: int | None = None,
) -> None:
    """Hand every pair of `rows` closer than the threshold to `into`, once, save those that its links rule out.

    With `split`, only pairs of one of `rows[:split]` and one of `rows[split:]`.
    """
    if len(rows) < 2:
        return
    num_cells = num_cells or default_num_cells(len(rows))
    _check_memory(len(rows), num_cells, memory_gb)
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
        threshold=threshold,
        metric=metric,
        rounding=rounding,
        into=into,
        meetings=_meetings(cells, split),
    )
    bounds = _Bounds(query)
    crew = [_Worker(query, bounds) for _ in range(torch.get_num_threads())]
    with workers(len(crew)) as map_threads:
        for meet in (_Worker.meet_itself, _Worker.meet_others):
            todo = iter(range(len(cells)))  # shared: who is free takes the next
            map_threads(lambda worker, meet=meet, todo=todo: [meet(worker, cell) for cell in todo], crew)


def _meetings(cells: Cells, split: int | None) -> list[tuple[Side, Side]]:
    """Which points of a cell meet which of a later one: all of them all, or either side the other."""
    if split is None:
        everyone = cells.start[:-1], cells.start[1:]
        return [(everyone, everyone)]
    before, after = cells.sides(split)
    return [(before, after), (after, before)]


def default_num_cells(num_points: int) -> int:
    """About two per square root of the points, of at least a hundred or so; one cell where there are few points."""
    return 1 if num_points < 4096 else 1 << round(np.log2(min(2 * num_points**0.5, num_points / 128)))


def _check_memory(num_points: int, num_cells: int, memory_gb: float | None) -> None:
    """`InputError` where the contracted points, the tables of cells and the forest do not fit the budget."""
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
    threshold: float
    metric: str
    rounding: Rounding
    into: Collector
    meetings: list[tuple[Side, Side]]


Links4 = tuple[bool, np.ndarray, np.ndarray, np.ndarray, np.ndarray]


class _Bounds:
    """A collector's links, their weights as limits of what a tile says; shared by all threads, renewed as needed."""

    def __init__(self, query: _Query) -> None:
        self._query = query
        self._lock = threading.Lock()
        self._links: Links | None = None
        no_rows, no_weights = np.empty(0, np.int64), np.empty(0, np.float32)
        self._contracted = self._exact = (False, no_rows, no_weights, no_rows, no_weights)

    def current(self, *, contracted: bool) -> Links4:
        """As `propose` takes them, for tiles of contracted points or for tiles that are lower bounds already."""
        with self._lock:
            links = self._query.into.links
            if links is not None and links is not self._links:
                weight, top = (squared(w.astype(np.float64), self._query.metric) for w in (links.weight, links.top))
                self._links = links
                self._contracted, self._exact = (
                    (True, links.parent, limit(weight).astype(np.float32), links.root, limit(top).astype(np.float32))
                    for limit in (self._query.rounding.in_tile, exact_limit)
                )
            return self._contracted if contracted else self._exact


@dataclass(frozen=True)
class _Tile:
    """What a product says of the squared distances between two blocks of rows, and up to where they may be pairs."""

    values: np.ndarray
    left: Int[np.ndarray, " a"]
    right: Int[np.ndarray, " b"]
    diagonal: bool  # the blocks are the same
    contracted: bool  # or of the points as they are, and a lower bound
    high: np.float32


class _Worker:
    """One thread's part of the search, with its buffers."""

    def __init__(self, query: _Query, bounds: _Bounds) -> None:
        self._query, self._bounds = query, bounds
        self._limit = squared_threshold(query.threshold, query.metric)
        self._high = np.float32(query.rounding.in_tile(self._limit))
        width = query.cells.z.shape[1]
        self._left = torch.zeros(HEIGHT, width, dtype=torch.bfloat16)
        self._right = torch.zeros(BREADTH, width, dtype=torch.bfloat16)
        self._found = np.empty(BREADTH, np.int64)
        self._pairs = np.empty((2, PROPOSALS), np.int64)
        self._product = fastest_product()

    def meet_itself(self, cell: int) -> None:
        """Find the near pairs inside a cell."""
        mine, others = self._query.meetings[0]
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
            found, image = self._found, as_bits(self._right)
            for count in self._query.cells.within_reach(cell, distance, among=others, found=found, image=image):
                right = self._query.rows[found[:count]]
                for tile in tiles:
                    self._set_left(tile)
                    self._compare(self._rows(tile), right, False)

    def _tiles(self, side: Side, cell: int) -> list[range]:
        start, stop = int(side[0][cell]), int(side[1][cell])
        return [range(first, min(first + HEIGHT, stop)) for first in range(start, stop, HEIGHT)]

    def _rows(self, tile: range) -> Int[np.ndarray, " a"]:
        return self._query.rows[tile.start : tile.stop]

    def _set_left(self, tile: range) -> None:
        set_left(self._left[: len(tile)], self._query.cells.z[tile.start : tile.stop])

    def _compare(self, left: Int[np.ndarray, " a"], right: Int[np.ndarray, " b"], diagonal: bool) -> None:
        """Find the near pairs of the rows whose points the buffers hold; each pair once on the diagonal."""
        values = self._product(self._left, self._right, len(left), len(right))
        tile = _Tile(values, left, right, diagonal, contracted=True, high=self._high)
        seen = self._sample(tile)
        if len(seen) > DENSE * NUM_SAMPLES:
            values = lower_bounds(self._query.points.block(left), self._query.points.block(right)).numpy()
            tile = _Tile(values, left, right, diagonal, contracted=False, high=np.float32(exact_limit(self._limit)))
            seen = self._sample(tile)
        low = np.float32(-np.inf)
        into = self._query.into
        expected = len(seen) / NUM_SAMPLES * values.size
        if isinstance(into, ForestBuilder) and expected > 2 * FIRST:
            nearest = np.float32(np.quantile(seen, FIRST / expected))
            self._decide_all(tile, low, nearest)
            into.reduce()
            low = nearest
        self._decide_all(tile, low, tile.high)

    def _sample(self, tile: _Tile) -> Float32[np.ndarray, " s"]:
        bounds = self._bounds.current(contracted=tile.contracted)
        return sample_proposals(tile.values, tile.left, tile.right, tile.diagonal, tile.high, bounds, NUM_SAMPLES)

    def _decide_all(self, tile: _Tile, low: np.float32, high: np.float32) -> None:
        position = 0
        while position < tile.values.size:
            bounds = self._bounds.current(contracted=tile.contracted)
            position, count = propose(
                tile.values, tile.left, tile.right, tile.diagonal, position, low, high, bounds, self._pairs
            )
            self._decide(*self._pairs[:, :count])

    def _decide(self, left: Int[np.ndarray, " p"], right: Int[np.ndarray, " p"]) -> None:
        points = self._query.points
        exact = np.empty(len(left))
        decide(kernel_view(points.values), points.scale, left, right, self._limit * (1 + 1e-6), exact)
        dist = distance(exact, self._query.metric)
        near = dist < np.float32(self._query.threshold)
        if near.any():
            self._query.into.add(left[near], right[near], dist[near])
