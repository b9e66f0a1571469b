"""Compare the embeddings and decisions of a student with its teacher's, whatever the labels say.

Example: a student whose embeddings are the teacher's, turned by 90 degrees, has cosine 0 and CKA 1. If their class
probabilities for one image are (1/2, 1/2) and the teacher's (3/4, 1/4), KL is 3/4 ln 3/2 + 1/4 ln 1/2 = 0.131 nats.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from distilclip.measures.metrics import row_tiles

Logits = Callable[[Tensor], Tensor]
"""From image embeddings [n, dim] to the scores of k classes [n, k]."""


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Hold how closely a student follows its teacher.

    `top1` is the share of images for which both choose the same class, `top5` the mean share of the teacher's first
    five classes that are among the student's (None of five classes or fewer), `kl` the mean KL(teacher || student) of
    their class probabilities in nats, each at its own scale; all three None without classes. `cka` is the linear CKA of
    the image embeddings, `cosine` their mean cosine, None where the widths differ.
    """

    top1: float | None
    top5: float | None
    kl: float | None
    cka: float
    cosine: float | None


def agreement(
    student: Float[Tensor, "n ds"],
    teacher: Float[Tensor, "n dt"],
    *,
    classifiers: tuple[Logits, Logits] | None = None,
    num_classes: int = 0,
) -> Agreement:
    """Compare image embeddings of the same n images and, where both can classify them, their class scores."""
    top1 = top5 = kl = None
    if classifiers is not None:
        num_agreed, sum_overlap, sum_kl = 0, 0.0, 0.0
        # Tile by tile, so that the n x k scores of both never exist at once.
        for rows in row_tiles(len(student), num_classes):
            ours, theirs = classifiers[0](student[rows]), classifiers[1](teacher[rows])  # [t, k] each
            num_agreed += int((ours.argmax(dim=1) == theirs.argmax(dim=1)).sum())
            # Means over a tile's rows, summed with the number of rows: tiles may differ in size.
            sum_kl += mean_kl(ours, theirs) * len(ours)
            if num_classes > 5:
                sum_overlap += top_k_overlap(ours, theirs, top_k=5) * len(ours)
        top1, kl = num_agreed / len(student), sum_kl / len(student)
        top5 = sum_overlap / len(student) if num_classes > 5 else None
    return Agreement(
        top1=top1,
        top5=top5,
        kl=kl,
        cka=linear_cka(student, teacher),
        cosine=mean_cosine(student, teacher) if student.shape[1] == teacher.shape[1] else None,
    )


def linear_cka(x: Float[Tensor, "n dx"], y: Float[Tensor, "n dy"]) -> float:
    """Return the linear centred kernel alignment of two representations of the same n rows, in [0, 1].

    The feature form |X'Y|^2 / (|X'X| |Y'Y|) of centred X and Y (Kornblith et al. 2019, equation 4 and section 3):
    d x d products instead of n x n kernels, summed over row tiles in float64. Neither rotation, nor shift, nor scale of
    either side changes it. A representation that does not vary at all is aligned with nothing: 0.
    """
    mean_x, mean_y = x.double().mean(0), y.double().mean(0)
    cross = torch.zeros(x.shape[1], y.shape[1], dtype=torch.float64, device=x.device)  # X'Y
    gram_x = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64, device=x.device)  # X'X
    gram_y = torch.zeros(y.shape[1], y.shape[1], dtype=torch.float64, device=x.device)  # Y'Y
    for rows in row_tiles(len(x), x.shape[1] + y.shape[1]):
        # Centred first: subtracting the means from the sums of products would lose digits.
        a, b = x[rows].double() - mean_x, y[rows].double() - mean_y
        cross += a.T @ b
        gram_x += a.T @ a
        gram_y += b.T @ b
    spread = gram_x.norm() * gram_y.norm()
    return (cross.square().sum() / spread).item() if spread > 0 else 0.0


def mean_cosine(x: Float[Tensor, "n dim"], y: Float[Tensor, "n dim"]) -> float:
    """Return the mean cosine similarity of matching rows."""
    return torch.nn.functional.cosine_similarity(x.double(), y.double(), dim=1).mean().item()


def mean_kl(student_logits: Float[Tensor, "n k"], teacher_logits: Float[Tensor, "n k"]) -> float:
    """Return the mean over rows of KL(softmax(teacher) || softmax(student)), in nats."""
    student = student_logits.double().log_softmax(dim=1)
    teacher = teacher_logits.double().log_softmax(dim=1)
    return (teacher.exp() * (teacher - student)).sum(dim=1).mean().item()


def top_k_overlap(student_logits: Float[Tensor, "n k"], teacher_logits: Float[Tensor, "n k"], *, top_k: int) -> float:
    """Return the mean over rows of the share of the teacher's `top_k` first classes that are among the student's."""
    student = student_logits.topk(top_k, dim=1).indices
    teacher = teacher_logits.topk(top_k, dim=1).indices
    # [n, k, 1] against [n, 1, k]: which of the student's classes are among the teacher's.
    return (student[:, :, None] == teacher[:, None, :]).any(dim=1).double().mean().item()
