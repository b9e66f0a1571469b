"""Search a store for its forest of near pairs: all rows at once, or in parts, whose results are files.

In parts, the rows are sorted into cells first (`sorted_rows`). A part is a range of the sorted rows: it finds the near
pairs of two of them, and of one of them and a row behind the range. So every pair belongs to one part, and the forests
of all parts merge to that of all pairs: it does not matter how the rows are divided, who computes a part, or in what
order. Only names and counts travel between processes.

>>> rows_of_budget(1.0)
2097152
>>> zero = EqualRows(9)
>>> zero.add(np.array([[5, 7], [3, 5]]), left=np.array([4]), right=np.array([7]))
>>> zero.forest().left.tolist(), zero.forest().right.tolist()  # a part took 5 for the first of 5 and 7
([3, 3, 3], [5, 7, 4])
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float32, Int

from distilclip import files
from distilclip.data import side_files
from distilclip.data.images import ImageMatrix
from distilclip.data.store import Store
from distilclip.data.tensors import read_tensors, write_tensors
from distilclip.devices import resolve_device
from distilclip.grouping.forest import Forest, ForestBuilder
from distilclip.grouping.near_pairs import tile_rows
from distilclip.grouping.rule import Rule
from distilclip.grouping.search_cpu import default_num_cells, num_balanced, search_cells
from distilclip.grouping.search_forest import Finding, search_forest
from distilclip.grouping.search_gpu import compare_across, compare_all
from distilclip.grouping.sorted_rows import Block, CellSort, Neighbourhood, Range, SortedRows, check_unit
from distilclip.vectors.points import Points
from distilclip.vectors.tolerance import Tolerance

ROW_BYTES = 512  # of working memory that a search needs for a row


def rows_of_budget(memory_gb: float) -> int:
    """Return how many rows can be searched together."""
    return max(1, int(memory_gb * 2**30 / ROW_BYTES))


@dataclass(frozen=True, kw_only=True)
class StoreSearch:
    """What every part of a search needs to know.

    The methods `prepare_...` read, in a worker, what all blocks or parts share, and return what computes one, unless
    that is done already.
    """

    store: str
    folder: str
    """of `balance`: holds the forests of the parts, and the copies that no part looks at"""
    rule: Rule
    memory_gb: float
    device: str
    block_rows: int
    """most rows of a block that is sorted, and of a part; if no fewer than all, all are searched at once"""
    groups: str | None = None
    """folder whose kept rows are searched"""
    num_searched: int = 0
    """so many first rows were searched before: pairs of two of them are left out"""

    def prepare_all(self) -> Callable[[Literal["all"]], None]:
        """Search all rows at once."""
        images = self._images
        return partial(self._search_all, images)

    def _search_all(self, images: ImageMatrix, name: Literal["all"]) -> None:
        if not files.exists(self._path(name)):
            save_forest(self._path(name), self._search(images).forest, images)

    def search_lists(self, images: ImageMatrix) -> Finding:
        """Search all rows at once, for the rule `topk`: lists of a part would not be the lists of all rows."""
        return self._search(images)

    def _search(self, images: ImageMatrix) -> Finding:
        searched = self.searched(images)
        points = Points.of(images.read(0, len(images)), metric=self.rule.metric, valid=searched)
        check_unit(points, searched, images, metric=self.rule.metric)
        return search_forest(
            points,
            searched,
            self.rule,
            num_searched=self.num_searched,
            memory_gb=self.memory_gb,
            device=resolve_device(self.device),
        )

    def fit(self, images: ImageMatrix) -> None:
        """Fit the cells that the rows are sorted into."""
        searched = self.searched(images)
        num_points = num_balanced(int(searched.sum()), int(searched[: self.num_searched].sum()))
        self.sort.fit(images, searched, default_num_cells(num_points))

    def prepare_sort(self) -> Callable[[Block], None]:
        """Sort the rows of a block."""
        images = self._images
        return partial(self.sort.sort, images, self.searched(images))

    def prepare_choice(self) -> Callable[[Block], None]:
        """Choose from a sorted block what each part reads."""
        return SortedRows(self.sort).choose

    def prepare_search(self) -> Callable[[Range], None]:
        """Search a part of the sorted rows."""
        return partial(self._search_part, self._images, SortedRows(self.sort))

    def _search_part(self, images: ImageMatrix, rows: SortedRows, part: Range) -> None:
        path = self._path(part)
        if files.exists(path):
            return
        equal, found = [], []
        for near in rows.read(part):
            forest = self._meet(near, rows.cells_of(part), rows)
            found.append((near.rows[forest.left], near.rows[forest.right], forest.distance))
            equal.append(near.equal)
        left, right, distance = (np.concatenate(column) for column in zip(*found, strict=True))
        arrays = {"equal": np.concatenate(equal), "left": left, "right": right, "distance": distance}
        write_tensors(path, arrays, {})

    def _meet(self, near: Neighbourhood, cells: range, rows: SortedRows) -> Forest:
        """Return the forest of the pairs of a part's rows with each other and with those that may be near them."""
        points, device = Points.of(near.values, metric=self.rule.metric), resolve_device(self.device)
        into = ForestBuilder(len(points))
        if device.type == "cpu":
            search_cells(points, near.distinct, near.cells, cells, self.near, rounding=rows.rounding, into=into)
        else:
            # The others before those of the part, which seek.
            order = np.roll(near.cells.order, -near.cells.num_seeking)
            others = len(order) - near.cells.num_seeking
            size = tile_rows(points.dim, self.memory_gb, most=1 << 14)
            compare = compare_across if near.cells.num_met else compare_all
            compare(points, near.distinct[order], self.near, into=into, size=size, device=device, num_searched=others)
        return into.forest()

    def forest_of_all(self, images: ImageMatrix) -> Forest:
        """Return the forest of all rows, where they were searched at once."""
        return load_forest(self._path("all"), images)

    def result(self, part: Range) -> PartResult:
        """Return what a finished part has found."""
        return PartResult(**{name: np.array(array) for name, array in read_tensors(self._path(part)).items()})

    def write_copies(self, images: ImageMatrix) -> None:
        """Find the rows whose image file is equal to the byte to that of an earlier row; no part looks at them."""
        if files.exists(self._copies_path):
            return
        original = _originals(images)
        copies = np.flatnonzero(original != np.arange(len(images)))
        nothing = np.zeros(len(copies), np.float32)
        forest = Forest(left=original[copies], right=copies, distance=nothing, num_rows=len(images))
        save_forest(self._copies_path, forest, images)

    def copies(self, images: ImageMatrix) -> Forest:
        """Return edges of length 0 from the first row of an image file to each of its copies."""
        return load_forest(self._copies_path, images)

    def searched(self, images: ImageMatrix) -> Bool[np.ndarray, " n"]:
        """Return which rows are compared: the valid ones, save copies of image files."""
        searched = images.valid()
        searched[self.copies(images).right] = False
        return searched

    @cached_property
    def near(self) -> Tolerance:
        """How near two rows must be."""
        return Tolerance(self.rule.farthest, self.rule.metric)

    @cached_property
    def sort(self) -> CellSort:
        """How the rows are sorted."""
        return CellSort(
            folder=files.join(self.folder, "search", "sorted"),
            num_rows=Store.open(self.store).num_rows,
            near=self.near,
            block_rows=self.block_rows,
            most_near=max(self.block_rows, rows_of_budget(self.memory_gb) - self.block_rows),
            num_searched=self.num_searched,
        )

    @property
    def _images(self) -> ImageMatrix:
        return ImageMatrix(Store.open(self.store), self.groups)

    def _path(self, part: Range | Literal["all"]) -> str:
        if isinstance(part, str):
            return files.join(self.folder, "search", "all.parquet")
        return files.join(self.sort.folder, f"found-{part[0]:012d}-{part[1]:012d}.safetensors")

    @property
    def _copies_path(self) -> str:
        return files.join(self.folder, "search", "copies.parquet")


