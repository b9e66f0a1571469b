"""The search in parts: each compares two blocks of a store's rows and writes the forest of the near pairs it finds.

The forests of all parts merge to that of all pairs, so it does not matter how the rows are divided, who computes a
part, or in what order; only names and counts travel between processes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from jaxtyping import Bool, Int

from distilclip import files
from distilclip.data import side_files as tables
from distilclip.data.images import ImageMatrix
from distilclip.data.store import Store
from distilclip.devices import resolve_device
from distilclip.grouping.balance import similarity_forest
from distilclip.vectors.points import Points

ROW_BYTES = 512  # of working memory that a search needs for a row

Block = tuple[int, int]  # the first row, and that after the last


@dataclass(frozen=True)
class Part:
    """Two blocks whose rows are compared; or one, named twice, whose rows are compared with each other."""

    left: Block
    right: Block

    def __str__(self) -> str:
        return "-".join(f"{row:012d}" for row in (*self.left, *self.right))


def parts_of(num_rows: int, *, block_rows: int) -> list[Part]:
    """All pairs of blocks of nearly equal size, none larger than `block_rows`; those that take longest come first."""
    num_blocks = max(1, -(-num_rows // block_rows))
    bounds = np.linspace(0, num_rows, num_blocks + 1).astype(int).tolist()
    blocks = list(itertools.pairwise(bounds))
    across = [Part(a, b) for i, a in enumerate(blocks) for b in blocks[i + 1 :]]
    return across + [Part(block, block) for block in blocks]


def rows_of_budget(num_rows: int, memory_gb: float) -> int:
    """How many rows a block may have so that two of them fit the budget; all of them if that many fit it together."""
    fit = max(1, int(memory_gb * 2**30 / ROW_BYTES))
    return max(1, num_rows) if num_rows <= fit else max(1, fit // 2)


@dataclass(frozen=True, kw_only=True)
class Search:
    """What every part of a search needs to know."""

    store: str
    folder: str
    """of `balance`: holds the forests of the parts, and the copies that no part looks at"""
    threshold: float
    metric: str
    memory_gb: float
    device: str

    def prepare(self) -> Callable[[Part], None]:
        """In a worker: read what all parts share."""
        images = ImageMatrix(Store.open(self.store))
        copied = np.zeros(len(images), bool)
        copied[images.rows(self.copies().right)] = True
        return partial(self._compute, images, copied)

    def _compute(self, images: ImageMatrix, copied: Bool[np.ndarray, " n"], part: Part) -> None:
        """Write the forest of the part's pairs, unless that is done already."""
        if files.exists(self.path(part)):
            return
        blocks = [part.left] if part.left == part.right else [part.left, part.right]
        rows = np.concatenate([np.arange(*block) for block in blocks])
        searched = np.concatenate([images.valid(*block) for block in blocks]) & ~copied[rows]
        values = [images.read(*block) for block in blocks]
        forest = similarity_forest(
            Points.of(values[0] if len(values) == 1 else np.concatenate(values), metric=self.metric, valid=searched),
            searched,
            threshold=self.threshold,
            metric=self.metric,
            split=len(values[0]) if len(values) == 2 else None,
            memory_gb=self.memory_gb,
            device=resolve_device(self.device),
        )
        edges = tables.ForestEdges(images.ids(rows[forest.left]), images.ids(rows[forest.right]), forest.distance)
        tables.write_edges(self.path(part), edges)

    def path(self, part: Part) -> str:
        """Where the forest of a part lies."""
        return files.join(self.folder, "search", f"{part}.parquet")

    def forest(self, part: Part) -> tables.ForestEdges:
        """The forest of a finished part."""
        return tables.read_edges(self.path(part))

    def write_copies(self, images: ImageMatrix) -> None:
        """Find the rows whose image file is equal to the byte to that of an earlier row; no part looks at them."""
        path = files.join(self.folder, "search", "copies.parquet")
        if files.exists(path):
            return
        original = _originals(images)
        copies = np.flatnonzero(original != np.arange(len(images)))
        nothing = np.zeros(len(copies), np.float32)
        tables.write_edges(path, tables.ForestEdges(images.ids(original[copies]), images.ids(copies), nothing))

    def copies(self) -> tables.ForestEdges:
        """Edges of length 0 from the first row of an image file to each of its copies."""
        return tables.read_edges(files.join(self.folder, "search", "copies.parquet"))


def remove_parts(folder: str) -> None:
    """Remove the forests of the parts from a folder of `balance`, once they are merged."""
    files.remove_folder(files.join(folder, "search"))


def _originals(images: ImageMatrix) -> Int[np.ndarray, " n"]:
    """Of every row, the first valid row with the same image file; the row itself where that is not known."""
    digests = images.digests()
    original = np.arange(len(images))
    known = np.flatnonzero(images.valid() & digests.any(axis=1))
    _, first, inverse = np.unique(
        digests[known].view(f"V{digests.shape[1]}")[:, 0], return_index=True, return_inverse=True
    )
    original[known] = known[first][inverse]
    return original
