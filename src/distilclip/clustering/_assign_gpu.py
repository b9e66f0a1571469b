"""Find the nearest center of every row on an accelerator: bfloat16 products propose centers, float64 decides."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import BFloat16, Bool, Float32, Float64, Int
from torch import Tensor

from distilclip.clustering._assign_cpu import SLACK
from distilclip.clustering.sums import DeviceSums
from distilclip.vectors.kernels import ROUNDING, float32_sums
from distilclip.vectors.points import Points

ROWS = 8192  # rows and centers of a product on an accelerator: 256 MiB of float32
RUN = 16  # neighbouring centers whose largest product is kept, and of which all are compared again if it comes close
EXTRA = 8  # columns that add a center's offset to a product; 8 keeps rows aligned for tensor cores
DECIDED = 1 << 24  # elements of centers in float64 at a time


class DeviceCenters:
    """Centers in bfloat16 on a device, measured from their mean, with their offsets in further columns.

    Products in bfloat16, summed in float32, leave a few centers to be compared in float64.
    """

    def __init__(self, centers: Float32[Tensor, "k dim"]) -> None:
        self.centers = centers
        # Centers lie in a narrow cone: measured from their mean, bfloat16 keeps more of what tells them apart.
        self.origin = centers.mean(dim=0)
        centered = centers - self.origin
        padded = -(-len(centers) // RUN) * RUN
        self.code = centers.new_zeros((padded, centers.shape[1] + EXTRA), dtype=torch.bfloat16)
        self.code[: len(centers), :-EXTRA] = centered
        self.length = float(centered.norm(dim=1).max())
        self.residual = float((centered - self.code[: len(centers), :-EXTRA].float()).norm(dim=1).max())
        # x . c = (x - origin) . (c - origin) + (c - origin) . origin + x . origin; the last is equal for all centers.
        offset = centers.new_full((padded,), -4.0)  # below every inner product of unit vectors: no center there
        offset[: len(centers)] = centered @ self.origin
        for column in range(-EXTRA, -EXTRA + 3):  # 24 bits in three numbers of 8
            self.code[:, column] = offset
            offset = offset - self.code[:, column].float()

    @torch.no_grad()
    def update(
        self,
        labels: Int[np.ndarray, " n"],
        points: Points,
        rows: Int[np.ndarray, " n"],
        sums: DeviceSums | None = None,
    ) -> Float32[np.ndarray, " n"]:
        """Write the rows' labels and add the rows to `sums`; return the cosine distances.

        Rows travel as they are stored, once.
        """
        distance = np.empty(len(rows), np.float32)
        for start in range(0, len(rows), ROWS):
            here = slice(start, min(start + ROWS, len(rows)))
            values = torch.from_numpy(points.values[rows[here]]).to(self.centers.device)
            scale = torch.from_numpy(points.scale[rows[here]]).to(self.centers.device)
            label, best = self.nearest(values, scale)
            if sums is not None:
                sums.add_block(values, scale, label)
            labels[here] = label.cpu().numpy()
            distance[here] = (1 - best).clamp_(min=0).cpu().numpy()
        return distance

    def nearest(self, values: Tensor, scale: Float64[Tensor, " m"]) -> tuple[Int[Tensor, " m"], Float64[Tensor, " m"]]:
        """Return label and exact inner product of a block of rows."""
        # The rows [m, dim + EXTRA] in bfloat16, measured from the origin, with ones that meet the offsets.
        row = values.float() * scale[:, None].float() - self.origin
        code = row.new_zeros((len(row), self.code.shape[1]), dtype=torch.bfloat16)
        code[:, :-EXTRA] = row
        code[:, -EXTRA : -EXTRA + 3] = 1
        # How far a product may lie from the real one: what bfloat16 leaves out of rows and centers, and the sum.
        length = row.norm(dim=1)
        loss = (row - code[:, :-EXTRA].float()).norm(dim=1)
        error = loss * self.length + (length + loss) * self.residual + SLACK
        error += code.shape[1] * ROUNDING * (length * self.length + 1)  # of the sum in float32
        # The largest product of each run of centers [m, runs]: sixteen times fewer numbers to look through.
        largest = row.new_empty((len(row), len(self.code) // RUN))
        for start in range(0, len(self.code), ROWS):
            with float32_sums():
                tile = _product(code, self.code[start : start + ROWS])
            torch.amax(tile.view(len(row), -1, RUN), dim=2, out=largest[:, start // RUN : (start + ROWS) // RUN])
        # Only a run whose largest product is within both errors of the best can hold the nearest center.
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
            # A pair of a row and a run: the exact products with the run's centers, and the first of the largest.
            center = run[start : start + step, None] * RUN + torch.arange(RUN, device=run.device)
            here = self.centers[center.clamp(max=len(self.centers) - 1)].double()
            product = torch.einsum("prd,pd->pr", here, values[row[start : start + step]].double())
            product.masked_fill_(center >= len(self.centers), -torch.inf)
            largest = product.amax(dim=1, keepdim=True)
            found.append(largest[:, 0])
            label.append(torch.where(product == largest, center, len(self.centers)).amin(dim=1))
        # Of the pairs of one row: the largest product, and of equal ones the first center.
        product, center = torch.cat(found), torch.cat(label)
        best = product.new_full((len(near),), -torch.inf).scatter_reduce_(0, row, product, "amax")
        center = torch.where(product == best[row], center, len(self.centers))
        first = center.new_full((len(near),), len(self.centers)).scatter_reduce_(0, row, center, "amin")
        return first, best * scale


def _product(left: BFloat16[Tensor, "n dim"], right: BFloat16[Tensor, "m dim"]) -> Float32[Tensor, "n m"]:
    """Multiply bfloat16 matrices, summed and given in float32; only CUDA has it as one product."""
    if left.device.type == "cuda":
        return torch.mm(left, right.T, out_dtype=torch.float32)
    return torch.mm(left.float(), right.float().T)
