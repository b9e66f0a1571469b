"""The center of largest inner product for every row: exact labels, on the CPU or an accelerator, from one definition.

A label is that of the largest inner product in float64 of the stored row and the center, the first of equal ones. Fast
products only say which centers can be it; so tiles, devices and number formats decide the time and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import BFloat16, Bool, Float32, Float64, Int
from torch import Tensor

from distilclip.clustering.assign_cpu import SLACK, CenterSketches, update_labels
from distilclip.clustering.sketches import Sketches, choose_projection
from distilclip.vectors.kernels import ROUNDING, float32_sums
from distilclip.vectors.points import Points
from distilclip.vectors.projection import Projection

PART = 1 << 16  # rows whose sketches are held at a time where they are met once
ROWS = 8192  # rows and centers of a product on an accelerator: 256 MiB of float32
RUN = 16  # neighbouring centers whose largest product is kept, and of which all are compared again if it comes close
EXTRA = 8  # columns that add a center's offset to a product; 8 keeps rows aligned for tensor cores
DECIDED = 1 << 24  # elements of centers in float64 at a time


@dataclass(frozen=True, kw_only=True)
class RowState:
    """What is kept of the same rows between rounds: the labels, and on the CPU the sketches.

    Labels are int32, -1 before the first round; those of a round are the guesses of the next.
    """

    labels: Int[np.ndarray, " n"]
    sketches: Sketches | None

    @classmethod
    def unlabelled(cls, count: int, sketches: Sketches | None) -> RowState:
        """Before the first round."""
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

    def update(self, state: RowState, points: Points, rows: Int[np.ndarray, " n"]) -> Float32[np.ndarray, " n"]:
        """Find the rows' labels, in place; the cosine distances to their centers."""
        if isinstance(self._ready, DeviceCenters):
            return self._ready.update(state.labels, points, rows)
        assert state.sketches is not None, "rows of the CPU have sketches"
        return update_labels(state.labels, state.sketches, points, rows, self._ready)

    def assign(
        self, points: Points, rows: Int[np.ndarray, " n"]
    ) -> tuple[Int[np.ndarray, " n"], Float32[np.ndarray, " n"]]:
        """Labels and distances of rows that are not met again; their sketches are made block by block."""
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
    """The unit center of largest inner product for every row, and the cosine distance to it; ties to the first.

    `device` is where products are computed: a CUDA device, or the CPU, which is the default and stands in for MPS.
    """
    rows = np.arange(len(points)) if rows is None else rows
    return Assignment(centers, choose_projection(points, rows, centers), device=device).assign(points, rows)


class DeviceCenters:
    """Centers in bfloat16 on a device, measured from their mean, with their offsets in further columns.

    Products in bfloat16, summed in float32, leave a few centers to be compared in float64.
    """

    def __init__(self, centers: Float32[Tensor, "k dim"]) -> None:
        self.centers = centers
        self.origin = centers.mean(dim=0)
        centered = centers - self.origin
        padded = -(-len(centers) // RUN) * RUN
        self.code = centers.new_zeros((padded, centers.shape[1] + EXTRA), dtype=torch.bfloat16)
        self.code[: len(centers), :-EXTRA] = centered
        self.length = float(centered.norm(dim=1).max())
        self.residual = float((centered - self.code[: len(centers), :-EXTRA].float()).norm(dim=1).max())
        offset = centers.new_full((padded,), -4.0)  # below every inner product of unit vectors: no center there
        offset[: len(centers)] = centered @ self.origin
        for column in range(-EXTRA, -EXTRA + 3):  # 24 bits in three numbers of 8
            self.code[:, column] = offset
            offset = offset - self.code[:, column].float()

    @torch.no_grad()
    def update(
        self, labels: Int[np.ndarray, " n"], points: Points, rows: Int[np.ndarray, " n"]
    ) -> Float32[np.ndarray, " n"]:
        """Write the rows' labels; the cosine distances. Rows travel as they are stored."""
        distance = np.empty(len(rows), np.float32)
        for start in range(0, len(rows), ROWS):
            here = slice(start, min(start + ROWS, len(rows)))
            values = torch.from_numpy(points.values[rows[here]]).to(self.centers.device)
            scale = torch.from_numpy(points.scale[rows[here]]).to(self.centers.device)
            label, best = self.nearest(values, scale)
            labels[here] = label.cpu().numpy()
            distance[here] = (1 - best).clamp_(min=0).cpu().numpy()
        return distance

    def nearest(self, values: Tensor, scale: Float64[Tensor, " m"]) -> tuple[Int[Tensor, " m"], Float64[Tensor, " m"]]:
        """Label and exact inner product of a block of rows."""
        row = values.float() * scale[:, None].float() - self.origin
        code = row.new_zeros((len(row), self.code.shape[1]), dtype=torch.bfloat16)
        code[:, :-EXTRA] = row
        code[:, -EXTRA : -EXTRA + 3] = 1
        length = row.norm(dim=1)
        loss = (row - code[:, :-EXTRA].float()).norm(dim=1)
        error = loss * self.length + (length + loss) * self.residual + SLACK
        error += code.shape[1] * ROUNDING * (length * self.length + 1)  # of the sum in float32
        largest = row.new_empty((len(row), len(self.code) // RUN))
        for start in range(0, len(self.code), ROWS):
            with float32_sums():
                tile = _product(code, self.code[start : start + ROWS])
            torch.amax(tile.view(len(row), -1, RUN), dim=2, out=largest[:, start // RUN : (start + ROWS) // RUN])
        near = largest >= (largest.amax(dim=1) - 2 * error)[:, None]
        return self._decide(values, scale, near)

    def _decide(
        self, values: Tensor, scale: Float64[Tensor, " m"], near: Bool[Tensor, "m runs"]
    ) -> tuple[Int[Tensor, " m"], Float64[Tensor, " m"]]:
        """Compare a row in float64 with all centers of the runs that are near to it."""
        row, run = near.nonzero(as_tuple=True)
        step = max(1, DECIDED // (RUN * values.shape[1]))
        found, label = [], []
        for start in range(0, len(row), step):
            center = run[start : start + step, None] * RUN + torch.arange(RUN, device=run.device)
            here = self.centers[center.clamp(max=len(self.centers) - 1)].double()
            product = torch.einsum("prd,pd->pr", here, values[row[start : start + step]].double())
            product.masked_fill_(center >= len(self.centers), -torch.inf)
            largest = product.amax(dim=1, keepdim=True)
            found.append(largest[:, 0])
            label.append(torch.where(product == largest, center, len(self.centers)).amin(dim=1))
        product, center = torch.cat(found), torch.cat(label)
        best = product.new_full((len(near),), -torch.inf).scatter_reduce_(0, row, product, "amax")
        center = torch.where(product == best[row], center, len(self.centers))
        first = center.new_full((len(near),), len(self.centers)).scatter_reduce_(0, row, center, "amin")
        return first, best * scale


def _product(left: BFloat16[Tensor, "n dim"], right: BFloat16[Tensor, "m dim"]) -> Float32[Tensor, "n m"]:
    """bfloat16 times bfloat16, summed and given in float32; only CUDA has it as one product."""
    if left.device.type == "cuda":
        return torch.mm(left, right.T, out_dtype=torch.float32)
    return torch.mm(left.float(), right.float().T)
