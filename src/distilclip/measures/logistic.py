"""Fit multinomial logistic regression by preconditioned L-BFGS, on the CPU or a GPU, with no copy of the features.

The objective is scikit-learn's times n, with l2 = 1 / C; the intercept is not penalised:

    J(W, b) = sum_i CE(x_i W + b, y_i) + l2 / 2 |W|^2

It is solved in other coordinates, exactly. With mean m and covariance V diag(v) V' of the features,

    W = V (U / S),    b = u_0 / s_0 - m W,    S_jk = sqrt(n h_k v_j + l2),    h_k = mean p_k (1 - p_k)

The free intercept absorbs the shift, the rotation keeps |W|, and a scale only turns the penalty into one per axis. In
U the Hessian is near the identity, since n h_k v_j is about the loss's curvature for class k along axis j. The spectrum
of CLIP features spans decades: plain L-BFGS needs hundreds of iterations where this needs tens. The map is applied to
weights and gradients (d x k), never to the n x d features, and the scale as the initial matrix of L-BFGS, so that it
can follow h without losing the remembered curvature pairs.

Example: points -1 and 1 of classes 0 and 1, l2 = 1/2. By symmetry W = (-a, a) and b = 0; each point has the probability
1 / (1 + exp(-2 a)) for its class, and at the optimum 2 / (1 + exp(2 a)) = a / 2, so a = 0.74.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import softplus

from distilclip.measures.metrics import row_tiles

LOG2_E = 1 / math.log(2)  # exp2 is several times faster than exp
NUM_PAIRS = 20  # curvature pairs that L-BFGS remembers
STALLED_AFTER = 10  # steps
SUFFICIENT_DECREASE = 1e-4  # Armijo's constant (Nocedal and Wright, section 3.1)
SMALLEST_STEP = 1e-3  # below it, rounding decides: the step is taken as it is
CURVATURE_ROWS = 8192  # enough to tell how sure a fit is of each class
RESCALE_AT = frozenset({5, 10, 20, 40, 80})  # iterations at which h is taken anew
SMALLEST_CURVATURE = 1e-4  # of h, as a share of the uniform classifier's: a fit can leave separable data again


@dataclass(frozen=True, kw_only=True)
class Block:
    """Hold labelled features; `rows` names those that take part (None: all). Tiles are gathered, never all at once."""

    features: Float[Tensor, "n dim"]
    labels: Int[Tensor, " n"]
    rows: Int[Tensor, " r"] | None = None

    def __len__(self) -> int:
        return len(self.labels) if self.rows is None else len(self.rows)

    def tile(self, rows: slice) -> tuple[Float[Tensor, "t dim"], Int[Tensor, " t"]]:
        """Return some of the rows that take part."""
        chosen = rows if self.rows is None else self.rows[rows]
        return self.features[chosen], self.labels[chosen]


@dataclass(frozen=True, kw_only=True)
class Logistic:
    """Hold a fitted classifier: its logits are `features @ weight + bias`."""

    weight: Float[Tensor, "dim k"]
    bias: Float[Tensor, " k"]
    objective: float
    num_evaluations: int
    converged: bool


class LogisticProblem:
    """Compute the objective over some blocks of rows, in coordinates that make it easy, for every l2 of a sweep.

    Features may be half precision: they are widened tile by tile. In float64 everything is computed in float64.
    """

    def __init__(self, blocks: Sequence[Block], *, num_classes: int) -> None:
        self.blocks = list(blocks)
        self.num_classes = num_classes
        self.num_rows = sum(len(b) for b in self.blocks)
        features = self.blocks[0].features
        self.dim, self.device = features.shape[1], features.device
        self.dtype = torch.float64 if features.dtype == torch.float64 else torch.float32
        self.sum_dtype = torch.float32 if self.device.type == "mps" else torch.float64
        # On the CPU smaller tiles would stay in a nearer cache, for 4 % at most; but their many short parallel regions
        # wait for one another, several times as long, wherever other programs want the cores.
        self.tile_elements = 1 << 21 if self.device.type == "cpu" else 1 << 26
        # exp2 of anything lower would be denormal, or would become so times another: arithmetic a hundred times slower.
        self.lowest_exponent = 450.0 if self.dtype == torch.float64 else 45.0
        self.mean, self.variance, self.axes = self._principal_axes()

    def tiles(self) -> Iterator[tuple[Float[Tensor, "t dim"], Int[Tensor, " t"]]]:
        """Yield all rows that take part, in order."""
        for block in self.blocks:
            for rows in row_tiles(len(block), max(self.dim, self.num_classes), tile_elements=self.tile_elements):
                x, labels = block.tile(rows)
                yield x.to(self.dtype), labels

    def _principal_axes(self) -> tuple[Float[Tensor, " dim"], Float[Tensor, " dim"], Float[Tensor, "dim dim"]]:
        # Two passes, the mean first: sums of squares minus squares of sums would lose digits.
        total = torch.zeros(self.dim, dtype=self.sum_dtype, device=self.device)
        for x, _ in self.tiles():
            total += x.sum(0, dtype=self.sum_dtype)
        mean = (total / self.num_rows).to(self.dtype)
        covariance = torch.zeros(self.dim, self.dim, dtype=self.sum_dtype, device=self.device)
        for x, _ in self.tiles():
            centred = x - mean
            covariance += centred.T @ centred
        variance, axes = torch.linalg.eigh(covariance / self.num_rows)
        # Directions without variance keep a trace of it, or rounding noise along them would be blown up.
        variance = variance.clamp(min=1e-7 * float(variance[-1]) + torch.finfo(torch.float32).tiny)
        return mean, variance.to(self.dtype), axes.to(self.dtype)

    def prior(self) -> Float[Tensor, "dim_plus_1 k"]:
        """Return no weight, and the classes' log frequencies as intercepts: the solution for infinite l2."""
        counts = torch.zeros(self.num_classes, dtype=self.dtype, device=self.device)
        for _, labels in self.tiles():
            counts += torch.bincount(labels, minlength=self.num_classes)
        return torch.cat([counts.new_zeros(self.dim, self.num_classes), (counts / self.num_rows).log()[None, :]])

    def rotate(self, weight: Float[Tensor, "dim k"], bias: Float[Tensor, " k"]) -> Float[Tensor, "dim_plus_1 k"]:
        """Return weights along the principal axes, and as the last row the intercepts of centred features."""
        return torch.cat([self.axes.T @ weight, (bias + self.mean @ weight)[None, :]])

    def unrotate(self, rotated: Float[Tensor, "dim_plus_1 k"]) -> tuple[Float[Tensor, "dim k"], Float[Tensor, " k"]]:
        """Return weight and bias for the features as they are: the inverse of `rotate`."""
        weight = self.axes @ rotated[:-1]
        return weight, rotated[-1] - self.mean @ weight

    def objective(
        self, rotated: Float[Tensor, "dim_plus_1 k"], *, l2: float
    ) -> tuple[float, Float[Tensor, "dim_plus_1 k"]]:
        """Return J and its gradient in rotated and centred coordinates: the axes' weights, then the intercepts."""
        # Maps cost d x k; the features stay as they are. Logits in base 2, for exp2.
        weight, bias = self.unrotate(rotated)
        base2_weight, base2_bias = weight * LOG2_E, bias * LOG2_E
        loss = torch.zeros((), dtype=self.sum_dtype, device=self.device)
        gradient, residual_sum = torch.zeros_like(weight), torch.zeros_like(bias)
        for x, labels in self.tiles():
            # x [t, d], residual [t, k]: probabilities minus one-hot labels.
            residual, cross_entropy = self._residual(torch.addmm(base2_bias, x, base2_weight), labels[:, None])
            loss += cross_entropy.sum(dtype=self.sum_dtype)
            gradient.addmm_(x.T, residual)
            residual_sum += residual.sum(0)
        # Centring moves mean times the intercepts' gradient out of the weights'.
        gradient.addr_(self.mean, residual_sum, alpha=-1.0)
        along_axes = rotated[:-1]
        value = float(loss) + 0.5 * l2 * float(along_axes.square().sum(dtype=self.sum_dtype))
        return value, torch.cat([self.axes.T @ gradient + l2 * along_axes, residual_sum[None, :]])

    def _residual(
        self, logits: Float[Tensor, "t k"], label: Int[Tensor, "t 1"]
    ) -> tuple[Float[Tensor, "t k"], Float[Tensor, "t 1"]]:
        """Return probabilities minus one-hot labels, in the memory of the logits (base 2), and cross-entropies in nats.

        The label's logit is taken apart, so that losses and residuals far below 1e-7 keep their digits.
        """
        own = logits.gather(1, label)
        # The other classes' odds, relative to the largest of them.
        logits.scatter_(1, label, -torch.inf)
        largest = logits.amax(dim=1, keepdim=True)
        odds = logits.sub_(largest).clamp_(min=-self.lowest_exponent).exp2_().scatter_(1, label, 0.0)
        total = odds.sum(dim=1, keepdim=True)
        margin = (largest + total.log2() - own).mul_(1 / LOG2_E)  # of all other classes together over the label
        wrong = torch.sigmoid(margin)
        share = torch.where(wrong > 2.0**-self.lowest_exponent, wrong / total, 0.0)
        return odds.mul_(share).scatter_(1, label, -wrong), softplus(margin)

    def _curvature_rows(self) -> Iterator[Float[Tensor, "t dim"]]:
        """Yield all rows, or of many a sample drawn once: an initial matrix need not be exact."""
        if self.num_rows <= CURVATURE_ROWS:
            yield from (x for x, _ in self.tiles())
            return
        drawn = torch.randperm(self.num_rows, generator=torch.Generator().manual_seed(0))[:CURVATURE_ROWS].sort().values
        first = 0
        for block in self.blocks:
            inside = (drawn >= first) & (drawn < first + len(block))
            rows = (drawn[inside] - first).to(self.device)
            chosen = rows if block.rows is None else block.rows[rows]
            for part in row_tiles(len(chosen), max(self.dim, self.num_classes), tile_elements=self.tile_elements):
                yield block.features[chosen[part]].to(self.dtype)
            first += len(block)

    def preconditioner(self, rotated: Float[Tensor, "dim_plus_1 k"], *, l2: float) -> Float[Tensor, "dim_plus_1 k"]:
        """Return 1 / S^2 at a point: the inverse of the Hessian's approximate diagonal in rotated coordinates."""
        weight, bias = self.unrotate(rotated)
        curvature = torch.zeros_like(bias)
        # n h_k: the sum over rows of p_k (1 - p_k), scaled up from the sample.
        for x in self._curvature_rows():
            probability = torch.addmm(bias, x, weight).softmax(dim=1)
            curvature += probability.sum(0) - probability.square().sum(0)
        curvature *= self.num_rows / min(self.num_rows, CURVATURE_ROWS)
        curvature = curvature.clamp(min=SMALLEST_CURVATURE * self.num_rows / self.num_classes)
        return 1 / torch.cat([self.variance[:, None] * curvature + l2, curvature[None, :]])


