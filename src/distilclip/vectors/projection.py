"""Project points to few dimensions so that no two move apart: a distance there is a lower bound of the real one.

Points are projected on the leading principal directions of a sample, and the length of what the projection leaves of a
point is kept as one more coordinate: |x - y|^2 >= |px - py|^2 + (rx - ry)^2. Any orthonormal directions give a valid
bound; principal ones make it tight.

Example: with the mean (0, 0, 0) and the one direction (1, 0, 0), the points

    a = (3, 0, 4) -> (3, 4)    b = (3, 4, 0) -> (3, 4)    c = (0, 0, 1) -> (0, 1)

are at the distances |a - b| = 5.66 and |a - c| = 4.24; their projections at 0 and 4.24. Neither is larger than before.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import BFloat16, Float, Float32, Int
from torch import Tensor

from distilclip.vectors.kernels import ROUNDING
from distilclip.vectors.points import Points
from distilclip.vectors.threads import in_threads

TERMS = 128  # terms of a float32 sum before it is added to the next: bounds its rounding error
BLOCK = 1024  # points projected at a time
SAMPLE = 8192  # points that the principal directions come from


@dataclass(frozen=True, kw_only=True)
class Projected:
    """Projected points in bfloat16: |value_i - value_j| <= |x_i - x_j| + 2 error, `error` bounding all rounding.

    No point is farther than `radius` from the projection's mean, and no value is longer.
    """

    values: BFloat16[Tensor, "n width"]
    error: float
    radius: float


@dataclass(frozen=True, kw_only=True)
class Projection:
    """Centering, projection, and the length of what is left over; narrow points keep all their coordinates."""

    mean: Float32[Tensor, " dim"]
    directions: Float32[Tensor, "dim count"] | None  # orthonormal; None keeps every coordinate

    @classmethod
    def fit(cls, points: Points, rows: Int[np.ndarray, " n"], *, width: int) -> Projection:
        """Return a projection to `width` dimensions along the principal directions of some of the points."""
        sample = points.block(rows[:: max(1, len(rows) // SAMPLE)])
        mean = sample.mean(dim=0)
        if points.dim <= width:
            return cls(mean=mean, directions=None)
        return cls(mean=mean, directions=principal_directions(sample.sub_(mean), width - 1))

    @property
    def width(self) -> int:
        """Coordinates of a projected point: one for each direction, and the length of what they leave over."""
        return len(self.mean) if self.directions is None else self.directions.shape[1] + 1

    def project(self, points: Points, rows: Int[np.ndarray, " n"]) -> Projected:
        """Project some of the points."""
        values = torch.empty(len(rows), self.width, dtype=torch.bfloat16)
        bounds = []

        def project_slice(start: int, stop: int) -> None:
            for first in range(start, stop, BLOCK):
                here = slice(first, min(first + BLOCK, stop))
                exact, error, radius = self.project_block(points.block(rows[here]))
                values[here] = exact
                # What bfloat16 leaves out of a value is measured, and added to the error; the factor covers the sum.
                error += float((values[here].float() - exact).square().sum(1).max()) ** 0.5 * (1 + 1e-3)
                bounds.append((error, radius + error))

        in_threads(project_slice, len(rows), at_least=BLOCK)
        error, radius = (max(found) for found in zip(*bounds, strict=True))
        return Projected(values=values, error=error, radius=radius)

    def project_block(self, block: Float32[Tensor, "n dim"]) -> tuple[Float32[Tensor, "n width"], float, float]:
        """Project points in float32; how far rounding may have moved one, and the largest length when centered.

        `block` is centered in place.
        """
        block.sub_(self.mean)
        squared_length = block.square().sum(1)
        radius = float(squared_length.max()) ** 0.5 * (1 + block.shape[1] * ROUNDING)
        farthest = radius + float(self.mean.norm())  # no coordinate was longer before it was centered
        if self.directions is None:
            return block, 2 * ROUNDING * farthest, radius
        return *_project(block, squared_length, self.directions, farthest), radius


def principal_directions(x: Float32[Tensor, "n dim"], count: int) -> Float32[Tensor, "dim count"]:
    """Return orthonormal columns that nearly span the leading principal directions of centered rows."""
    # Subspace iteration: each multiplication by x' x turns random columns towards the leading directions.
    directions = torch.randn(x.shape[1], count, generator=torch.Generator().manual_seed(0))
    for _ in range(3):
        directions = torch.linalg.qr(x.T @ (x @ directions)).Q
    # Once more in float64: the bound needs directions that are orthonormal to the last bit of float32.
    return torch.linalg.qr(directions.double()).Q.float()


def _project(
    block: Float32[Tensor, "n dim"],
    squared_length: Float[Tensor, " n"],
    directions: Float32[Tensor, "dim count"],
    radius: float,
) -> tuple[Float32[Tensor, "n width"], float]:
    """Project centered points, with the length of what is left over, and bound the error of a result."""
    dim, count = directions.shape
    values = torch.zeros(len(block), count + 1)
    # The coordinates along the directions [n, count], a few terms at a time, so that rounding stays small.
    along = values[:, :count]
    for first in range(0, dim, TERMS):
        along += block[:, first : first + TERMS] @ directions[first : first + TERMS]
    # The last coordinate: the length of the rest, by Pythagoras.
    left_over = (squared_length - along.square().sum(1)).clamp_(min=0).sqrt_()
    values[:, -1] = left_over
    # Error of a coordinate: centering, the products, the sums of pieces, the directions' own rounding.
    error = count**0.5 * (TERMS + -(-dim // TERMS) + 6) * ROUNDING * radius
    # Error of the length r that is left over: |r' - r| <= |r'^2 - r^2| / r', and at most the root of the numerator.
    squared_error = 2 * radius * error + (dim + count + 2) * ROUNDING * radius**2
    return values, error + min(squared_error / max(float(left_over.min()), 1e-30), squared_error**0.5)
