"""Fit centers to the rows of a store in parts, whose results are files; any worker can compute any part.

A fit has rounds, and a round has two waves of parts. In the first a part is a range of shards: its rows are assigned to
the centers of the round, and the rows of each cluster are summed in whole numbers. It writes the sums of all clusters;
and for each shard what saves work later: the rows' sketches, and their labels, which are the first guesses of the next
round, and which a part that is computed again need not find again. In the second wave a part is a range of centers: the
sums of all parts of the first wave are added up there, to the same bits however the shards were divided, and give the
centers of the next round. So no process but a worker ever holds centers or sums, and no thread adds up all of them.

The folder of round 3 (`0003`) holds `begun`, without which there is no round 3: the objectives of rounds 0 to 2 and the
few centers that were split; `centers-*` of each range, which round 2 wrote; `sums-*` of each range of shards; and
`tally-*` of each range of centers, which is all that the driver reads of them.
"""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from jaxtyping import Float32, Int, Int64

from distilclip import files
from distilclip.clustering.assignment import Assignment, RowState
from distilclip.clustering.sketches import Sketches, fastest_code
from distilclip.clustering.sums import CenterSums, DeviceSums, Tally, check_count, split
from distilclip.data.images import ImageMatrix
from distilclip.data.side_files import write_centers
from distilclip.data.store import Store, stem
from distilclip.data.tensors import read_metadata, read_rows, read_tensors, write_tensors
from distilclip.devices import resolve_device
from distilclip.vectors.points import Points
from distilclip.vectors.projection import Projection

NUMBERS = 1 << 22  # of a range of centers: 16 MiB of centers, and 32 MiB of the sums of a part
PARTS = 4  # of the first wave for each worker, so that none waits long for another
ROWS_PER_CENTER = 8  # of such a part, at least: its sums then have at most half as many bytes as its rows


@dataclass(frozen=True)
class Range:
    """A part: the shards, or the centers, from `first` to before `last`."""

    first: int
    last: int

    def __str__(self) -> str:
        return f"{stem(self.first)}-{stem(self.last)}"


