"""Cluster discrimination distillation over up to millions of centers, without n x k logits in memory.

With unit rows u (student, projected), t (teacher), w (centers, normalised here), labels z:

    L_label        = mean_i -log softmax_j(s_l w_j . u_i)[z_i]
    L_distribution = mean_i KL( softmax_j(w_j . u_i / tau) || softmax_j(w_j . t_i / tau) )
    L_cluster      = alpha L_label + (1 - alpha) L_distribution

Source: CLIP-CID, section 3.3; sampled classes as in Partial FC (An et al. 2021).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from distilclip.losses._cluster_tiles import CenterTiles, ClusterGradients, Direction, PartialSums, Softmaxes, Weights
from distilclip.losses._tiling import blocks, full_precision, no_autocast, wanted
from distilclip.losses.contrastive import check_pairs


@dataclass(frozen=True)
class ClusterLoss:
    """The loss and its two parts, each differentiable: total = alpha label + (1 - alpha) distribution."""

    total: Float[Tensor, ""]
    label: Float[Tensor, ""]
    distribution: Float[Tensor, ""]


def cluster(
    student: Float[Tensor, "n dim"],
    teacher: Float[Tensor, "n dim"],
    centers: Float[Tensor, "k dim"],
    labels: Int[Tensor, " n"],
    *,
    alpha: float = 0.999,
    temperature: float = 0.07,
    class_scale: float = 1.0,
    classes: Int[Tensor, " c"] | None = None,
    direction: Direction = "student",
    tile: tuple[int, int] | None = None,
) -> ClusterLoss:
    """Cross-entropy to cluster labels and divergence from the teacher's distribution over clusters.

    `student` and `teacher` have unit rows of the centers' width; `centers` may have any length. Gradients reach the
    student, the centers and, if it asks for one, the teacher; that of `total` is found in the forward pass, block by
    block while the logits are at hand (differentiating `label` or `distribution` alone costs a second sweep).
    `classes` restricts the softmaxes to some centers (see `sample_classes`); other centers get a gradient of zero. The
    memory beyond inputs and gradients is O(n dim + 256 k); `tile` (rows, columns) sets the tile, and no result
    depends on it. Raises `ValueError` for shapes that differ, for labels without a center and for impossible scales.
    """
    check_pairs(student, teacher, names=("student", "teacher"))
    if centers.ndim != 2 or centers.shape[1] != student.shape[1]:
        raise ValueError(
            f"centers are {tuple(centers.shape)}, student and teacher {student.shape[1]} wide: cluster the embeddings "
            "of this teacher, and project the student to its width."
        )
    if labels.shape != (len(student),):
        raise ValueError(f"labels are {tuple(labels.shape)}, but there are {len(student)} rows: one label per row.")
    if classes is not None:
        labels, centers = positions(labels, classes), F.embedding(classes, centers)
    elif int(labels.min()) < 0 or int(labels.max()) >= len(centers):
        raise ValueError(
            f"labels lie in {int(labels.min())}..{int(labels.max())}, but there are {len(centers)} centers: "
            "labels and centers must come from the same `cluster` run."
        )
    softmaxes = Softmaxes(class_scale=class_scale, temperature=temperature, direction=direction)
    student, teacher, centers = full_precision(student, teacher, centers)
    needed = tuple(wanted(student, teacher, centers))
    return ClusterLoss(*_Cluster.apply(student, teacher, centers, labels, softmaxes, alpha, tile, needed))


def sample_classes(
    labels: Int[Tensor, " n"], num_centers: int, sample_rate: float, generator: torch.Generator | None = None
) -> Int[Tensor, " c"]:
    """Classes for one step, ascending: all that occur in `labels`, filled up with uniformly drawn others.

    There are `sample_rate * num_centers` of them, or as many as occur in `labels` if that is more (Partial FC). Pass
    the labels of the global batch and equally seeded generators, and every rank draws the same classes.
    """
    if not 0 < sample_rate <= 1:
        raise ValueError(f"sample_rate={sample_rate}: a share of the centers, above 0 and at most 1.")
    device = labels.device if generator is None else generator.device
    score = torch.rand(num_centers, generator=generator, device=device).to(labels.device)
    present = labels.unique()
    score[present] = 2.0  # above every draw
    num_classes = max(round(sample_rate * num_centers), len(present))
    return score.topk(num_classes, sorted=False).indices.sort().values


def positions(labels: Int[Tensor, " n"], classes: Int[Tensor, " c"]) -> Int[Tensor, " n"]:
    """Where each label stands in the ascending `classes`; `ValueError` if one is missing."""
    index = torch.searchsorted(classes, labels).clamp_(max=len(classes) - 1)
    missing = classes[index] != labels
    if missing.any():
        raise ValueError(
            f"label {int(labels[missing][0])} is not among the {len(classes)} sampled classes, or these are not in "
            "ascending order: draw them with sample_classes."
        )
    return index


class _Cluster(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        centers: Tensor,
        labels: Tensor,
        softmaxes: Softmaxes,
        alpha: float,
        tile: tuple[int, int] | None,
        needed: tuple[bool, ...],
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(student, teacher, centers, labels)
        ctx.softmaxes, ctx.alpha, ctx.tile, ctx.needed = softmaxes, alpha, tile, needed
        label, distribution, ctx.gradients = _sweep(
            student, teacher, centers, labels, softmaxes, (alpha, 1 - alpha), tile, needed
        )
        return alpha * label + (1 - alpha) * distribution, label, distribution

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, by_total: Tensor | None, by_label: Tensor | None, by_distribution: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None  # scaled in place: good for one backward pass
        if gradients is not None and by_label is None and by_distribution is None and by_total is not None:
            for gradient in (gradients.student, gradients.teacher, gradients.centers):
                if gradient is not None:
                    gradient.mul_(by_total)
        else:
            total, label, distribution = (float(g or 0) for g in (by_total, by_label, by_distribution))
            parts = ctx.alpha * total + label, (1 - ctx.alpha) * total + distribution
            student, teacher, centers, labels = ctx.saved_tensors
            *_, gradients = _sweep(student, teacher, centers, labels, ctx.softmaxes, parts, ctx.tile, ctx.needed)
        return gradients.student, gradients.teacher, gradients.centers, None, None, None, None, None


def _sweep(
    student: Tensor,
    teacher: Tensor,
    centers: Tensor,
    labels: Tensor,
    softmaxes: Softmaxes,
    parts: tuple[float, float],
    tile: tuple[int, int] | None,
    needed: tuple[bool, ...],
) -> tuple[Tensor, Tensor, ClusterGradients]:
    """Mean label loss, mean divergence, and the gradients of parts[0] * label + parts[1] * distribution."""
    n = len(labels)
    weights = Weights(label=parts[0] / n, distribution=parts[1] / n)
    with torch.no_grad(), no_autocast(centers):
        tiles = CenterTiles(centers, softmaxes, num_rows=n, tile=tile, keep=any(needed))
        gradients = ClusterGradients.zeros(student, teacher, centers, needed)
        pair = softmaxes.ordered(student, teacher)
        sums = []
        for rows in blocks(n, tiles.rows):
            sums.append(tiles.sums(pair[:, rows], labels[rows]))
            if any(needed):
                tiles.add_gradients(pair[:, rows], labels[rows], sums[-1], weights, gradients, rows)
        if gradients.centers is not None:
            tiles.through_normalisation(gradients.centers)
        whole = PartialSums.of_rows(sums)
        return whole.label_loss().mean(), whole.divergence().mean(), gradients
