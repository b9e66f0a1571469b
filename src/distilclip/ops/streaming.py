"""What the losses that never hold n x n or n x k numbers share: blocks, exponentials, and gradients found on the way."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
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


def full_precision(*tensors: Tensor) -> list[Tensor]:
    """All tensors in float64 if one of them is, else in float32: softmaxes of half-precision sums are not worth having.

    Differentiable; gradients come back in each tensor's own type.
    """
    dtype = torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
    return [tensor.to(dtype) for tensor in tensors]


def no_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    """A block in which matrix products keep their operands' precision on the tensor's device."""
    return torch.autocast(tensor.device.type, enabled=False)


def scaled_exp(
    logits: Float[Tensor, "r c"], scale: float, shift: Tensor, *, out: Float[Tensor, "r c"]
) -> Float[Tensor, "r c"]:
    """exp(scale * logits - shift), written to `out` (which may be `logits`); shift is a column [r, 1] or a row [c].

    By powers of two: torch's float32 `exp` on CPUs is MKL's, measured 3.5 x slower than `exp2`, and 150 x slower where
    the result is denormal, which happens in every softmax of large scale.
    """
    return torch.add(shift * -_LOG2E, logits, alpha=scale * _LOG2E, out=out).exp2_()


class _KnownGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, *inputs_and_gradients: Tensor | None) -> Tensor:
        ctx.save_for_backward(*inputs_and_gradients[len(inputs_and_gradients) // 2 :])
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        gradients = [None if gradient is None else gradient * upstream for gradient in ctx.saved_tensors]
        return None, *gradients, *[None] * len(gradients)


def with_gradient(
    value: Float[Tensor, ""], inputs: Sequence[Tensor], gradients: Sequence[Tensor | None]
) -> Float[Tensor, ""]:
    """`value` as a differentiable function of `inputs` whose gradients are known already.

    A loss is a scalar, so what arrives from above is one factor. Finding the gradient together with the value, while a
    tile of logits is at hand, saves the backward pass from computing that tile again.
    """
    return _KnownGradient.apply(value, *inputs, *gradients)


def wanted(*tensors: Tensor) -> list[bool]:
    """Which of the tensors a gradient will be asked for."""
    return [torch.is_grad_enabled() and tensor.requires_grad for tensor in tensors]
