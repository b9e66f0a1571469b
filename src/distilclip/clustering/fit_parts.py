"""Assign the rows of a store to centers in parts, whose results are files; any worker can compute any part.

A fit has rounds. In a round a part is a run of shards: its rows are assigned to the centers of the round, and the rows
of each cluster are summed in whole numbers, so that the sums of all parts add up to the same bits however the shards
are divided. A part writes the sums of the clusters that its rows are in, at most eight bytes a coordinate for each of
its rows; and for each shard what saves later rounds work: the rows' sketches, and their labels, which are the first
guesses there. Nothing but time depends on the files of a shard. When the fit is finished, every row is labelled once
more, and then a part is one shard.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from jaxtyping import Float32, Int, Int32, Int64

from distilclip import files
from distilclip.clustering.assignment import Assignment, RowState
from distilclip.clustering.sketches import Sketches, choose_projection, fastest_code
from distilclip.clustering.sums import CenterSums
from distilclip.data.images import ImageMatrix
from distilclip.data.side_files import Labels, kept_images, labels_path, read_centers, read_labels, write_labels
from distilclip.data.store import Store, stem
from distilclip.data.tensors import read_metadata, read_tensors, write_tensors
from distilclip.devices import resolve_device
from distilclip.vectors.points import Points
from distilclip.vectors.projection import Projection


@dataclass(frozen=True)
class ShardRun:
    """A part of a round: the shards from `first` to before `last`."""

    first: int
    last: int

    def __str__(self) -> str:
        return f"{stem(self.first)}-{stem(self.last)}"


def shard_runs(num_rows: Sequence[int], *, least: int) -> list[ShardRun]:
    """Return runs of shards with at least `least` rows each, but for the last; `num_rows` are those of every shard.

    With 40, 40, 50 and 10 rows and `least` 60 these are shards 0 to 1 with 80 rows and shards 2 to 3 with 60.
    """
    parts = []
    first = held = 0
    for shard, count in enumerate(num_rows):
        held += count
        if held >= least or shard == len(num_rows) - 1:
            parts.append(ShardRun(first, shard + 1))
            first, held = shard + 1, 0
    return parts


@dataclass(frozen=True, kw_only=True)
class Rounds:
    """The files of a fit, in a folder of its own, and the work of a part of a round."""

    store: str
    folder: str
    device: str

    def write_rows(self, rows: Int[np.ndarray, " n"]) -> None:
        """Write which rows of the store centers are fitted to, ascending."""
        write_tensors(self._path("rows"), {"rows": rows.astype(np.int64)}, {})

    def rows(self) -> Int64[np.ndarray, " n"]:
        """Return the rows of the store that centers are fitted to."""
        return read_tensors(self._path("rows"))["rows"]

    def write_projection(self, projection: Projection) -> None:
        """Write how rows and centers are sketched."""
        found = {"mean": projection.mean.numpy()}
        if projection.directions is not None:
            found["directions"] = projection.directions.numpy()
        write_tensors(self._path("projection"), found, {})

    def begin(self, number: int, centers: Float32[np.ndarray, "k dim"], objectives: Sequence[float]) -> None:
        """Write the centers of a round and the objectives of the rounds before, whose files are removed."""
        if not files.exists(self._path("centers", number)):  # else a run goes on in this round
            described = {"objectives": json.dumps(list(objectives))}
            write_tensors(self._path("centers", number), {"centers": centers}, described)
        if number:
            files.remove_folder(files.join(self.folder, f"{number - 1:04d}"))

    def current(self, most: int) -> int | None:
        """Return the last round, of `most` at most, that was begun; None before the first."""
        begun = [number for number in range(most + 1) if files.exists(self._path("centers", number))]
        return begun[-1] if begun else None

    def centers(self, number: int) -> Float32[np.ndarray, "k dim"]:
        """Return the centers of a round."""
        return read_tensors(self._path("centers", number))["centers"]

    def objectives(self, number: int) -> list[float]:
        """Return the objectives of the rounds before."""
        return json.loads(read_metadata(self._path("centers", number))["objectives"])

    def sums(self, number: int, parts: Sequence[ShardRun]) -> CenterSums:
        """Add up the sums that all parts found in a round."""
        sums = CenterSums.zero(*self.centers(number).shape)
        for part in parts:
            found = read_tensors(self._path(f"sums-{part}", number))
            sums.total[found["cluster"]] += found["total"]
            sums.count[found["cluster"]] += found["count"]
        return sums

    def prepare(self, number: int) -> Callable[[ShardRun], None]:
        """Read, in a worker, what all parts of a round share."""
        found = {name: torch.from_numpy(np.array(t)) for name, t in read_tensors(self._path("projection")).items()}
        projection = Projection(mean=found["mean"], directions=found.get("directions"))
        centers = np.array(self.centers(number))  # a copy: the file is mapped read-only
        assignment = Assignment(centers, projection, device=resolve_device(self.device))
        return partial(self._compute, number, ImageMatrix(Store.open(self.store)), self.rows(), assignment)

    def _compute(
        self, number: int, images: ImageMatrix, rows: np.ndarray, assignment: Assignment, part: ShardRun
    ) -> None:
        """Write the sums of a part's clusters in this round, unless that is done already."""
        path = self._path(f"sums-{part}", number)
        if files.exists(path):
            return
        sums = CenterSums.zero(*assignment.centers.shape)
        for shard in range(part.first, part.last):
            start, stop = images.starts[shard : shard + 2].tolist()
            here = rows[np.searchsorted(rows, start) : np.searchsorted(rows, stop)] - start  # counted in the shard
            if len(here):
                points = Points.of(images.read(start, stop), metric="cosine", valid=images.valid(start, stop))
                labels = self._labels(shard, points, here, assignment)
                sums.move(points, here, np.full(len(here), -1, np.int32), labels)
        cluster = np.flatnonzero(sums.count)
        write_tensors(path, {"cluster": cluster, "total": sums.total[cluster], "count": sums.count[cluster]}, {})

    def _labels(
        self, shard: int, points: Points, rows: Int[np.ndarray, " n"], assignment: Assignment
    ) -> Int[np.ndarray, " n"]:
        """Return the labels of a shard's rows; those of the round before are the guesses."""
        path = self._path(f"labels-{stem(shard)}")
        state = self._row_state(shard, points, rows, assignment)
        if files.exists(path):
            state.labels[:] = read_tensors(path)["labels"]
        assignment.update(state, points, rows)
        write_tensors(path, {"labels": state.labels}, {})
        return state.labels

    def _row_state(self, shard: int, points: Points, rows: Int[np.ndarray, " n"], assignment: Assignment) -> RowState:
        """Return the state of a shard's rows without labels, with the sketches of the first round."""
        path = self._path(f"sketches-{stem(shard)}")
        if files.exists(path):
            found = Sketches(**{name: np.array(tensor) for name, tensor in read_tensors(path).items()})
            if found.code.dtype == fastest_code():  # else made on another kind of machine
                return RowState.unlabelled(len(rows), found)
        state = assignment.begin(points, rows)
        if state.sketches is not None:
            write_tensors(path, vars(state.sketches), {})
        return state

    def _path(self, name: str, number: int | None = None) -> str:
        folder = self.folder if number is None else files.join(self.folder, f"{number:04d}")
        return files.join(folder, f"{name}.safetensors")


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
