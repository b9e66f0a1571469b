"""Find the center of largest inner product for every row: exact labels, the same on the CPU and on accelerators.

A label is that of the largest inner product in float64 of the stored row and the center, the first of equal ones. Fast
products only say which centers can be it; so tiles, devices and number formats decide the time and nothing else.

Example: ten rows in the directions 0, 20, ... 180 degrees and three centers at 0, 90 and 180. A row at 40 degrees has
the inner products 0.77, 0.64 and -0.77, so its label is 0, and its distance 1 - 0.77 = 0.23. The labels of all ten are
0 0 0 1 1 1 1 2 2 2.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float32, Int

from distilclip.clustering._assign_cpu import CenterSketches, update_labels
from distilclip.clustering._assign_gpu import DeviceCenters
from distilclip.clustering.sketches import Sketches, choose_projection
from distilclip.clustering.sums import CenterSums, DeviceSums
from distilclip.vectors.points import Points
from distilclip.vectors.projection import Projection

PART = 1 << 16  # rows whose sketches are held at a time where they are met once


@dataclass(frozen=True, kw_only=True)
class RowState:
    """Labels of the same rows, and on the CPU their sketches, from one round to the next.

    Labels are int32, -1 before the first round; those of a round are the guesses of the next.
    """

    labels: Int[np.ndarray, " n"]
    sketches: Sketches | None

    @classmethod
    def unlabelled(cls, count: int, sketches: Sketches | None) -> RowState:
        """Return the state before the first round."""
        return cls(labels=np.full(count, -1, np.int32), sketches=sketches)


class Assignment:
    """The centers of one round, ready to be compared with any rows."""

    def __init__(
        self,
        centers: Float32[np.ndarray, "k dim"],
        projection: Projection,
        *,
        device: str | torch.device | None = None,
    ) -> None:
        """`projection` is that of the rows' sketches; it decides about time on the CPU and nothing else."""
        self.centers = centers
        self._projection = projection
        device = torch.device(device or "cpu")
        self._ready: CenterSketches | DeviceCenters
        if device.type in ("cpu", "mps"):  # MPS has no float64 to decide with
            self._ready = CenterSketches.of(centers, projection)
        else:
            self._ready = DeviceCenters(torch.from_numpy(centers).to(device))

    def begin(self, points: Points, rows: Int[np.ndarray, " n"]) -> RowState:
        """Return the state of rows before their first round."""
        on_cpu = isinstance(self._ready, CenterSketches)
        sketches = Sketches.of(self._projection, points, rows) if on_cpu else None
        return RowState.unlabelled(len(rows), sketches)

    def begin_sums(self) -> CenterSums | DeviceSums:
        """Return the sums of no rows, where the rows are compared."""
        num_centers, dim = self.centers.shape
        if isinstance(self._ready, DeviceCenters):
            return DeviceSums(num_centers, dim, self._ready.centers.device)
        return CenterSums.zero(num_centers, dim)

    def update(
        self,
        state: RowState,
        points: Points,
        rows: Int[np.ndarray, " n"],
        *,
        sums: CenterSums | DeviceSums | None = None,
    ) -> Float32[np.ndarray, " n"]:
        """Find the rows' labels, in place, and add the rows to `sums`; return the cosine distances to their centers."""
        if isinstance(self._ready, DeviceCenters):
            assert not isinstance(sums, CenterSums), "rows on a device are summed there"
            return self._ready.update(state.labels, points, rows, sums)
        assert state.sketches is not None, "rows of the CPU have sketches"
        distance = update_labels(state.labels, state.sketches, points, rows, self._ready)
        if sums is not None:
            sums.add(points, rows, state.labels)
        return distance

    def assign(
        self, points: Points, rows: Int[np.ndarray, " n"]
    ) -> tuple[Int[np.ndarray, " n"], Float32[np.ndarray, " n"]]:
        """Return labels and distances of rows that are not met again; their sketches are made block by block."""
        labels, distance = np.empty(len(rows), np.int32), np.empty(len(rows), np.float32)
        for start in range(0, len(rows), PART):
            here = slice(start, min(start + PART, len(rows)))
            state = self.begin(points, rows[here])
            distance[here] = self.update(state, points, rows[here])
            labels[here] = state.labels
        return labels, distance


def assign(
    points: Points,
    centers: Float32[np.ndarray, "k dim"],
    *,
    rows: Int[np.ndarray, " n"] | None = None,
    device: str | torch.device | None = None,
) -> tuple[Int[np.ndarray, " n"], Float32[np.ndarray, " n"]]:
    """Return the unit center of largest inner product for every row, and the cosine distance to it.

    `device` is where products are computed: a CUDA device, or the CPU, which is the default and stands in for MPS.
    """
    rows = np.arange(len(points)) if rows is None else rows
    return Assignment(centers, choose_projection(points, rows, centers), device=device).assign(points, rows)
