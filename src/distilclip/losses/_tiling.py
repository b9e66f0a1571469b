"""Compute softmax losses block by block, so that n x n or n x k logits never exist at once.

A softmax needs the largest logit of its row and the sum of exp(logit - largest). Both can be found tile by tile: when a
tile raises the largest logit, the sum so far is scaled down. Example, one row of six logits in three tiles of two:

    tile     largest so far     sum of exp(logit - largest) so far
    1  3     3                  e^-2 + e^0                  = 1.1353
    2  0     3                  1.1353 + e^-1 + e^-3        = 1.5530
    5  4     5                  1.5530 e^-2 + e^0 + e^-1    = 1.5781

    log-sum-exp of the row = 5 + log 1.5781 = 5.4562
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

_LOG2E = math.log2(math.e)


def blocks(length: int, size: int) -> Iterator[slice]:
    """Consecutive slices of at most `size` that cover range(length)."""
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))


def full_precision(first: Tensor, *others: Tensor | float) -> list[Tensor]:
    """Return all values as tensors on the first one's device: float64 if a matrix among them is, else float32.

    Softmaxes of half-precision sums are not accurate enough. Differentiable; each gradient comes back in its tensor's
    own type. Scalars follow the matrices, as in torch's own promotion.
    """
    values = [first, *others]
    # Scalars do not decide: a float64 scale beside float32 rows is made float32.
    double = any(isinstance(value, Tensor) and value.ndim and value.dtype == torch.float64 for value in values)
    dtype = torch.float64 if double else torch.float32
    return [
        value.to(first.device, dtype)
        if isinstance(value, Tensor)
        else torch.tensor(value, dtype=dtype).to(first.device)
        for value in values
    ]


def no_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    """Open a block in which matrix products keep their operands' precision on the tensor's device."""
    return torch.autocast(tensor.device.type, enabled=False)


def scaled_exp(
    logits: Float[Tensor, "r c"], scale: float, shift: Tensor, *, out: Float[Tensor, "r c"]
) -> Float[Tensor, "r c"]:
    """Write exp(scale * logits - shift) to `out` (which may be `logits`); shift is a column [r, 1] or a row [c].

    By powers of two: torch's float32 `exp` on CPUs is MKL's, measured 3.5 x slower than `exp2`, and 150 x slower where
    the result is denormal, which happens in every softmax of large scale.
    """
    # exp(x) = 2^(x log2 e)
    return torch.add(shift * -_LOG2E, logits, alpha=scale * _LOG2E, out=out).exp2_()


def add_exponentials_(
    logits: Float[Tensor, "r c"], dim: int, maximum: Tensor, total: Tensor, scratch: Float[Tensor, "r c"]
) -> None:
    """Add a tile to the running `maximum` and `total` of its rows (dim 1) or columns (dim 0), both in place."""
    raised = torch.maximum(maximum, logits.amax(dim))  # [r] or [c]
    total.mul_(torch.exp(maximum - raised))  # the sum so far, relative to the raised maximum
    total.add_(scaled_exp(logits, 1.0, raised.unsqueeze(dim), out=scratch).sum(dim))
    maximum.copy_(raised)


def softmax_(logits: Float[Tensor, "r c"]) -> tuple[Float[Tensor, "r c"], Float[Tensor, " r"]]:
    """Replace each row by its softmax, and return the rows' log-sum-exps too."""
    maximum = logits.amax(1, keepdim=True)  # [r, 1]
    exponentials = scaled_exp(logits, 1.0, maximum, out=logits)
    total = exponentials.sum(1, keepdim=True)  # [r, 1]
    return exponentials.mul_(1 / total), (maximum + total.log()).squeeze(1)


class _KnownGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, *inputs_and_gradients: Tensor | None) -> Tensor:
        ctx.save_for_backward(*inputs_and_gradients[len(inputs_and_gradients) // 2 :])
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        gradients = [None if gradient is None else gradient * upstream for gradient in ctx.saved_tensors]
        return None, *gradients, *[None] * len(gradients)  # for the value, the inputs, their gradients


def with_gradient(
    value: Float[Tensor, ""], inputs: Sequence[Tensor], gradients: Sequence[Tensor | None]
) -> Float[Tensor, ""]:
    """Return `value` as a differentiable function of `inputs` whose gradients are known already.

    A loss is a scalar, so what arrives from above is one factor. Finding the gradient together with the value, while a
    tile of logits is at hand, saves the backward pass from computing that tile again.
    """
    return _KnownGradient.apply(value, *inputs, *gradients)


def ask_gradients(*tensors: Tensor) -> list[bool]:
    """Say for which of the tensors a gradient will be asked."""
    return [torch.is_grad_enabled() and tensor.requires_grad for tensor in tensors]


def sum_over_rows(
    queries: Float[Tensor, "n dim"],
    keys: Float[Tensor, "m dim"],
    scale: Float[Tensor, ""],
    loss_: Callable[[Tensor, slice], Tensor],
    *,
    count: int,
    block: int,
) -> Float[Tensor, ""]:
    """Return 1 / count * sum of a loss of each row of `scale * queries @ keys.T`, `block` rows at a time.

    A block has its rows' whole softmaxes at hand, so value and gradient come out of one sweep. `loss_(logits, rows)`
    returns the sum over the rows of a block and replaces the logits by its gradient with respect to them.
    Differentiable in `queries`, `keys` and `scale`.
    """
    need_queries, need_keys, need_scale = ask_gradients(queries, keys, scale)
    query_gradient = torch.zeros_like(queries) if need_queries or need_scale else None
    key_gradient = torch.zeros_like(keys) if need_keys else None
    scale_gradient = None
    with torch.no_grad(), no_autocast(queries):
        scaled = queries * scale  # [n, dim]
        value = scaled.new_zeros(())
        buffer = scaled.new_empty(min(block, len(scaled)) * len(keys))
        for rows in blocks(len(scaled), block):
            # Logits of the block [r, m]; after `loss_`, the loss's gradient with respect to them.
            logits = matmul(scaled[rows], keys.T, buffer)
            value += loss_(logits, rows)
            if query_gradient is not None:
                query_gradient[rows] = logits @ keys  # with respect to the scaled queries
            if key_gradient is not None:  # every block adds to all keys
                key_gradient.addmm_(logits.T, scaled[rows], alpha=1 / count)
        if query_gradient is not None:
            # scaled = scale * queries: the chain rule for both factors.
            query_gradient /= count
            scale_gradient = (queries * query_gradient).sum()
            query_gradient *= scale
    return with_gradient(value / count, [queries, keys, scale], [query_gradient, key_gradient, scale_gradient])


def matmul(left: Float[Tensor, "r dim"], right: Float[Tensor, "dim c"], buffer: Tensor) -> Float[Tensor, "r c"]:
    """Write left @ right to the first part of a flat buffer: the same memory, warm in the cache, for every tile."""
    shape = len(left), right.shape[1]
    return torch.mm(left, right, out=buffer[: shape[0] * shape[1]].view(shape))
