"""Update some rows of a matrix by AdamW; the state of the other rows is neither read nor written.

Each row counts its own updates. So a row that has had m gradients stands where `torch.optim.AdamW` would stand after
these m steps alone, and a step costs what its rows cost. (With a global step count, as torch.optim.SparseAdam has, the
bias of a row's first moments would be corrected as if they were old.)
Source: Loshchilov and Hutter 2019, algorithm 2; rows as in Partial FC (An et al. 2021, section 3.3).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import no_type_check

import numpy as np
import torch
from jaxtyping import Float, Int
from numba import njit
from torch import Tensor

from distilclip.vectors.threads import in_threads

_BLOCK_ENTRIES = 1 << 24  # of one matrix, where rows are copied out and back
_ROWS_OF_A_THREAD = 256  # fewer are not worth one


@dataclass(frozen=True, kw_only=True)
class RowMoments:
    """AdamW's state of every row, on any device; changed in place."""

    exp_avg: Float[Tensor, "k dim"]
    exp_avg_sq: Float[Tensor, "k dim"]
    step: Int[Tensor, " k"]
    """updates that each row has had"""

    @classmethod
    def zeros(cls, num_rows: int, dim: int, *, device: torch.device | str = "cpu") -> RowMoments:
        """The state before the first update."""
        return cls(
            exp_avg=torch.zeros(num_rows, dim, device=device),
            exp_avg_sq=torch.zeros(num_rows, dim, device=device),
            step=torch.zeros(num_rows, dtype=torch.int64, device=device),
        )


def update_rows_(
    values: Float[Tensor, "k dim"],
    gradient: Float[Tensor, "c dim"],
    state: RowMoments,
    *,
    rows: Int[Tensor, " c"] | None,
    learning_rate: float,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.98),
    eps: float = 1e-6,
) -> None:
    """Take one AdamW step on the distinct `rows` of `values` (None: of all), in place, state included.

    The state may live on another device than values and gradient (the host): then its rows travel, block by block.
    On CPUs float32 rows are updated by a kernel, a fifth of the time of torch's operations one after the other.
    """
    count = _take(state.step, rows).add_(1)
    _put(state.step, rows, count)
    # As expm1: 1 - beta^step loses digits in float32 while step is small, and not every device has float64.
    one_less = [-torch.expm1(count.to(values) * (math.log(beta) if beta else -math.inf)) for beta in betas]
    step_size, root_correction = learning_rate / one_less[0], one_less[1].rsqrt()
    factors = _Factors(step_size, root_correction, 1 - learning_rate * weight_decay, betas, eps)
    tensors = values, gradient, state.exp_avg, state.exp_avg_sq
    on_cpu = all(tensor.device.type == "cpu" and tensor.dtype == torch.float32 for tensor in tensors)
    (_update_on_cpu if on_cpu else _update_by_torch)(values, gradient, state, rows, factors)


@dataclass(frozen=True)
class _Factors:
    """What an update multiplies by; the first two of every row."""

    step_size: Float[Tensor, " c"]
    root_correction: Float[Tensor, " c"]
    decay: float
    betas: tuple[float, float]
    eps: float


def _update_by_torch(
    values: Tensor, gradient: Tensor, state: RowMoments, rows: Tensor | None, factors: _Factors
) -> None:
    """On any device: blocks of rows are taken to the values' device, and put back."""
    betas = factors.betas
    moments = state.exp_avg, state.exp_avg_sq
    size = max(1, _BLOCK_ENTRIES // max(1, values.shape[1]))
    for start in range(0, len(gradient), size):
        block = slice(start, min(start + size, len(gradient)))
        taken = block if rows is None else rows[block]
        w, first, second = (_take(tensor, taken).to(values.device) for tensor in (values, *moments))
        own = gradient[block]
        first.lerp_(own, 1 - betas[0])
        second.mul_(betas[1]).addcmul_(own, own, value=1 - betas[1])
        denominator = second.sqrt().mul_(factors.root_correction[block, None]).add_(factors.eps)
        torch.div(first, denominator, out=denominator)
        w.mul_(factors.decay).sub_(denominator.mul_(factors.step_size[block, None]))
        for tensor, changed in zip((values, *moments), (w, first, second), strict=True):
            _put(tensor, taken, changed)


def _take(tensor: Tensor, rows: Tensor | slice | None) -> Tensor:
    """A copy of some rows; a view where they lie side by side."""
    if rows is None:
        return tensor[:]
    return tensor[rows] if isinstance(rows, slice) else tensor.index_select(0, rows.to(tensor.device))


def _put(tensor: Tensor, rows: Tensor | slice | None, changed: Tensor) -> None:
    """Write rows back that `_take` took; a view has changed the tensor already, unless it went to another device."""
    changed = changed.to(tensor.device)
    if isinstance(rows, Tensor):
        tensor.index_copy_(0, rows.to(tensor.device), changed)
    elif changed.data_ptr() != (tensor if rows is None else tensor[rows]).data_ptr():
        tensor[slice(None) if rows is None else rows] = changed


def _update_on_cpu(values: Tensor, gradient: Tensor, state: RowMoments, rows: Tensor | None, factors: _Factors) -> None:
    """The same in one pass over memory: each number of a row is read and written once."""
    matrices = [tensor.detach().numpy() for tensor in (values, gradient)]
    moments = state.exp_avg.numpy(), state.exp_avg_sq.numpy()
    columns = factors.step_size.numpy(), factors.root_correction.numpy()
    index = np.arange(len(gradient)) if rows is None else rows.numpy()
    beta1, beta2 = factors.betas
    constants = np.array([factors.decay, beta1, 1 - beta1, beta2, 1 - beta2, factors.eps], np.float32)

    def update(start: int, stop: int) -> None:
        _update_rows(*matrices, moments, index, columns, constants, start, stop)

    in_threads(update, len(gradient), at_least=_ROWS_OF_A_THREAD)


@njit(nogil=True, cache=True, error_model="numpy")
@no_type_check
def _update_rows(values, gradient, moments, rows, columns, constants, start, stop):
    exp_avg, exp_avg_sq = moments
    step_size, root_correction = columns
    decay, beta1, rest1, beta2, rest2, eps = constants
    for i in range(start, stop):
        row = rows[i]
        for j in range(values.shape[1]):
            g = gradient[i, j]
            first = beta1 * exp_avg[row, j] + rest1 * g
            second = beta2 * exp_avg_sq[row, j] + rest2 * g * g
            exp_avg[row, j] = first
            exp_avg_sq[row, j] = second
            step = step_size[i] * first / (math.sqrt(second) * root_correction[i] + eps)
            values[row, j] = decay * values[row, j] - step
