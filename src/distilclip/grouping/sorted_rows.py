"""Sort the rows of a store into cells, on disk, so that a part of a search reads only what can hold a neighbour.

1. Fit: a projection and the centers of the cells come from a sample of the rows, once for all parts.
2. Sort: the rows of each block are projected and written in the order of their cells. Of rows equal to the byte only
   the first is written, and each copy as an edge to it.
3. Choose: sorted by cell, rows have positions. A range of positions is a part of the search; for each range and each
   block a list says which rows behind the range may be near one of its rows.

A part then reads its range, and the rows on its lists. Centers that are near each other have near numbers, so a range
is a piece of space, and its lists are short where the distance is small. Ten points on a line, in four cells:

>>> centers = torch.tensor([[7.0], [1.0], [9.0], [3.0]])
>>> order_centers(centers)[:, 0].tolist()
[1.0, 3.0, 7.0, 9.0]
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import cast, no_type_check

import numpy as np
import torch
from jaxtyping import BFloat16, Bool, Float16, Float32, Int
from numba import njit
from torch import Tensor

from distilclip import files
from distilclip.data.images import ImageMatrix
from distilclip.data.store import split_id
from distilclip.data.tensors import read_metadata, read_tensors, write_tensors
from distilclip.errors import InputError
from distilclip.grouping._tiles import WIDTH, Rounding, as_bits
from distilclip.grouping.cells import POINTS_PER_CENTER, Cells, Gaps, assign_cells, fit_centers
from distilclip.vectors.kernels import SUM, widened
from distilclip.vectors.metric import Metric
from distilclip.vectors.points import Points, distinct
from distilclip.vectors.projection import SAMPLE, Projection
from distilclip.vectors.threads import in_threads
from distilclip.vectors.tolerance import Tolerance

MOST_CELLS = 1 << 13  # their tables of gaps have 4 bytes for every two cells: 268 MB

Block = tuple[int, int]  # the first row, and that after the last
Range = tuple[int, int]  # the first position, and that after the last


def sorted_row_bytes(dim: int) -> int:
    """Return the bytes of a sorted row on disk: its embedding, its projection, its number, cell and distance."""
    return 2 * dim + 2 * min(dim, WIDTH) + 16


def cut(start: int, stop: int, most: int) -> list[tuple[int, int]]:
    """Cut a range into pieces of nearly equal size, none larger than `most`."""
    num_pieces = max(1, -(-(stop - start) // most))
    return list(itertools.pairwise(np.linspace(start, stop, num_pieces + 1).astype(int).tolist()))


@dataclass(frozen=True, kw_only=True)
class CellSort:
    """Sorts the rows of a store, and chooses what each part of a search reads. Files that are there are not made again.

    Raises:
        InputError: a row that is not finite, or whose length is not that of an embedding.
    """

    folder: str
    """holds what is written"""
    num_rows: int
    near: Tolerance
    block_rows: int
    """most rows of a block, and of a part"""
    most_near: int
    """most rows that may be near those of a part and are looked at together"""
    num_searched: int = 0
    """pairs of two of so many first rows are not wanted"""

    @property
    def blocks(self) -> list[Block]:
        """The blocks of rows that are sorted, each by itself."""
        return cut(0, self.num_rows, self.block_rows)

    def fit(self, images: ImageMatrix, searched: Bool[np.ndarray, " n"], num_cells: int) -> None:
        """Fit projection and cells to evenly spaced ones of the searched rows; forget what other blocks have left."""
        path = files.join(self.folder, "cells.safetensors")
        if files.exists(path):
            if read_metadata(path)["block_rows"] == str(self.block_rows):
                return
            files.remove_folder(self.folder)
        num_cells = min(num_cells, MOST_CELLS)
        rows = np.flatnonzero(searched)
        sample = rows[:: max(1, len(rows) // max(SAMPLE, num_cells * POINTS_PER_CENTER))]
        points = Points.of(images.take(sample), metric=cast(Metric, self.near.metric))
        everyone = np.arange(len(points))
        projection = Projection.fit(points, everyone, width=WIDTH)
        centers = order_centers(fit_centers(projection.project(points, everyone).values, num_cells))
        arrays = {"centers": centers.numpy(), "mean": projection.mean.numpy()}
        if projection.directions is not None:
            arrays["directions"] = projection.directions.numpy()
        write_tensors(path, arrays, {"block_rows": str(self.block_rows)})

    def sort(self, images: ImageMatrix, searched: Bool[np.ndarray, " n"], block: Block) -> None:
        """Write the searched rows of a block in the order of their cells."""
        path = self.path("rows", block)
        if files.exists(path):
            return
        projection, centers = self.fitted
        # 1. The rows of the block, without those equal to an earlier one of it; those that do not seek by themselves,
        # because their pairs are not searched.
        values = np.asarray(images.read(*block))
        points = Points.of(values, metric=cast(Metric, self.near.metric), valid=searched[slice(*block)])
        check_unit(points, searched[slice(*block)], images, metric=self.near.metric, first=block[0])
        rows = np.flatnonzero(searched[slice(*block)])
        seeks = block[0] + rows >= self.num_searched
        (first, copies), (later, more) = (find_equal(values, rows[some]) for some in (~seeks, seeks))
        first, copies = np.concatenate([first, later]), np.concatenate([copies, more])
        # 2. Their cells.
        projected = projection.project(points, first) if len(first) else None
        z = torch.empty(0, projection.width, dtype=torch.bfloat16) if projected is None else projected.values
        radius = 0.0 if projected is None else projected.radius
        seeking = block[0] + first >= self.num_searched
        label, own, gaps = self._assign(z, centers, radius, seeking)
        # 3. All in the order of the cells; of a cell in their own order.
        order = np.argsort(label, kind="stable")
        kept = first[order]
        arrays = {
            "row": block[0] + kept,
            "equal": block[0] + copies,
            "count": np.bincount(label, minlength=len(gaps.least)),
            "label": label[order].astype(np.int32),
            "own": own[order],
            "least": gaps.least,
            "projected": as_bits(z)[order],
            "image": values[kept],
        }
        error = 0.0 if projected is None else projected.error
        write_tensors(path, arrays, {"error": repr(error), "radius": repr(radius)})

    def _assign(
        self,
        z: BFloat16[Tensor, "n width"],
        centers: Float32[Tensor, "k width"],
        radius: float,
        seeking: Bool[np.ndarray, " n"],
    ) -> tuple[np.ndarray, np.ndarray, Gaps]:
        """Assign cells; where some rows of the store do not seek, to twice as many cells in every block."""
        label, own, gaps = assign_cells(z, centers, radius=radius, seeking=seeking)
        if self.num_searched and len(gaps.least) == len(centers):
            none = np.full_like(gaps.least, np.inf)
            gaps = Gaps(centers=gaps.centers, least=np.concatenate([gaps.least, none]), rounding=gaps.rounding)
        return label, own, gaps

    def join(self) -> None:
        """Join what the sorted blocks say of their cells."""
        path = files.join(self.folder, "gaps.safetensors")
        if files.exists(path):
            return
        least, counts, error, radius = None, [], 0.0, 0.0
        for block in self.blocks:
            arrays, bounds = read_tensors(self.path("rows", block)), read_metadata(self.path("rows", block))
            least = np.array(arrays["least"]) if least is None else np.minimum(least, arrays["least"], out=least)
            counts.append(np.array(arrays["count"]))
            error, radius = max(error, float(bounds["error"])), max(radius, float(bounds["radius"]))
        assert least is not None
        arrays = {"counts": np.stack(counts), "least": least}
        write_tensors(path, arrays, {"error": repr(error), "radius": repr(radius)})

    def equal(self) -> Iterator[Int[np.ndarray, "e 2"]]:
        """Yield of every block pairs of rows that are equal to the byte, of which only the first was kept."""
        for block in self.blocks:
            yield np.array(read_tensors(self.path("rows", block))["equal"])

    @cached_property
    def fitted(self) -> tuple[Projection, Float32[Tensor, "k width"]]:
        """The projection and the centers that all blocks share."""
        arrays = {
            name: torch.from_numpy(np.array(array))
            for name, array in read_tensors(files.join(self.folder, "cells.safetensors")).items()
        }
        return Projection(mean=arrays["mean"], directions=arrays.get("directions")), arrays["centers"]

    def path(self, what: str, block: Block) -> str:
        """Return where something is written of a block."""
        return files.join(self.folder, f"{what}-{block[0]:012d}-{block[1]:012d}.safetensors")


@dataclass(frozen=True, kw_only=True)
class Neighbourhood:
    """Rows of a part and rows that may be near them, ascending, with what the search needs to know of them."""

    rows: Int[np.ndarray, " m"]
    values: Float16[np.ndarray, "m dim"]
    distinct: Int[np.ndarray, " d"]
    """which of the rows are the first of those equal to the byte; only these are in the cells"""
    cells: Cells
    equal: Int[np.ndarray, "e 2"]
    """each other row, behind the row that it is equal to"""


class SortedRows:
    """The rows as `CellSort` has sorted them."""

    def __init__(self, sort: CellSort) -> None:
        self._sort, self._blocks = sort, sort.blocks
        path = files.join(sort.folder, "gaps.safetensors")
        arrays, bounds = read_tensors(path), read_metadata(path)
        projection, centers = sort.fitted
        dim = len(projection.mean)
        error, radius = float(bounds["error"]), float(bounds["radius"])
        self.rounding = Rounding.of(error=error, radius=radius, mean_length=float(projection.mean.norm()), dim=dim)
        self._gaps = Gaps.of(centers.numpy(), arrays["least"], radius=radius)
        # Position of the first row of each cell [c + 1], and how many rows of a cell lie in the blocks before [b, c].
        counts = np.array(arrays["counts"])
        self._start = np.append(0, np.cumsum(counts.sum(axis=0)))
        self._before = np.cumsum(counts, axis=0) - counts
        self._first = np.cumsum(counts, axis=1) - counts  # of each cell in its block
        self._counts = counts
        self._known_limits: dict[Range, np.ndarray] = {}

    @property
    def parts(self) -> list[Range]:
        """The parts of the search: those that have most rows behind them come first."""
        num_seeking = int(self._start[len(self._gaps.centers)])
        return cut(0, num_seeking, self._sort.block_rows) if num_seeking else []

    def cells_of(self, part: Range) -> range:
        """Return the cells that a part has rows of."""
        first, last = np.searchsorted(self._start, [part[0], part[1] - 1], side="right") - 1
        return range(int(first), int(last) + 1)

    def choose(self, block: Block) -> None:
        """Write for every part which rows of the block behind it may be near one of its rows."""
        path = self._sort.path("reached", block)
        if files.exists(path):
            return
        arrays = read_tensors(self._sort.path("rows", block))
        lists = [np.empty(0, np.int32), *(self._reached(arrays, block, part) for part in self.parts)]
        bounds = np.cumsum([len(found) for found in lists])
        write_tensors(path, {"bounds": bounds, "reached": np.concatenate(lists)}, {})

    def _reached(self, arrays: dict[str, np.ndarray], block: Block, part: Range) -> Int[np.ndarray, " r"]:
        cells, limits, first = self.cells_of(part), self._limits(part), self._place(block, part[1])
        reached = np.zeros(len(arrays["label"]) - first, bool)
        z, label, own = (np.asarray(arrays[name])[first:] for name in ("projected", "label", "own"))
        centers = self._gaps.centers[cells.start : cells.stop]
        in_threads(
            lambda start, stop: _mark_reached(
                z[start:stop], label[start:stop], own[start:stop], centers, limits, reached[start:stop]
            ),
            len(reached),
            at_least=4096,
        )
        return (first + np.flatnonzero(reached)).astype(np.int32)

    def _limits(self, part: Range) -> Float32[np.ndarray, "c q"]:
        """Return the limits of the gaps towards the cells of a part; they are the same for all blocks."""
        if part not in self._known_limits:
            distance = self.rounding.distance(self._sort.near.squared)
            self._known_limits[part] = np.ascontiguousarray(self._gaps.limits(distance, self.cells_of(part)).T)
        return self._known_limits[part]

    def _place(self, block: Block, position: int) -> int:
        """Return how many of a block's rows come before a position."""
        b = self._blocks.index(block)
        cell = int(np.searchsorted(self._start, position, side="right")) - 1
        if cell == len(self._start) - 1:
            return int(self._counts[b].sum())
        within = position - self._start[cell] - self._before[b, cell]
        return int(self._first[b, cell] + np.clip(within, 0, self._counts[b, cell]))

    def read(self, part: Range) -> Iterator[Neighbourhood]:
        """Read a part with the rows that may be near it, at most `most_near` of these at a time."""
        own, lists, number = [], [], self.parts.index(part)
        for block in self._blocks:
            own.append(np.arange(self._place(block, part[0]), self._place(block, part[1])))
            chosen = read_tensors(self._sort.path("reached", block))
            lists.append(chosen["reached"][slice(*chosen["bounds"][number : number + 2])])
        ends = np.cumsum([len(found) for found in lists])
        for number, (start, stop) in enumerate(cut(0, int(ends[-1]), self._sort.most_near)):
            some = [
                found[np.clip(start - end + len(found), 0, None) : np.clip(stop - end + len(found), 0, None)]
                for found, end in zip(lists, ends.tolist(), strict=True)
            ]
            yield self._load(own, some, met=number > 0)

    def _load(self, own: list[np.ndarray], others: list[np.ndarray], *, met: bool) -> Neighbourhood:
        """Read rows at some places of each block: those of a part, and others, which come behind these."""
        pieces: dict[str, list[np.ndarray]] = {name: [] for name in ("row", "label", "own", "projected", "image")}
        seeking = []
        for block, mine, rest in zip(self._blocks, own, others, strict=True):
            # Later blocks have later rows, and each its rows in order: ties break as in the forest of all rows.
            arrays = read_tensors(self._sort.path("rows", block))
            places = np.concatenate([mine, rest])
            order = np.argsort(arrays["row"][places])
            for name, piece in pieces.items():
                piece.append(np.asarray(arrays[name])[places[order]])
            seeking.append(order < len(mine))
        rows, label, to_center, projected, values = (np.concatenate(piece) for piece in pieces.values())
        first, equal = find_equal(values, np.arange(len(rows)))
        seeks = np.concatenate(seeking)[first]
        cells = Cells.of(
            torch.from_numpy(projected[first]).view(torch.bfloat16),
            label[first],
            to_center[first],
            gaps=self._gaps,
            seeking=seeks,
            num_met=int(seeks.sum()) if met else 0,
        )
        return Neighbourhood(rows=rows, values=values, distinct=first, cells=cells, equal=rows[equal])


