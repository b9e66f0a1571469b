"""Compute cluster discrimination over up to millions of centers, without n x k logits in memory.

With unit rows u (student, projected), t (teacher), w (centers, normalised here), labels z:

    L_label        = mean_i -log softmax_j(s_l w_j . u_i)[z_i]
    L_distribution = mean_i KL( softmax_j(w_j . u_i / tau) || softmax_j(w_j . t_i / tau) )
    L_cluster      = alpha L_label + (1 - alpha) L_distribution

One rank has all classes; of several, each has a range of them and sees the rows of all. They exchange the softmaxes'
sums, and each finds the whole gradient of its own centers. Source: CLIP-CID, section 3.3; sampled classes as in
Partial FC (An et al. 2021).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from distilclip.errors import InputError
from distilclip.losses._checks import check_share
from distilclip.losses._cluster_tiles import (
    ClusterInputs,
    PartialSums,
    RowWeights,
    Softmaxes,
    partial_gradients,
    partial_sums,
)
from distilclip.losses._tiling import ask_gradients, full_precision
from distilclip.losses.contrastive import check_pairs
from distilclip.losses.features import RankRows


@dataclass(frozen=True)
class ClusterLoss:
    """The loss and its two parts, each differentiable: total = alpha label + (1 - alpha) distribution."""

    total: Float[Tensor, ""]
    label: Float[Tensor, ""]
    distribution: Float[Tensor, ""]


@dataclass(frozen=True, kw_only=True)
class ClassShard:
    """What one of several ranks has: its rows of the global batch, and a range of the classes."""

    rows: RankRows
    first: int
    """the number of this rank's first class among the classes of all ranks"""


def cluster(
    student: Float[Tensor, "n dim"],
    teacher: Float[Tensor, "n dim"],
    centers: Float[Tensor, "k dim"],
    labels: Int[Tensor, " m"],
    *,
    alpha: float = 0.999,
    temperature: float = 0.07,
    class_scale: float = 1.0,
    classes: Int[Tensor, " c"] | None = None,
    shard: ClassShard | None = None,
) -> ClusterLoss:
    """Return the cluster loss of n rows, or what the rows of one rank add to that of the global batch of m rows.

    `student` and `teacher` have unit rows of the centers' width; `centers` may have any length. Gradients reach the
    student, the centers and, if it asks for one, the teacher. With all classes here, that of `total` is found in the
    forward pass, block by block while the logits are at hand (differentiating `label` or `distribution` alone costs a
    second sweep). The memory beyond inputs and gradients is O(n dim + 256 k). `classes` restricts the softmaxes to some
    centers (see `sample_classes`); other centers get a gradient of zero.

    With a `shard`, `centers` are the classes of this rank (there may be none) and `labels` those of the global batch,
    numbered as the classes of all ranks together. The ranks' values add up to the loss. Every rank must give its value
    the same weight; then the gradient of `centers` is whole, and the backward pass of the gather adds up the parts for
    `student`.

    Raises `ValueError` for shapes that differ, for labels without a center, for impossible scales and shares, and for
    `classes` that are not centers in ascending order, each once.
    """
    shard = shard or ClassShard(rows=RankRows.alone(len(student)), first=0)
    check_pairs(student, teacher, names=("student", "teacher"), rows=shard.rows)
    check_share(alpha, name="alpha")
    if centers.ndim != 2 or centers.shape[1] != student.shape[1]:
        raise ValueError(
            f"centers are {tuple(centers.shape)}, student and teacher {student.shape[1]} wide: cluster the embeddings "
            "of this teacher, and project the student to its width."
        )
    if labels.shape != (shard.rows.count,):
        raise ValueError(f"labels are {tuple(labels.shape)}, but there are {shard.rows.count} rows: one label per row.")
    if shard.rows.whole and (int(labels.min()) < 0 or int(labels.max()) >= len(centers)):
        raise ValueError(
            f"labels lie in {int(labels.min())}..{int(labels.max())}, but there are {len(centers)} centers: "
            "labels and centers must come from the same `cluster` run."
        )
    if classes is not None:
        _check_classes(classes, len(centers))
        labels, centers = positions(labels, classes), F.embedding(classes, centers)
    # Rows of all ranks against this rank's classes; nothing below is recorded by autograd (see _Cluster).
    softmaxes = Softmaxes(class_scale=class_scale, temperature=temperature)
    student, teacher, centers = full_precision(shard.rows.all(student), shard.rows.all(teacher), centers)
    needed = ask_gradients(student, teacher, centers)
    inputs = ClusterInputs(
        student=student.detach(),
        teacher=teacher.detach(),
        centers=centers.detach(),
        labels=labels,
        softmaxes=softmaxes,
        first_class=shard.first,
    )
    return ClusterLoss(*_Cluster.apply(student, teacher, centers, inputs, shard.rows, alpha, needed))


