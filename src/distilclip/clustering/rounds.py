"""Rounds of k-means over a store, in parts: a part is a run of shards, and all that it finds lies in files.

A round assigns every row to the centers of the round and sums the rows of each cluster, in whole numbers: the sums of
all parts add up to the same bits however the shards are divided. A part writes the sums of the clusters that its rows
are in, at most eight bytes a coordinate for each of its rows, and for each shard what spares later rounds work: the
rows' sketches and their labels, which are guesses there. Nothing but time depends on the files of a shard.
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
from distilclip.clustering.assignment import Assignment, Known
from distilclip.clustering.sketches import Sketches, choose_projection, fastest_code
from distilclip.clustering.sums import CenterSums
from distilclip.data.images import ImageMatrix
from distilclip.data.side_files import Labels, labels_path, read_centers, read_groups, read_labels, write_labels
from distilclip.data.store import Store, stem
from distilclip.data.tensors import read_metadata, read_tensors, write_tensors
from distilclip.devices import resolve_device
from distilclip.errors import InputError
from distilclip.vectors.points import Points
from distilclip.vectors.projection import Projection


@dataclass(frozen=True)
class Part:
    """Shards from `first` to before `last`."""

    first: int
    last: int

    def __str__(self) -> str:
        return f"{stem(self.first)}-{stem(self.last)}"


def parts_of(num_rows: Sequence[int], *, least: int) -> list[Part]:
    """Runs of shards with at least so many rows each, but for the last; `num_rows` are those of every shard."""
    parts = []
    first = held = 0
    for shard, count in enumerate(num_rows):
        held += count
        if held >= least or shard == len(num_rows) - 1:
            parts.append(Part(first, shard + 1))
            first, held = shard + 1, 0
    return parts


@dataclass(frozen=True, kw_only=True)
class Rounds:
    """The files of a fit, in a folder of its own, and the work of a part."""

    store: str
    folder: str
    device: str

    def write_rows(self, rows: Int[np.ndarray, " n"]) -> None:
        """Say which rows of the store centers are fitted to, ascending."""
        write_tensors(self._path("rows"), {"rows": rows.astype(np.int64)}, {})

    def rows(self) -> Int64[np.ndarray, " n"]:
        """The rows of the store that centers are fitted to."""
        return read_tensors(self._path("rows"))["rows"]

    def write_projection(self, projection: Projection) -> None:
        """Say how rows and centers are sketched."""
        found = {"mean": projection.mean.numpy()}
        if projection.directions is not None:
            found["directions"] = projection.directions.numpy()
        write_tensors(self._path("projection"), found, {})

    def begin(self, number: int, centers: Float32[np.ndarray, "k dim"], objectives: Sequence[float]) -> None:
        """Write the centers of a round, and the objectives of the rounds before."""
        described = {"objectives": json.dumps(list(objectives))}
        write_tensors(self._path("centers", number), {"centers": centers}, described)
        if number:
            files.remove_folder(files.join(self.folder, f"{number - 1:04d}"))

    def current(self, most: int) -> int | None:
        """The last round, of at most so many, that was begun; None before the first."""
        begun = [number for number in range(most + 1) if files.exists(self._path("centers", number))]
        return begun[-1] if begun else None

    def centers(self, number: int) -> Float32[np.ndarray, "k dim"]:
        """The centers of a round."""
        return read_tensors(self._path("centers", number))["centers"]

    def objectives(self, number: int) -> list[float]:
        """The objectives of the rounds before."""
        return json.loads(read_metadata(self._path("centers", number))["objectives"])

    def sums(self, number: int, parts: Sequence[Part]) -> CenterSums:
        """The sums that all parts found in a round, added up."""
        sums = CenterSums.zero(*self.centers(number).shape)
        for part in parts:
            found = read_tensors(self._path(f"sums-{part}", number))
            sums.total[found["cluster"]] += found["total"]
            sums.count[found["cluster"]] += found["count"]
        return sums

    def prepare(self, number: int) -> Callable[[Part], None]:
        """In a worker: read what all parts of a round share."""
        found = {name: torch.from_numpy(np.array(t)) for name, t in read_tensors(self._path("projection")).items()}
        projection = Projection(mean=found["mean"], directions=found.get("directions"))
        centers = np.array(self.centers(number))  # a copy: the file is mapped read-only
        assignment = Assignment(centers, projection, device=resolve_device(self.device))
        return partial(self._compute, number, ImageMatrix(Store.open(self.store)), self.rows(), assignment)

    def _compute(self, number: int, images: ImageMatrix, rows: np.ndarray, assignment: Assignment, part: Part) -> None:
        """Write the sums of a part's clusters in this round, unless that is done already."""
        path = self._path(f"sums-{part}", number)
        if files.exists(path):
            return
        sums = CenterSums.zero(*assignment.centers.shape)
        for shard in range(part.first, part.last):
            start, stop = images.starts[shard : shard + 2].tolist()
            here = rows[np.searchsorted(rows, start) : np.searchsorted(rows, stop)] - start
            if len(here):
                points = Points.of(images.read(start, stop), metric="cosine", valid=images.valid(start, stop))
                labels = self._labels(shard, points, here, assignment)
                sums.move(points, here, np.full(len(here), -1, np.int32), labels)
        cluster = np.flatnonzero(sums.count)
        write_tensors(path, {"cluster": cluster, "total": sums.total[cluster], "count": sums.count[cluster]}, {})

    def _labels(
        self, shard: int, points: Points, rows: Int[np.ndarray, " n"], assignment: Assignment
    ) -> Int[np.ndarray, " n"]:
        """The labels of a shard's rows; those of the round before are the guesses."""
        path = self._path(f"labels-{stem(shard)}")
        known = self._known(shard, points, rows, assignment)
        if files.exists(path):
            known.labels[:] = read_tensors(path)["labels"]
        assignment.update(known, points, rows)
        write_tensors(path, {"labels": known.labels}, {})
        return known.labels

    def _known(self, shard: int, points: Points, rows: Int[np.ndarray, " n"], assignment: Assignment) -> Known:
        """A shard's rows without labels, with the sketches of the first round."""
        path = self._path(f"sketches-{stem(shard)}")
        if files.exists(path):
            found = Sketches(**{name: np.array(tensor) for name, tensor in read_tensors(path).items()})
            if found.code.dtype == fastest_code():  # else made on another kind of machine
                return Known.unlabelled(len(rows), found)
        known = assignment.begin(points, rows)
        if known.sketches is not None:
            write_tensors(path, vars(known.sketches), {})
        return known

    def _path(self, name: str, number: int | None = None) -> str:
        folder = self.folder if number is None else files.join(self.folder, f"{number:04d}")
        return files.join(folder, f"{name}.safetensors")


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
        kept, removed = kept_and_removed(store, self.groups, shard)
        valid = np.zeros(store.shards[shard].num_rows, bool)
        valid[kept] = valid[removed] = True
        return Points.of(store.image(shard), metric="cosine", valid=valid), kept, removed

    def labels(self, shard: int) -> tuple[Labels, Int32[np.ndarray, " removed"]]:
        """The labels of a finished shard, and those of its removed rows."""
        return read_labels(self.folder, shard), read_tensors(self._removed_path(shard))["labels"]

    def _removed_path(self, shard: int) -> str:
        return files.join(self.scratch, f"removed-{stem(shard)}.safetensors")
