"""Search a store in parts: each compares two blocks of rows and writes the forest of the near pairs it finds.

The forests of all parts merge to that of all pairs, so it does not matter how the rows are divided, who computes a
part, or in what order; only names and counts travel between processes. Three blocks a, b, c make six parts, those
that take longest first: a-b, a-c, b-c, a-a, b-b, c-c.

>>> [(pair.left, pair.right) for pair in pair_blocks(6, block_rows=3)]
[((0, 3), (3, 6)), ((0, 3), (0, 3)), ((3, 6), (3, 6))]
>>> [pair.num_rows for pair in pair_blocks(6, block_rows=3)]
[[3, 3], [3], [3]]

Where the first rows were searched before, blocks of other rows are compared with all:

>>> [(pair.left, pair.right) for pair in pair_blocks(6, block_rows=3, num_searched=4)]
[((0, 2), (4, 6)), ((2, 4), (4, 6)), ((4, 6), (4, 6))]
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from jaxtyping import Bool, Int

from distilclip import files
from distilclip.data import side_files
from distilclip.data.images import ImageMatrix
from distilclip.data.store import Store, split_id
from distilclip.devices import resolve_device
from distilclip.errors import InputError
from distilclip.grouping.forest import Forest
from distilclip.grouping.rule import Rule
from distilclip.grouping.search_forest import Finding, search_forest
from distilclip.vectors.points import Points

ROW_BYTES = 512  # of working memory that a search needs for a row

Block = tuple[int, int]  # the first row, and that after the last


@dataclass(frozen=True)
class BlockPair:
    """Two blocks whose rows are compared; or one, named twice, whose rows are compared with each other."""

    left: Block
    right: Block

    def __str__(self) -> str:
        return "-".join(f"{row:012d}" for row in (*self.left, *self.right))

    @property
    def blocks(self) -> list[Block]:
        """The blocks whose rows are read."""
        return [self.left] if self.left == self.right else [self.left, self.right]

    @property
    def num_rows(self) -> list[int]:
        """Rows of each of the blocks."""
        return [stop - start for start, stop in self.blocks]


def pair_blocks(num_rows: int, *, block_rows: int, num_searched: int = 0) -> list[BlockPair]:
    """Return all pairs of blocks of nearly equal size, none larger than `block_rows`; the slowest pairs come first.

    Pairs of two of the first `num_searched` rows are left out: they were searched before.
    """
    old = _blocks(0, num_searched, block_rows) if num_searched else []
    new = _blocks(num_searched, num_rows, block_rows)
    across = [BlockPair(a, b) for a in old for b in new]
    across += [BlockPair(a, b) for i, a in enumerate(new) for b in new[i + 1 :]]
    return across + [BlockPair(block, block) for block in new]


def _blocks(start: int, stop: int, block_rows: int) -> list[Block]:
    num_blocks = max(1, -(-(stop - start) // block_rows))
    return list(itertools.pairwise(np.linspace(start, stop, num_blocks + 1).astype(int).tolist()))


def rows_of_budget(num_rows: int, memory_gb: float) -> int:
    """Return how many rows a block may have so that two fit the budget; all rows if that many fit together."""
    fit = max(1, int(memory_gb * 2**30 / ROW_BYTES))
    return max(1, num_rows) if num_rows <= fit else max(1, fit // 2)


@dataclass(frozen=True, kw_only=True)
class StoreSearch:
    """What every part of a search needs to know."""

    store: str
    folder: str
    """of `balance`: holds the forests of the parts, and the copies that no part looks at"""
    rule: Rule
    memory_gb: float
    device: str
    groups: str | None = None
    """folder whose kept rows are searched"""

    def prepare(self) -> Callable[[BlockPair], None]:
        """Read, in a worker, what all parts share, and return what computes a part."""
        images = ImageMatrix(Store.open(self.store), self.groups)
        return partial(self._compute, images, self._is_copy(images))

    def _compute(self, images: ImageMatrix, copied: Bool[np.ndarray, " n"], pair: BlockPair) -> None:
        """Write the forest of the part, unless that is done already."""
        if not files.exists(self._path(pair)):
            save_forest(self._path(pair), self._search(images, copied, pair).forest, images)

    def search_lists(self, images: ImageMatrix) -> Finding:
        """Search all rows as one part, for the rule `topk`: lists of a part would not be the lists of all rows."""
        return self._search(images, self._is_copy(images), BlockPair((0, len(images)), (0, len(images))))

    def _search(self, images: ImageMatrix, copied: Bool[np.ndarray, " n"], pair: BlockPair) -> Finding:
        # 1. The rows [m] of one block, or of two, one after the other; copies of image files are left out.
        rows = np.concatenate([np.arange(*block) for block in pair.blocks])
        searched = np.concatenate([images.valid(*block) for block in pair.blocks]) & ~copied[rows]
        values = [images.read(*block) for block in pair.blocks]
        points = Points.of(
            values[0] if len(values) == 1 else np.concatenate(values), metric=self.rule.metric, valid=searched
        )
        off = points.off_unit(searched)
        if len(off):
            shard, row = split_id(images.ids(rows[off[:1]]))
            raise InputError(
                f"{self.store}: the image embedding of row {row[0]} of shard {shard[0]} has length "
                f"{points.norm[off[0]]:.4g}, not 1; {self.rule.metric} distances of a store are those of unit rows. "
                "Normalise the rows before they are stored, or use --metric cosine."
            )
        # 2. Their forest: of two blocks, only the pairs across.
        found = search_forest(
            points,
            searched,
            self.rule,
            split=len(values[0]) if len(values) == 2 else None,
            memory_gb=self.memory_gb,
            device=resolve_device(self.device),
        )
        # 3. The same with rows of the whole store.
        left, right = rows[found.forest.left], rows[found.forest.right]
        forest = Forest(left=left, right=right, distance=found.forest.distance, num_rows=len(images))
        return Finding(forest=forest, saturated=found.saturated)

    def forest(self, pair: BlockPair, images: ImageMatrix) -> Forest:
        """Return the forest of a finished part."""
        return load_forest(self._path(pair), images)

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

    def _is_copy(self, images: ImageMatrix) -> Bool[np.ndarray, " n"]:
        copied = np.zeros(len(images), bool)
        copied[self.copies(images).right] = True
        return copied

    def _path(self, pair: BlockPair) -> str:
        return files.join(self.folder, "search", f"{pair}.parquet")

    @property
    def _copies_path(self) -> str:
        return files.join(self.folder, "search", "copies.parquet")


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
