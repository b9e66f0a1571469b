"""The cluster loss with its classes on several ranks: embeddings gathered, log-sum-exps reduced.

Every rank sees all rows of the global batch and its own classes. The three softmaxes' sums are taken per shard and
reduced; from the reduced sums each rank finds the whole gradient of its own centers, and its classes' part of the
gradient of every embedding. Nothing of n x k exists anywhere (ops.clustertiles).
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from distilclip import distributed
from distilclip.losses._cluster_tiles import PartialSums, Softmaxes, Weights, partial_gradients, partial_sums
from distilclip.losses._tiling import full_precision


def class_range(num_classes: int, rank: int, world: int) -> tuple[int, int]:
    """First and past-the-last class of a rank: consecutive ranges whose sizes differ by one at most."""
    return num_classes * rank // world, num_classes * (rank + 1) // world


def sharded_cluster(
    student: Float[Tensor, "n dim"],
    teacher: Float[Tensor, "n dim"],
    centers: Float[Tensor, "c dim"],
    labels: Int[Tensor, " n"],
    *,
    first_class: int,
    own: slice,
    alpha: float,
    temperature: float,
    class_scale: float,
) -> Float[Tensor, ""]:
    """What the rows `own` add to the cluster loss of a global batch of n rows; the ranks' parts add up to the loss.

    Args:
        student, teacher: unit rows of all ranks (`distributed.gather`).
        centers: the classes of this rank, `first_class` the number of the first among those of all ranks; there may be
            none.
        labels: of all rows, numbered as the classes of all ranks together.

    The gradient is that of the sum of all ranks' parts: whole for `centers`, this rank's part for `student`, which the
    backward pass of `distributed.gather` adds up. Every rank must give its part the same weight. The teacher is a
    constant.
    """
    softmaxes = Softmaxes(class_scale=class_scale, temperature=temperature)
    student, teacher, centers = full_precision(student, teacher.detach(), centers)
    return _ShardedCluster.apply(student, teacher, centers, labels, first_class, own, alpha, softmaxes)


def _reduced(sums: PartialSums) -> PartialSums:
    """The sums over the classes of all ranks: their maxima first, then everything that adds up, in one message each."""
    maximum = distributed.reduce_(sums.maximum.clone(), "max")
    raised = sums.raised(maximum)
    packed = distributed.reduce_(torch.cat([raised.total, raised.gap[None], raised.own[None]]))
    return PartialSums(maximum=maximum, total=packed[:3], gap=packed[3], own=packed[4])


class _ShardedCluster(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        centers: Tensor,
        labels: Tensor,
        first_class: int,
        own: slice,
        alpha: float,
        softmaxes: Softmaxes,
    ) -> Tensor:
        sums = _reduced(partial_sums(student, teacher, centers, labels, softmaxes=softmaxes, first_class=first_class))
        ctx.save_for_backward(student, teacher, centers, labels)
        ctx.sums, ctx.softmaxes, ctx.first_class, ctx.alpha = sums, softmaxes, first_class, alpha
        loss = alpha * sums.label_loss() + (1 - alpha) * sums.divergence()
        return loss[own].sum() / len(labels)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        student, teacher, centers, labels = ctx.saved_tensors
        weight = float(upstream) / len(labels)
        gradients = partial_gradients(
            student,
            teacher,
            centers,
            labels,
            ctx.sums,
            weights=Weights(label=ctx.alpha * weight, distribution=(1 - ctx.alpha) * weight),
            softmaxes=ctx.softmaxes,
            first_class=ctx.first_class,
            needed=(ctx.needs_input_grad[0], False, ctx.needs_input_grad[2]),
        )
        return gradients.student, None, gradients.centers, None, None, None, None, None
