"""A map to few dimensions under which no two points move apart, so that a distance there is a lower bound.

Points are projected on the leading principal directions of a sample, and what the projection leaves of a point is kept
as one more coordinate, its length: |x - y|^2 >= |px - py|^2 + (rx - ry)^2. Any orthonormal directions give a valid
bound; principal ones make it tight.
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

PIECE = 128  # terms of a float32 sum before it is added to the next: bounds its rounding error
BLOCK = 1024  # points projected at a time
SAMPLE = 8192  # points that the principal directions come from


@dataclass(frozen=True, kw_only=True)
class Contraction:
    """Centering, projection, and the length of what is left over; the points themselves where they are narrow."""

    mean: Float32[Tensor, " dim"]
    directions: Float32[Tensor, "dim count"] | None  # orthonormal; None keeps every coordinate

    @classmethod
    def fit(cls, points: Points, rows: Int[np.ndarray, " n"], *, width: int) -> Contraction:
        """A contraction to `width` dimensions along the principal directions of some of the points."""
        sample = points.block(rows[:: max(1, len(rows) // SAMPLE)])
        mean = sample.mean(dim=0)
        if points.dim <= width:
            return cls(mean=mean, directions=None)
        return cls(mean=mean, directions=principal_directions(sample.sub_(mean), width - 1))

    def images(self, points: Points, rows: Int[np.ndarray, " n"]) -> Images:
        """The images of some points."""
        width = points.dim if self.directions is None else self.directions.shape[1] + 1
        image = torch.empty(len(rows), width, dtype=torch.bfloat16)
        parts = []

        def contract(start: int, stop: int) -> None:
            for first in range(start, stop, BLOCK):
                here = slice(first, min(first + BLOCK, stop))
                part = self.of(points.block(rows[here]))
                image[here] = part.image
                parts.append((part.error, part.radius))

        in_threads(contract, len(rows), at_least=BLOCK)
        error, radius = (max(values) for values in zip(*parts, strict=True))
        return Images(image=image, error=error, radius=radius)

    def of(self, block: Float32[Tensor, "n dim"]) -> Images:
        """The images of points given as such; `block` is centered in place."""
        exact, error, radius = self.exact(block)
        image = exact.bfloat16()
        error += float((image.float() - exact).square().sum(1).max()) ** 0.5 * (1 + 1e-3)
        return Images(image=image, error=error, radius=radius + error)

    def exact(self, block: Float32[Tensor, "n dim"]) -> tuple[Float32[Tensor, "n width"], float, float]:
        """Images in float32, how far rounding may have moved one, and the largest length of a centered point.

        `block` is centered in place.
        """
        block.sub_(self.mean)
        squared_length = block.square().sum(1)
        radius = float(squared_length.max()) ** 0.5 * (1 + block.shape[1] * ROUNDING)
        if self.directions is None:
            return block, 2 * ROUNDING * (radius + float(self.mean.norm())), radius
        return *_project(block, squared_length, self.directions, radius + float(self.mean.norm())), radius


@dataclass(frozen=True, kw_only=True)
class Images:
    """Images in bfloat16: |image_i - image_j| <= |x_i - x_j| + 2 error, `error` bounding all rounding.

    No point is farther than `radius` from the contraction's mean, and no image longer.
    """

    image: BFloat16[Tensor, "n width"]
    error: float
    radius: float


def principal_directions(x: Float32[Tensor, "n dim"], count: int) -> Float32[Tensor, "dim count"]:
    """Orthonormal columns that nearly span the leading principal directions of centered rows: subspace iteration."""
    directions = torch.randn(x.shape[1], count, generator=torch.Generator().manual_seed(0))
    for _ in range(3):
        directions = torch.linalg.qr(x.T @ (x @ directions)).Q
    return torch.linalg.qr(directions.double()).Q.float()


def _project(
    block: Float32[Tensor, "n dim"],
    squared_length: Float[Tensor, " n"],
    directions: Float32[Tensor, "dim count"],
    radius: float,
) -> tuple[Float32[Tensor, "n width"], float]:
    """Projections of centered points with what is left over, and how far from the exact ones they may be."""
    dim, count = directions.shape
    image = torch.zeros(len(block), count + 1)
    projection = image[:, :count]
    for first in range(0, dim, PIECE):
        projection += block[:, first : first + PIECE] @ directions[first : first + PIECE]
    left_over = (squared_length - projection.square().sum(1)).clamp_(min=0).sqrt_()
    image[:, -1] = left_over
    # Of a coordinate: centering, PIECE products, the sums of pieces, the directions' own rounding.
    error = count**0.5 * (PIECE + -(-dim // PIECE) + 6) * ROUNDING * radius
    # Of what is left over, r: |r' - r| <= |r'^2 - r^2| / r', and at most the root of the numerator.
    squared_error = 2 * radius * error + (dim + count + 2) * ROUNDING * radius**2
    return image, error + min(squared_error / max(float(left_over.min()), 1e-30), squared_error**0.5)
