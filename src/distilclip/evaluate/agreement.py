"""How closely a student follows its teacher on a set, whatever the labels say."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from distilclip.evaluate.zero_shot import TextClassifier
from distilclip.measures.metrics import linear_cka, mean_cosine, mean_kl, row_tiles, top_k_overlap


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Student against teacher.

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
    classifiers: tuple[TextClassifier, TextClassifier] | None = None,
) -> Agreement:
    """Compare image embeddings of the same n images and, with the text classifiers of both, what is made of them."""
    top1 = top5 = kl = None
    if classifiers is not None:
        num_classes = classifiers[0].num_classes
        num_agreed, sum_overlap, sum_kl = 0, 0.0, 0.0
        for rows in row_tiles(len(student), num_classes):
            ours, theirs = classifiers[0].logits(student[rows]), classifiers[1].logits(teacher[rows])
            num_agreed += int((ours.argmax(dim=1) == theirs.argmax(dim=1)).sum())
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
