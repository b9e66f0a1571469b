"""Multinomial logistic regression by preconditioned L-BFGS, on the CPU or a GPU, with no copy of the features.

The objective is scikit-learn's, multiplied by n C:

    J(W, b) = sum_i w_i CE(softmax(x_i W + b), y_i) + l2 / 2 |W|^2          l2 = 1 / C, intercept b not penalised

It is solved in other coordinates, exactly. With the weighted mean m and covariance V diag(v) V' of the features,

    W = V (Theta / S),    b = theta_0 / s_0 - m W                           S_jk = sqrt(N h_k v_j + l2)

the free intercept absorbs the shift, the rotation keeps |W|, and a scale only turns the penalty into one per axis. In
these coordinates the Hessian is near the identity: N h_k v_j is the curvature of class k along axis j when
h_k = mean p_k (1 - p_k). CLIP features have a spectrum of many decades, so plain L-BFGS needs hundreds of
iterations where this needs tens. The map is applied to weights and gradients (d x k), never to the n x d features.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from distilclip.ops.metrics import row_tiles

NUM_PAIRS = 20  # curvature pairs that L-BFGS remembers
SUFFICIENT_DECREASE = 1e-4  # Armijo's constant (Nocedal and Wright, section 3.1)


@dataclass(frozen=True, kw_only=True)
class Block:
    """Rows of features with their labels; rows of weight 0 take no part in a fit. `weight` None means all ones."""

    features: Float[Tensor, "n dim"]
    labels: Int[Tensor, " n"]
    weight: Float[Tensor, " n"] | None = None


@dataclass(frozen=True, kw_only=True)
class Logistic:
    """A fitted classifier: logits are `features @ weight + bias`."""

    weight: Float[Tensor, "dim k"]
    bias: Float[Tensor, " k"]
    objective: float
    num_iterations: int
    converged: bool

    def predict(self, features: Float[Tensor, "n dim"]) -> Int[Tensor, " n"]:
        """The class of the largest logit, the smaller index of equal ones."""
        tiles = row_tiles(len(features), len(self.bias))
        logits = (torch.addmm(self.bias, features[t].to(self.weight), self.weight) for t in tiles)
        return torch.cat([x.argmax(dim=1) for x in logits])


class LogisticProblem:
    """The objective over given blocks, and the coordinates that make it easy; reused for every l2 of a sweep."""

    def __init__(self, blocks: Sequence[Block], *, num_classes: int) -> None:
        self.blocks = list(blocks)
        self.num_classes = num_classes
        first = self.blocks[0].features
        # Half-precision features are read as they are and widened tile by tile.
        self.dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
        self.device = first.device
        self.tile_elements = 1 << 20 if self.device.type == "cpu" else 1 << 26
        self.num_rows = sum(float(b.weight.sum()) if b.weight is not None else len(b.labels) for b in self.blocks)
        self.mean, self.variance, self.axes = self._principal_axes()

    def _tiles(self) -> Sequence[tuple[Tensor, Tensor, Tensor | None]]:
        return [
            (b.features[t], b.labels[t], b.weight[t] if b.weight is not None else None)
            for b in self.blocks
            for t in row_tiles(len(b.labels), self.num_classes, tile_elements=self.tile_elements)
        ]

    def _principal_axes(self) -> tuple[Tensor, Tensor, Tensor]:
        # The accumulators are float64 where the device has it; the products are as wide as the features.
        wide = torch.float32 if self.device.type == "mps" else torch.float64
        dim = self.blocks[0].features.shape[1]
        total = torch.zeros(dim, dtype=wide, device=self.device)
        for x, _, weight in self._tiles():
            total += x.sum(0, dtype=wide) if weight is None else weight.to(self.dtype) @ x.to(self.dtype)
        mean = total / self.num_rows
        covariance = torch.zeros(dim, dim, dtype=wide, device=self.device)
        for x, _, weight in self._tiles():
            centred = x.to(self.dtype) - mean.to(self.dtype)
            covariance += centred.T @ (centred if weight is None else centred * weight.to(self.dtype)[:, None])
        variance, axes = torch.linalg.eigh(covariance / self.num_rows)
        # Directions without variance keep a little, or rounding noise along them would be blown up.
        variance = variance.clamp(min=1e-7 * float(variance[-1]) + torch.finfo(self.dtype).tiny)
        return mean.to(self.dtype), variance.to(self.dtype), axes.to(self.dtype)

    def coordinates(self, curvature: Float[Tensor, " k"], *, l2: float) -> Float[Tensor, "dim_plus_1 k"]:
        """The scales S (last row: of the intercept) for the classes' curvatures h."""
        along_axes = self.num_rows * self.variance[:, None] * curvature + l2
        return torch.cat([along_axes, self.num_rows * curvature[None, :]]).sqrt()

    def objective(
        self, rotated: Float[Tensor, "dim_plus_1 k"], *, l2: float
    ) -> tuple[float, Float[Tensor, "dim_plus_1 k"], Float[Tensor, " k"]]:
        """J, its gradient in rotated, unscaled coordinates, and the classes' mean p (1 - p), in one pass."""
        weight, bias = self.unrotate(rotated)
        loss = torch.zeros((), dtype=self.dtype, device=self.device)
        gradient = torch.zeros_like(weight)
        residual_sum, curvature = torch.zeros_like(bias), torch.zeros_like(bias)
        for x, labels, row_weight in self._tiles():
            x = x.to(self.dtype)
            logits = torch.addmm(bias, x, weight)
            log_sum = logits.logsumexp(dim=1)
            cross_entropy = log_sum - logits.gather(1, labels[:, None])[:, 0]
            residual = logits.sub_(log_sum[:, None]).exp_()  # the probabilities, until the labels are taken off
            curvature += (residual.sum(0) if row_weight is None else row_weight @ residual)
            residual.scatter_add_(1, labels[:, None], residual.new_full((len(labels), 1), -1.0))
            if row_weight is not None:
                cross_entropy = cross_entropy * row_weight
                residual.mul_(row_weight[:, None])
            loss += cross_entropy.sum()
            gradient.addmm_(x.T, residual)
            residual_sum += residual.sum(0)
        gradient.addr_(self.mean, residual_sum, alpha=-1.0)
        directions = rotated[:-1]
        value = float(loss) + 0.5 * l2 * float(directions.square().sum())
        gradient = torch.cat([self.axes.T @ gradient + l2 * directions, residual_sum[None, :]])
        return value, gradient, curvature

    def unrotate(self, rotated: Float[Tensor, "dim_plus_1 k"]) -> tuple[Float[Tensor, "dim k"], Float[Tensor, " k"]]:
        """Weight and bias for the features as they are."""
        weight = self.axes @ rotated[:-1]
        return weight, rotated[-1] - self.mean @ weight
