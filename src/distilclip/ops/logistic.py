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
from torch.nn.functional import softplus

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
        self.wide = torch.float32 if self.device.type == "mps" else torch.float64
        self.tile_elements = 1 << 20 if self.device.type == "cpu" else 1 << 26
        self.num_rows = sum(float(b.weight.sum()) if b.weight is not None else len(b.labels) for b in self.blocks)
        self.mean, self.variance, self.axes = self._principal_axes()

    def _tiles(self) -> Sequence[tuple[Tensor, Tensor, Tensor | None]]:
        return [
            (b.features[t].to(self.dtype), b.labels[t], b.weight[t] if b.weight is not None else None)
            for b in self.blocks
            for t in row_tiles(len(b.labels), self.num_classes, tile_elements=self.tile_elements)
        ]

    def _principal_axes(self) -> tuple[Tensor, Tensor, Tensor]:
        # The accumulators are float64 where the device has it; the products are as wide as the features.
        wide = self.wide
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
    ) -> tuple[float, Float[Tensor, "dim_plus_1 k"]]:
        """J and its gradient, both in the rotated and centred coordinates (axes V, intercept of x - m), unscaled."""
        weight, bias = self.unrotate(rotated)
        loss = torch.zeros((), dtype=self.wide, device=self.device)
        gradient, residual_sum = torch.zeros_like(weight), torch.zeros_like(bias)
        for x, labels, row_weight in self._tiles():
            logits = torch.addmm(bias, x, weight)
            # The label's logit is taken apart, so that losses and residuals far below 1e-7 keep their digits.
            own = logits.gather(1, labels[:, None])
            others = logits.scatter_(1, labels[:, None], -torch.inf).logsumexp(dim=1, keepdim=True)
            cross_entropy = softplus(others - own)[:, 0]
            residual = logits.sub_(own + cross_entropy[:, None]).exp_()
            residual.scatter_(1, labels[:, None], -torch.sigmoid(others - own))
            if row_weight is not None:
                cross_entropy *= row_weight
                residual *= row_weight[:, None]
            loss += cross_entropy.sum(dtype=self.wide)
            gradient.addmm_(x.T, residual)
            residual_sum += residual.sum(0)
        gradient.addr_(self.mean, residual_sum, alpha=-1.0)
        directions = rotated[:-1]
        value = float(loss) + 0.5 * l2 * float(directions.square().sum(dtype=self.wide))
        return value, torch.cat([self.axes.T @ gradient + l2 * directions, residual_sum[None, :]])

    def curvature(self, rotated: Float[Tensor, "dim_plus_1 k"]) -> Float[Tensor, " k"]:
        """Each class's mean p (1 - p) over the rows, at least one row's worth of the smallest float's square root."""
        weight, bias = self.unrotate(rotated)
        total = torch.zeros_like(bias)
        for x, _, row_weight in self._tiles():
            probability = torch.addmm(bias, x, weight).softmax(dim=1)
            variance = probability * (1 - probability)
            total += variance.sum(0) if row_weight is None else row_weight @ variance
        return total / self.num_rows

    def unrotate(self, rotated: Float[Tensor, "dim_plus_1 k"]) -> tuple[Float[Tensor, "dim k"], Float[Tensor, " k"]]:
        """Weight and bias for the features as they are."""
        weight = self.axes @ rotated[:-1]
        return weight, rotated[-1] - self.mean @ weight


def fit(problem, *, l2, start=None, max_iterations=1000, tolerance=1e-6, floor=1e-4, num_pairs=20, log=False):
    rotated = start if start is not None else problem.prior()
    h = problem.curvature(rotated).clamp(min=floor/problem.num_classes)
    scale = problem.coordinates(h, l2=l2)
    def evaluate(theta):
        v,g = problem.objective(theta/scale, l2=l2)
        return v, g/scale
    return _lbfgs(evaluate, rotated*scale, scale, max_iterations, tolerance, num_pairs, log)

def _lbfgs(evaluate, theta, scale, max_iterations, tolerance, num_pairs, log):
    value, gradient = evaluate(theta)
    pairs = deque(maxlen=num_pairs)
    evals=1
    conv=False
    for it in range(max_iterations):
        d = _direction(gradient, pairs)
        slope = float((gradient*d).sum())
        if -slope/2 <= tolerance*abs(value):
            conv=True
            break
        step=1.0
        while True:
            nt = theta+step*d
            nv, ng = evaluate(nt); evals+=1
            if log: print(it, step, nv, -slope/2/value)
            if nv <= value + SUFFICIENT_DECREASE*step*slope: break
            step = min(0.5*step, max(0.1*step, -slope*step**2/2/(nv-value-step*slope)))
            if step<1e-6: return theta/scale, value, it, evals, conv
        s, y = nt-theta, ng-gradient
        sy=float((s*y).sum())
        if sy>0: pairs.append((s,y,sy))
        theta,value,gradient=nt,nv,ng
    return theta/scale, value, it, evals, conv

def _direction(g, pairs):
    q=-g
    alphas=[]
    for s,y,sy in reversed(pairs):
        a=float((s*q).sum())/sy; alphas.append(a); q=q-a*y
    if pairs:
        s,y,sy=pairs[-1]; q=q*(sy/float((y*y).sum()))
    for (s,y,sy),a in zip(pairs,reversed(alphas)):
        b=float((y*q).sum())/sy; q=q+(a-b)*s
    return q
