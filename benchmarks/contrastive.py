"""Contrastive loss in tiles, forward and backward, against the materialised torch version.

The peer is open_clip's ClipLoss on one process, with one product of all pairs where that takes two.
Peak memory is what either side holds beyond its inputs and the gradients it returns.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from _harness import Case, compare, is_quick
from torch import Tensor

from distilclip.losses.contrastive import contrastive

Inputs = tuple[Tensor, Tensor, Tensor]
Result = tuple[Tensor, ...]
TOLERANCE = 1e-5


def make_inputs(n: int, dim: int) -> Inputs:
    """Pairs of cosine near 0.5, as in the middle of training."""
    generator = torch.Generator().manual_seed(0)
    image = F.normalize(torch.randn(n, dim, generator=generator))
    noise = F.normalize(torch.randn(n, dim, generator=generator))
    text = F.normalize(image + 1.7 * noise)
    return image.requires_grad_(), text.requires_grad_(), torch.tensor(1 / 0.07, requires_grad=True)


def ours(inputs: Inputs) -> Result:
    image, text, scale = inputs
    loss = contrastive(image, text, scale=scale)
    return loss.detach(), *torch.autograd.grad(loss, inputs)


def materialised(inputs: Inputs) -> Result:
    image, text, scale = inputs
    logits = scale * image @ text.T
    own = torch.arange(len(image))
    loss = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
    return loss.detach(), *torch.autograd.grad(loss, inputs)


def equal(left: Result, right: Result) -> bool:
    """Loss and all gradients agree, as vectors, to 1e-5 of their length."""
    return all(bool((a - b).norm() <= TOLERANCE * b.norm()) for a, b in zip(left, right, strict=True))


def case(n: int, dim: int) -> Case:
    return Case(
        name=f"n={n:,} d={dim}: ours / materialised",
        setup=lambda: make_inputs(n, dim),
        ours=ours,
        peer=materialised,
        equal=equal,
        result_mb=lambda inputs: 4 * 2 * n * dim / 1e6,
    )


def main() -> None:
    sizes = (2048, 4096) if is_quick(__doc__ or "") else (2048, 8192, 16_384)
    compare("contrastive", [case(n, 512) for n in sizes])


if __name__ == "__main__":
    main()
