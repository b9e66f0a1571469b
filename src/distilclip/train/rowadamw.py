"""AdamW for a matrix of which each step trains some rows: the state of the other rows is neither read nor written.

A row's moments and bias correction count that row's own updates. So a row that has been given m gradients stands where
`torch.optim.AdamW` would stand after these m steps and no others, and a step costs what its rows cost. (A global step
count, as torch.optim.SparseAdam has, would correct the bias of a row's first moments as if they were old.)
Source: Loshchilov and Hutter 2019, algorithm 2; rows as in Partial FC (An et al. 2021, section 3.3).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from distilclip.ops.streaming import blocks

_BLOCK_ENTRIES = {"cpu": 1 << 17, "cuda": 1 << 24}  # of one matrix: on CPUs the block's five stay in the cache


@dataclass(frozen=True, kw_only=True)
class RowState:
    """AdamW's state of every row, on any device; changed in place."""

    exp_avg: Float[Tensor, "k dim"]
    exp_avg_sq: Float[Tensor, "k dim"]
    step: Int[Tensor, " k"]
    """updates that each row has had"""

    @classmethod
    def zeros(cls, num_rows: int, dim: int, *, device: torch.device | str = "cpu") -> RowState:
        """The state before the first update."""
        return cls(
            exp_avg=torch.zeros(num_rows, dim, device=device),
            exp_avg_sq=torch.zeros(num_rows, dim, device=device),
            step=torch.zeros(num_rows, dtype=torch.int64, device=device),
        )


def update_rows_(
    values: Float[Tensor, "k dim"],
    gradient: Float[Tensor, "c dim"],
    state: RowState,
    *,
    rows: Int[Tensor, " c"] | None,
    learning_rate: float,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.98),
    eps: float = 1e-6,
) -> None:
    """One AdamW update of the distinct `rows` of `values` (None: of all), in place, state included.

    The state may live on another device than values and gradient (the host): then its rows travel, block by block.
    """
    entries = _BLOCK_ENTRIES.get(values.device.type, _BLOCK_ENTRIES["cpu"])
    for block in blocks(len(gradient), max(1, entries // max(1, values.shape[1]))):
        taken = block if rows is None else rows[block]
        with _Rows(values, taken, values.device) as w, _Rows(state.step, taken, values.device) as step:
            step += 1
            with (
                _Rows(state.exp_avg, taken, values.device) as first,
                _Rows(state.exp_avg_sq, taken, values.device) as second,
            ):
                _update_(w, gradient[block], first, second, step, learning_rate, weight_decay, betas, eps)


def _update_(
    values: Tensor,
    gradient: Tensor,
    first: Tensor,
    second: Tensor,
    step: Tensor,
    learning_rate: float,
    weight_decay: float,
    betas: tuple[float, float],
    eps: float,
) -> None:
    count = step.double()  # 1 - beta^step in float32 loses digits while step is small
    step_size = (learning_rate / (1 - betas[0] ** count)).to(values.dtype)
    root_correction = (1 - betas[1] ** count).sqrt().to(values.dtype)
    if weight_decay:
        values.mul_(1 - learning_rate * weight_decay)
    first.lerp_(gradient, 1 - betas[0])
    second.mul_(betas[1]).addcmul_(gradient, gradient, value=1 - betas[1])
    denominator = second.sqrt().div_(root_correction[:, None]).add_(eps)
    values.sub_(torch.div(first, denominator, out=denominator).mul_(step_size[:, None]))


class _Rows:
    """Some rows of a tensor on a device, for a block that changes them; put back afterwards unless they are a view."""

    def __init__(self, tensor: Tensor, rows: Tensor | slice, device: torch.device) -> None:
        self.tensor, self.device = tensor, device
        self.rows = rows if isinstance(rows, slice) else rows.to(tensor.device)

    def __enter__(self) -> Tensor:
        taken = self.tensor[self.rows] if isinstance(self.rows, slice) else self.tensor.index_select(0, self.rows)
        self.taken = taken.to(self.device)
        return self.taken

    def __exit__(self, *exception: object) -> None:
        changed = self.taken.to(self.tensor.device)
        if not isinstance(self.rows, slice):
            self.tensor.index_copy_(0, self.rows, changed)
        elif self.device != self.tensor.device:
            self.tensor[self.rows] = changed