def fit_logistic(
    problem: LogisticProblem,
    *,
    l2: float,
    start: Logistic | None = None,
    tolerance: float = 1e-7,
    max_iterations: int = 1000,
) -> Logistic:
    """Minimise J by L-BFGS from `start` (the solution of a neighbouring l2; None: the prior).

    Stops when half the expected decrease of a full quasi-Newton step is at most `tolerance` times J, or when ten steps
    together have gained no more than that (single precision can do no better). The true relative distance to the
    optimum is up to 20 times `tolerance` for usual penalties and up to 100 times for tiny ones. `converged` is False
    where `max_iterations` ended it. Raises `ValueError` unless l2 > 0: without it, separable data have no optimum.
    """
    if not l2 > 0:
        raise ValueError(f"l2 = {l2}: the penalty must be positive")
    point = problem.prior() if start is None else problem.rotate(start.weight, start.bias)
    scale = problem.preconditioner(point, l2=l2)
    value, gradient = problem.objective(point, l2=l2)
    num_evaluations, converged = 1, False
    pairs: deque[tuple[Tensor, Tensor, Tensor]] = deque(maxlen=NUM_PAIRS)
    last_values: deque[float] = deque(maxlen=STALLED_AFTER)
    for iteration in range(max_iterations):
        if iteration in RESCALE_AT:
            scale = problem.preconditioner(point, l2=l2)
        direction = _quasi_newton_direction(gradient, pairs, scale)
        slope = float((gradient * direction).sum())
        # A full step is expected to gain half the slope; ten steps without gain are the end in single precision.
        stalled = len(last_values) == STALLED_AFTER and last_values[0] - value <= tolerance * value
        if -0.5 * slope <= tolerance * value or stalled:
            converged = True
            break
        last_values.append(value)
        # Backtracking line search: shorten the step until it gains enough.
        step = 1.0
        while True:
            new_point = point + step * direction
            new_value, new_gradient = problem.objective(new_point, l2=l2)
            num_evaluations += 1
            if new_value <= value + SUFFICIENT_DECREASE * step * slope or step < SMALLEST_STEP:
                break
            # The minimum of the parabola through both values and the slope, kept within a tenth and a half.
            excess = new_value - value - step * slope
            step *= min(0.5, max(0.1, -0.5 * step * slope / excess))
        # Remember how the gradient changed along the move; without positive curvature it would mislead.
        move, change = new_point - point, new_gradient - gradient
        product = (move * change).sum()
        if product > 0:
            pairs.append((move, change, product))
        point, value, gradient = new_point, new_value, new_gradient
    weight, bias = problem.unrotate(point)
    return Logistic(weight=weight, bias=bias, objective=value, num_evaluations=num_evaluations, converged=converged)


def _quasi_newton_direction(
    gradient: Tensor, pairs: Sequence[tuple[Tensor, Tensor, Tensor]], scale: Tensor
) -> Float[Tensor, "dim_plus_1 k"]:
    """Return minus the gradient times L-BFGS's inverse Hessian (two loops: Nocedal and Wright, algorithm 7.4)."""
    # First loop: take out the remembered pairs, newest first.
    direction, weights = -gradient, []
    for move, change, product in reversed(pairs):
        weight = (move * direction).sum() / product
        weights.append(weight)
        direction = direction - weight * change
    # The initial inverse Hessian: our diagonal, its length fitted to the newest pair.
    direction = direction * scale
    if pairs:
        _, change, product = pairs[-1]
        direction = direction * (product / (change.square() * scale).sum())
    # Second loop: put the pairs back, oldest first.
    for (move, change, product), weight in zip(pairs, reversed(weights), strict=True):
        direction = direction + (weight - (change * direction).sum() / product) * move
    return direction
