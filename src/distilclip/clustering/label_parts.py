"""Label the rows of a store with the nearest of fitted centers, in parts; a part is a shard, computed by any worker."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from jaxtyping import Int, Int32

from distilclip import files
from distilclip.clustering.assignment import Assignment
from distilclip.clustering.sketches import choose_projection
from distilclip.data.side_files import Labels, kept_images, labels_path, read_centers, read_labels, write_labels
from distilclip.data.store import Store, stem
from distilclip.data.tensors import read_tensors, write_tensors
from distilclip.devices import resolve_device
from distilclip.vectors.points import Points


@dataclass(frozen=True, kw_only=True)
class Labelling:
    """The final assignment of all rows to the centers of a cluster folder; a part is a shard."""

    store: str
    groups: str | None
    folder: str
    scratch: str  # a folder for labels of removed rows (only counted)
    device: str

    def prepare(self) -> Callable[[int], None]:
        """Read the centers, in a worker, and sketch them as suits the first rows that are kept."""
        store, centers = Store.open(self.store), np.array(read_centers(self.folder))  # a copy: the map is read-only
        points, kept, _ = next(
            found for shard in range(store.num_shards) if len((found := self._rows(store, shard))[1])
        )
        projection = choose_projection(points, kept, centers)
        return partial(self._compute, store, Assignment(centers, projection, device=resolve_device(self.device)))

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
        """Return a shard's points, and which of them are kept and which removed."""
        there = store.columns(shard, "has_image")["has_image"].to_numpy()
        keep = kept_images(store, shard, self.groups)
        points = Points.of(store.image(shard), metric="cosine", valid=there)
        return points, np.flatnonzero(keep), np.flatnonzero(there & ~keep)

    def labels(self, shard: int) -> tuple[Labels, Int32[np.ndarray, " removed"]]:
        """Return the labels of a finished shard, and those of its removed rows."""
        return read_labels(self.folder, shard), read_tensors(self._removed_path(shard))["labels"]

    def _removed_path(self, shard: int) -> str:
        return files.join(self.scratch, f"removed-{stem(shard)}.safetensors")