def sample_classes(
    labels: Int[Tensor, " n"], num_centers: int, sample_rate: float, generator: torch.Generator | None = None
) -> Int[Tensor, " c"]:
    """Draw the classes of one step, ascending: all that occur in `labels`, filled up with uniformly drawn others.

    There are `sample_rate * num_centers` of them, or as many as occur in `labels` if that is more (Partial FC). Pass
    the labels of the global batch and equally seeded generators, and every rank draws the same classes.
    """
    if not 0 < sample_rate <= 1:
        raise ValueError(f"sample_rate={sample_rate}: a share of the centers, above 0 and at most 1.")
    device = labels.device if generator is None else generator.device
    score = torch.rand(num_centers, generator=generator, device=device).to(labels.device)
    present = labels.unique()
    score[present] = 2.0  # above every draw
    # The highest scores: every class that occurs, then others at random.
    num_classes = max(round(sample_rate * num_centers), len(present))
    return score.topk(num_classes, sorted=False).indices.sort().values


def positions(labels: Int[Tensor, " n"], classes: Int[Tensor, " c"]) -> Int[Tensor, " n"]:
    """Return where each label stands in the ascending `classes`; `ValueError` if one is missing.

    Example: labels (9, 5, 5) among the classes (1, 5, 6, 9) stand at (3, 1, 1).
    """
    index = torch.searchsorted(classes, labels).clamp_(max=len(classes) - 1)  # where each label would stand
    missing = classes[index] != labels
    if missing.any():
        raise ValueError(
            f"label {int(labels[missing][0])} is not among the {len(classes)} sampled classes, or these are not in "
            "ascending order: draw them with sample_classes."
        )
    return index


def _check_classes(classes: Int[Tensor, " c"], num_centers: int) -> None:
    """Raise `InputError` unless the classes are centers, each named once, ascending: a double would count twice."""
    wrong = (classes.diff() <= 0).nonzero()[:, 0].tolist()
    if wrong:
        first, second = classes[wrong[0] : wrong[0] + 2].tolist()
        raise InputError(
            f"classes[{wrong[0] + 1}] is {second} after {first}: classes are ascending and each is named once, as "
            "sample_classes draws them."
        )
    if len(classes) == 0 or classes[0] < 0 or classes[-1] >= num_centers:
        shown = f"from {int(classes[0])} to {int(classes[-1])}" if len(classes) else "empty"
        raise InputError(f"classes are {shown}; there are the centers 0 to {num_centers - 1}.")


class _Cluster(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        centers: Tensor,
        inputs: ClusterInputs,
        rows: RankRows,
        alpha: float,
        needed: list[bool],
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.inputs, ctx.alpha, ctx.needed, ctx.gradients = inputs, alpha, needed, None
        if rows.whole and any(needed):
            # All classes are here: a block's softmaxes are complete while its logits are, so gradients are found now.
            weights = RowWeights(label=alpha / rows.count, distribution=(1 - alpha) / rows.count)
            sums, ctx.gradients = partial_gradients(inputs, weights, needed)
        else:
            sums = _reduce_sums(partial_sums(inputs), rows)
        ctx.sums = sums
        # Means over the rows here, as their part of the mean over all.
        losses = (values[rows.here] for values in (sums.label_loss(), sums.divergence()))
        label, distribution = (own.mean() * rows.weight if len(own) else own.sum() for own in losses)
        return alpha * label + (1 - alpha) * distribution, label, distribution

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, by_total: Tensor | None, by_label: Tensor | None, by_distribution: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None  # scaled in place: good for one backward pass
        if gradients is not None and by_label is None and by_distribution is None and by_total is not None:
            for gradient in gradients:
                if gradient is not None:
                    gradient.mul_(by_total)
        else:
            # total = alpha label + (1 - alpha) distribution: what arrives at each of the two parts.
            total, label, distribution = (float(g or 0) for g in (by_total, by_label, by_distribution))
            count = len(ctx.inputs.labels)
            weights = RowWeights(
                label=(ctx.alpha * total + label) / count,
                distribution=((1 - ctx.alpha) * total + distribution) / count,
            )
            _, gradients = partial_gradients(ctx.inputs, weights, ctx.needed, ctx.sums)
        return *gradients, None, None, None, None


def _reduce_sums(sums: PartialSums, rows: RankRows) -> PartialSums:
    """The sums over the classes of all ranks: their maxima first, then everything that adds up, in one message each."""
    if rows.whole:
        return sums
    maximum = rows.reduce(sums.maximum.clone(), "max")
    raised = sums.raise_to(maximum)  # to the common maximum, so that sums of all ranks may be added up
    packed = rows.reduce(torch.cat([raised.total, raised.gap[None], raised.own[None]]), "sum")  # [5, n]
    return PartialSums(maximum, packed[:3], packed[3], packed[4])