@dataclass(frozen=True, kw_only=True)
class PartResult:
    """What a part has found: edges, and pairs of rows that are equal to the byte, all with rows of the whole store."""

    equal: Int[np.ndarray, "q 2"]
    left: Int[np.ndarray, " e"]
    right: Int[np.ndarray, " e"]
    distance: Float32[np.ndarray, " e"]


class EqualRows:
    """Gathers edges of length 0 from all parts: a part does not see which of equal rows is the first of all."""

    def __init__(self, num_rows: int) -> None:
        self._num_rows = num_rows
        self._equal: list[np.ndarray] = []
        self._edges: list[np.ndarray] = []

    def add(self, equal: Int[np.ndarray, "q 2"], *, left: Int[np.ndarray, " e"], right: Int[np.ndarray, " e"]) -> None:
        """Take in pairs of rows that are equal to the byte, and of others at the distance 0."""
        self._equal.append(equal)
        self._edges.append(np.stack([left, right], axis=1))

    def forest(self) -> Forest:
        """Return what a search of all rows at once finds: every row is joined to the first that is equal to it."""
        pairs = np.concatenate(self._equal)
        nothing = np.zeros(len(pairs), np.float32)
        first = Forest(left=pairs[:, 0], right=pairs[:, 1], distance=nothing, num_rows=self._num_rows).groups()
        equal = np.unique(pairs)
        equal = equal[first[equal] != equal]
        edges = np.sort(first[np.concatenate(self._edges)], axis=1)
        left, right = np.concatenate([np.stack([first[equal], equal], axis=1), edges[edges[:, 0] < edges[:, 1]]]).T
        return Forest(left=left, right=right, distance=np.zeros(len(left), np.float32), num_rows=self._num_rows)


def remove_parts(folder: str) -> None:
    """Remove the forests of the parts from a folder of `balance`, once they are merged."""
    files.remove_folder(files.join(folder, "search"))


def save_forest(path: str, forest: Forest, images: ImageMatrix) -> None:
    """Write a forest with the ids of its rows."""
    edges = side_files.ForestEdges(images.ids(forest.left), images.ids(forest.right), forest.distance)
    side_files.write_edges(path, edges)


def load_forest(path: str, images: ImageMatrix) -> Forest:
    """Return a forest that `save_forest` wrote, with rows counted through all shards."""
    edges = side_files.read_edges(path)
    left, right = images.rows(edges.left), images.rows(edges.right)
    return Forest(left=left, right=right, distance=edges.distance, num_rows=len(images))


def _originals(images: ImageMatrix) -> Int[np.ndarray, " n"]:
    """Return of every row the first valid row with the same image file; the row itself where that is not known."""
    digests = images.digests()
    original = np.arange(len(images))
    known = np.flatnonzero(images.valid() & digests.any(axis=1))
    _, first, inverse = np.unique(
        digests[known].view(f"V{digests.shape[1]}")[:, 0], return_index=True, return_inverse=True
    )
    original[known] = known[first][inverse]
    return original