def find_equal(
    values: Float16[np.ndarray, "n dim"], rows: Int[np.ndarray, " m"]
) -> tuple[Int[np.ndarray, " d"], Int[np.ndarray, "e 2"]]:
    """Return the distinct rows among some (ascending), and each other one behind the distinct row it is equal to."""
    same = distinct(values, rows)
    original = same.first[same.position[rows]]
    return same.first, np.stack([original, rows], axis=1)[original != rows]


def order_centers(centers: Float32[Tensor, "k width"]) -> Float32[Tensor, "k width"]:
    """Order centers so that near ones follow each other: halved along their widest direction, and each half again."""

    def halve(some: Int[np.ndarray, " m"]) -> list[np.ndarray]:
        if len(some) < 2:
            return [some]
        centered = x[some] - x[some].mean(axis=0)
        widest = np.linalg.svd(centered, full_matrices=False)[2][0]
        order = some[np.argsort(centered @ (widest * np.sign(widest[np.abs(widest).argmax()])), kind="stable")]
        return [*halve(order[: len(order) // 2]), *halve(order[len(order) // 2 :])]

    x = centers.double().numpy()
    return centers[torch.from_numpy(np.concatenate(halve(np.arange(len(x)))))]


def check_unit(
    points: Points, searched: Bool[np.ndarray, " n"], images: ImageMatrix, *, metric: str, first: int = 0
) -> None:
    """Raise `InputError` naming the first of some rows of a store, counted from `first`, that has not unit length."""
    off = points.off_unit(searched)
    if len(off):
        shard, row = split_id(images.ids(first + off[:1]))
        raise InputError(
            f"{images.store.path}: the image embedding of row {row[0]} of shard {shard[0]} has length "
            f"{points.norm[off[0]]:.4g}, not 1; {metric} distances of a store are those of unit rows. "
            "Normalise the rows before they are stored, or use --metric cosine."
        )


@njit(nogil=True, cache=True, fastmath=SUM)
@no_type_check
def _mark_reached(z, label, own, centers, limits, reached):
    """Mark the points that may be near a point of one of the cells with these centers; `limits` is [c, q]."""
    for i in range(len(z)):
        limit = limits[label[i]]
        for a in range(len(centers)):
            if limit[a] > -np.inf:
                squared = np.float32(0)
                for k in range(centers.shape[1]):
                    difference = widened(z[i, k]) - centers[a, k]
                    squared += difference * difference
                if squared - own[i] < limit[a]:
                    reached[i] = True
                    break
