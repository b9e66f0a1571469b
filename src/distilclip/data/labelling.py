"""The cluster of every row of a store, shard by shard: of the kept rows, and of those that balance removed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from jaxtyping import Int, Int32

from distilclip.data import files
from distilclip.data.groups import Labels, labels_path, read_centers, read_groups, read_labels, write_labels
from distilclip.data.store import Store, stem
from distilclip.data.tensors import read_tensors, write_tensors
from distilclip.devices import resolve_device
from distilclip.errors import InputError
from distilclip.ops.assignment import Assignment
from distilclip.ops.points import Points
from distilclip.ops.sketches import choose_contraction


def kept_and_removed(
    store: Store, groups: str | None, shard: int
) -> tuple[Int[np.ndarray, " kept"], Int[np.ndarray, " removed"]]:
    """The valid rows of a shard that a balance folder keeps, and the others; without such a folder all are kept.

    Raises:
        InputError: the folder was made from another store.
    """
    valid = np.flatnonzero(store.rows(shard).valid)
    if groups is None:
        return valid, valid[:0]
    part = read_groups(groups, shard)
    if not np.array_equal(part.row, valid):
        raise InputError(
            f"{groups} was not made from {store.path}: in shard {shard} it has other rows. "
            "Give the store that `balance` read."
        )
    return valid[part.keep], valid[~part.keep]


@dataclass(frozen=True, kw_only=True)
class Labelling:
    """The assignment of all rows to the centers of a cluster folder; a part is a shard."""

    store: str
    groups: str | None
    folder: str
    scratch: str  # a folder for the labels of removed rows, which only their numbers are wanted of
    device: str

    def prepare(self) -> Callable[[int], None]:
        """In a worker: read the centers and sketch them, as suits the first rows that are kept."""
        store, centers = Store.open(self.store), np.array(read_centers(self.folder))  # a copy: the map is read-only
        points, kept, _ = next(
            found for shard in range(store.num_shards) if len((found := self._rows(store, shard))[1])
        )
        contraction = choose_contraction(points, kept, centers)
        return partial(self._compute, store, Assignment(centers, contraction, device=resolve_device(self.device)))

    def _compute(self, store: Store, assignment: Assignment, shard: int) -> None:
        """Write the labels of a shard, unless that is done already."""
        if files.exists(self._removed_path(shard)) and files.exists(labels_path(self.folder, shard)):
            return
        points, kept, removed = self._rows(store, shard)
        labels, distance = assignment.assign(points, np.concatenate([kept, removed]))
        write_tensors(self._removed_path(shard), {"labels": labels[len(kept) :]}, {})
        found = Labels(kept.astype(np.uint32), labels[: len(kept)].astype(np.uint32), distance[: len(kept)])
        write_labels(self.folder, shard, found)

    def _rows(self, store: Store, shard: int) -> tuple[Points, Int[np.ndarray, " kept"], Int[np.ndarray, " removed"]]:
        kept, removed = kept_and_removed(store, self.groups, shard)
        valid = np.zeros(store.shards[shard].num_rows, bool)
        valid[kept] = valid[removed] = True
        return Points.of(store.image(shard), metric="cosine", valid=valid), kept, removed

    def labels(self, shard: int) -> tuple[Labels, Int32[np.ndarray, " removed"]]:
        """The labels of a finished shard, and those of its removed rows."""
        return read_labels(self.folder, shard), read_tensors(self._removed_path(shard))["labels"]

    def _removed_path(self, shard: int) -> str:
        return files.join(self.scratch, f"removed-{stem(shard)}.safetensors")