def shard_ranges(num_rows: Sequence[int], *, num_parts: int) -> list[Range]:
    """Return ranges of shards with equal numbers of rows, as far as shards allow; `num_rows` are those of every shard.

    With 40, 40, 50 and 10 rows and two parts these are shards 0 to 1 with 80 rows and shards 2 to 3 with 60.
    """
    least = -(-sum(num_rows) // num_parts)
    parts = []
    first = held = 0
    for shard, count in enumerate(num_rows):
        held += count
        if held >= least or shard == len(num_rows) - 1:
            parts.append(Range(first, shard + 1))
            first, held = shard + 1, 0
    return parts


def center_ranges(num_centers: int, dim: int) -> list[Range]:
    """Return the ranges of centers, which depend on nothing else: a run may go on with other workers."""
    size = max(1, NUMBERS // dim)
    return [Range(first, min(first + size, num_centers)) for first in range(0, num_centers, size)]


def choose_num_parts(num_rows: int, *, num_centers: int, num_workers: int) -> int:
    """Return in how many parts rows are assigned and summed.

    Each part writes eight bytes for each coordinate of each center: few parts write little, many keep all workers busy.
    With 64 million rows, a million centers and 8 workers these are 8; with 225 million rows 28; with one worker one.
    """
    if num_workers == 1:
        return 1
    few_bytes = num_rows // (ROWS_PER_CENTER * num_centers)
    return min(max(num_workers, min(PARTS * num_workers, few_bytes)), num_rows // num_centers)


@dataclass(frozen=True, kw_only=True)
class Rounds:
    """The files of a fit, in a folder of its own, and the work of the parts of a round."""

    store: str
    folder: str
    device: str
    num_centers: int
    dim: int

    @property
    def ranges(self) -> list[Range]:
        """The parts of the second wave of every round."""
        return center_ranges(self.num_centers, self.dim)

    def start(self, rows: Int[np.ndarray, " n"], projection: Projection, centers: Float32[np.ndarray, "k dim"]) -> None:
        """Begin the first round: with which rows centers are fitted to, how they are sketched, and first centers."""
        write_tensors(self._path("rows"), {"rows": rows.astype(np.int64)}, {})
        found = {"mean": projection.mean.numpy()}
        if projection.directions is not None:
            found["directions"] = projection.directions.numpy()
        write_tensors(self._path("projection"), found, {})
        for here in self.ranges:
            write_tensors(self._path(f"centers-{here}", 0), {"centers": centers[here.first : here.last]}, {})
        self._begin(0, [], {})

    def resume(self, most: int) -> int | None:
        """Return the last round, of `most` at most, that was begun; None before the first.

        Without one, what an older version began, or a start that was not finished, is removed.
        """
        begun = [number for number in range(most + 1) if files.exists(self._path("begun", number))]
        if not begun:
            files.remove_folder(self.folder)
            return None
        return begun[-1]

    def objectives(self, number: int) -> list[float]:
        """Return the objectives of the rounds before."""
        return json.loads(read_metadata(self._path("begun", number))["objectives"])

    def rows(self) -> Int64[np.ndarray, " n"]:
        """Return the rows of the store that centers are fitted to."""
        return read_tensors(self._path("rows"))["rows"]

    def tally(self, number: int) -> Tally:
        """Return what a round found of each cluster."""
        found = [read_tensors(self._path(f"tally-{here}", number)) for here in self.ranges]
        names = ("count", "length", "cosine")
        return Tally(**{name: np.concatenate([tally[name] for tally in found]) for name in names})

    def begin_next(self, number: int, tally: Tally, objectives: Sequence[float]) -> bool:
        """Begin the round after `number`, unless its centers are the same; return whether it was begun.

        Empty clusters are split here: it takes few centers and is done one after the other.
        """
        pairs = tally.splits()
        moved = any(read_tensors(self._path(f"tally-{here}", number))["moved"].any() for here in self.ranges)
        if not moved and not pairs:
            return False
        wanted = set(itertools.chain.from_iterable(pairs))
        centers: dict[int, Float32[np.ndarray, " dim"]] = {}
        for here in self.ranges:
            if found := wanted.intersection(range(here.first, here.last)):
                table = read_tensors(self._path(f"centers-{here}", number + 1))["centers"]
                centers |= {center: np.array(table[center - here.first]) for center in found}
        split(centers, pairs)
        self._begin(number + 1, objectives, centers)
        return True

    def _begin(
        self, number: int, objectives: Sequence[float], centers: Mapping[int, Float32[np.ndarray, " dim"]]
    ) -> None:
        """Write what begins a round: the objectives so far, the centers that were split. Remove what is of no use."""
        index = np.array(sorted(centers), np.int64)
        table = np.array([centers[center] for center in index.tolist()], np.float32).reshape(-1, self.dim)
        described = {"objectives": json.dumps(list(objectives))}
        write_tensors(self._path("begun", number), {"index": index, "centers": table}, described)
        if number > 1:  # of the round before, workers remove the sums, which are large
            files.remove_folder(files.join(self.folder, f"{number - 2:04d}"))

    def prepare_sums(self, number: int) -> Callable[[Range], None]:
        """Read, in a worker, what all parts of the first wave of a round share."""
        found = {name: torch.from_numpy(np.array(t)) for name, t in read_tensors(self._path("projection")).items()}
        projection = Projection(mean=found["mean"], directions=found.get("directions"))
        assignment = Assignment(self.centers(number), projection, device=resolve_device(self.device))
        return partial(self._sum, number, ImageMatrix(Store.open(self.store)), self.rows(), assignment)

    def centers(self, number: int) -> Float32[np.ndarray, "k dim"]:
        """Return the centers of a round."""
        centers = np.empty((self.num_centers, self.dim), np.float32)
        for here in self.ranges:
            centers[here.first : here.last] = self._centers(number, here)
        return centers

    def _centers(self, number: int, here: Range) -> Float32[np.ndarray, "k dim"]:
        """Return a range of the centers of a round, a copy."""
        centers = np.array(read_tensors(self._path(f"centers-{here}", number))["centers"])
        after_splits = read_tensors(self._path("begun", number))
        first, last = np.searchsorted(after_splits["index"], [here.first, here.last])
        centers[after_splits["index"][first:last] - here.first] = after_splits["centers"][first:last]
        return centers

    def _sum(self, number: int, images: ImageMatrix, rows: np.ndarray, assignment: Assignment, part: Range) -> None:
        """Write the sums of a range of shards in this round, unless that is done already."""
        path, former = (self._path(f"sums-{part}", of) for of in (number, number - 1))
        if files.exists(path):
            return
        if number and files.exists(former):
            with contextlib.suppress(FileNotFoundError):  # the same part is computed somewhere else, too
                files.remove(former)
        sums = assignment.begin_sums()
        for shard in range(part.first, part.last):
            start, stop = images.starts[shard : shard + 2].tolist()
            here = rows[np.searchsorted(rows, start) : np.searchsorted(rows, stop)] - start  # counted in the shard
            if len(here):
                points = Points.of(images.read(start, stop), metric="cosine", valid=images.valid(start, stop))
                self._add_shard(number, shard, points, here, assignment, sums)
        found = sums.on_host()
        write_tensors(path, {"total": found.total, "count": found.count}, {})

    def _add_shard(
        self,
        number: int,
        shard: int,
        points: Points,
        rows: Int[np.ndarray, " n"],
        assignment: Assignment,
        sums: CenterSums | DeviceSums,
    ) -> None:
        """Label rows of a shard and add them to the sums; labels of the round before are the guesses."""
        path = self._path(f"labels-{stem(shard)}")
        guesses = np.array(read_tensors(path)["labels"]) if files.exists(path) else None
        if guesses is not None and read_metadata(path)["round"] == str(number):  # of a part that was not finished
            sums.add(points, rows, guesses)
            return
        state = self._row_state(shard, points, rows, assignment)
        if guesses is not None:
            state.labels[:] = guesses
        assignment.update(state, points, rows, sums=sums)
        write_tensors(path, {"labels": state.labels}, {"round": str(number)})

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

    def prepare_move(self, number: int, parts: Sequence[Range]) -> Callable[[Range], None]:
        """Return the work of the second wave of a round, of which `parts` are the first."""
        return partial(self._move, number, parts)

    def _move(self, number: int, parts: Sequence[Range], here: Range) -> None:
        """Add up the sums of a range of centers, and write where these move to and what was found of them."""
        path = self._path(f"tally-{here}", number)
        if files.exists(path):
            return
        sums = CenterSums.zero(here.last - here.first, self.dim)
        for part in parts:
            found = self._path(f"sums-{part}", number)
            sums.total[:] += read_rows(found, "total", here.first, here.last)
            sums.count[:] += read_rows(found, "count", here.first, here.last)
        check_count(sums.count)
        centers = self._centers(number, here)
        tally = sums.tally(centers)
        moved = sums.renew(centers, tally.length).astype(np.int8)
        write_tensors(self._path(f"centers-{here}", number + 1), {"centers": centers}, {})
        write_tensors(path, {**vars(tally), "moved": moved}, {})

    def prepare_centers(self, number: int) -> Callable[[str], None]:
        """Return the last part of a fit: it writes the centers of a round into the cluster folder that it is given."""
        return partial(self._write_centers, number)

    def _write_centers(self, number: int, folder: str) -> None:
        teacher = Store.open(self.store).teacher
        described = {f"teacher_{name}": str(teacher[name]) for name in ("name", "digest")}
        write_centers(folder, self.centers(number), described)

    def _path(self, name: str, number: int | None = None) -> str:
        folder = self.folder if number is None else files.join(self.folder, f"{number:04d}")
        return files.join(folder, f"{name}.safetensors")
