"""Every term of an objective for one process's rows of a global batch; the processes' values add up to the term.

A process that holds the whole batch takes the losses as they are. One of several computes its own rows against the
gathered rows of all (n x m products instead of m x m, m = world x n), and gradients find their way back through the
gather. Every row counts 1 / m, so weights mean the same on any number of processes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.nn import functional as F

from distilclip import distributed, losses
from distilclip.losses._tiling import full_precision, no_autocast
from distilclip.losses.distillation import row_divergence
from distilclip.losses.features import Features
from distilclip.train.class_head import StepClasses
from distilclip.train.sharding import sharded_cluster

Scale = Float[Tensor, ""]


@dataclass(frozen=True, kw_only=True)
class Share:
    """One process's rows of a global batch, and the rows of all processes."""

    rows: slice
    """which rows of the global batch are here"""
    count: int
    """rows of the global batch"""
    gather: Callable[[Tensor], Tensor] = distributed.gather
    _gathered: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @classmethod
    def here(cls, num_rows: int) -> Share:
        """This process's share, where every process holds `num_rows`."""
        start = distributed.rank() * num_rows
        return cls(rows=slice(start, start + num_rows), count=distributed.world() * num_rows)

    @property
    def whole(self) -> bool:
        """Whether the global batch is here."""
        return self.rows == slice(0, self.count)

    @property
    def weight(self) -> float:
        """What a mean over the rows here counts in the mean over all."""
        return (self.rows.stop - self.rows.start) / self.count

    def all(self, rows: Shaped[Tensor, "n ..."]) -> Shaped[Tensor, "m ..."]:
        """The rows of all processes, differentiable; one message for each tensor, however often it is asked for."""
        if self.whole:
            return rows
        if id(rows) not in self._gathered:
            self._gathered[id(rows)] = rows, self.gather(rows)  # held, so that no other tensor gets this id
        return self._gathered[id(rows)][1]


def contrast(
    image: Float[Tensor, "n dim"], text: Float[Tensor, "n dim"], *, scale: Scale, share: Share
) -> Float[Tensor, ""]:
    """`losses.contrastive`: both directions' InfoNCE, the rows here as queries, the rows of all as keys."""
    if share.whole:
        return losses.contrastive(image, text, scale=scale)
    return (_info_nce(image, text, scale, share) + _info_nce(text, image, scale, share)) / 2


def task(student: Features, *, share: Share) -> Float[Tensor, ""]:
    """The student's own loss: `losses.sigmoid` of a model with a bias (SigLIP), else `contrast`."""
    if student.bias is None:
        return contrast(student.image, student.text, scale=student.scale, share=share)
    return losses.sigmoid(
        student.image,
        share.all(student.text),
        scale=student.scale,
        bias=student.bias,
        offset=share.rows.start,
        count=share.count,
    )


def cluster(
    student: Float[Tensor, "n dim"],
    teacher: Float[Tensor, "n dim"],
    classes: StepClasses,
    *,
    alpha: float,
    temperature: float,
    class_scale: float,
    share: Share,
) -> Float[Tensor, ""]:
    """`losses.cluster`, of the classes of a step; with several processes each has its own range of them."""
    if share.whole:
        return losses.cluster(
            student,
            teacher,
            classes.centers,
            classes.labels,
            alpha=alpha,
            temperature=temperature,
            class_scale=class_scale,
        ).total
    return sharded_cluster(
        share.all(student),
        share.all(teacher),
        classes.centers,
        classes.labels,
        first_class=classes.first,
        own=share.rows,
        alpha=alpha,
        temperature=temperature,
        class_scale=class_scale,
    )


def instance(student: Features, teacher: Features, *, scale: Scale, gamma: float, share: Share) -> Float[Tensor, ""]:
    """`losses.instance`: each student tower against the teacher's other tower."""
    if share.whole:
        return losses.instance(student, teacher, scale=scale, gamma=gamma)
    by_image = contrast(student.image, teacher.text, scale=scale, share=share)
    by_text = contrast(student.text, teacher.image, scale=scale, share=share)
    return gamma * by_image + (1 - gamma) * by_text


def relational(student: Features, teacher: Features, *, share: Share) -> Float[Tensor, ""]:
    """`losses.relational`: the divergence of the rows here, both ways.

    Between two models of the sigmoid loss it is `losses.sigmoid_relational`, which has one way. Where only one of them
    is such a model, its bias makes no difference: a softmax does not see it.
    """
    if student.bias is not None and teacher.bias is not None:
        return losses.sigmoid_relational(
            student.image,
            share.all(student.text),
            teacher.image,
            share.all(teacher.text),
            scale=student.scale,
            bias=student.bias,
            teacher_scale=teacher.scale,
            teacher_bias=teacher.bias,
            count=share.count,
        )
    if share.whole:
        return losses.relational(student, teacher)

    def one_way(own: Tensor, other: Tensor, target: Tensor, other_target: Tensor) -> Tensor:
        return row_divergence(
            own,
            share.all(other),
            target,
            share.all(other_target),
            scale=student.scale,
            teacher_scale=teacher.scale,
            count=share.count,
        )

    rows = one_way(student.image, student.text, teacher.image, teacher.text)
    columns = one_way(student.text, student.image, teacher.text, teacher.image)
    return (rows + columns) / 2


def feature(student: Features, teacher: Features, *, share: Share) -> Float[Tensor, ""]:
    """`losses.feature`, a mean over rows."""
    value = losses.feature(student, teacher)
    return value if share.whole else value * share.weight


def interactive(student: Features, teacher: Features, *, scale: Scale, share: Share) -> Float[Tensor, ""]:
    """`losses.interactive`: the rows here against the teacher's keys of all."""
    if share.whole:
        return losses.interactive(student, teacher, scale=scale)
    by_image = _info_nce(student.image, teacher.text, scale, share)
    by_text = _info_nce(student.text, teacher.image, scale, share)
    return (by_image + by_text) / 2


def gradient(student: Features, teacher: Features, *, share: Share) -> Float[Tensor, ""]:
    """`losses.gradient`, of the rows here: both models' contrastive gradients with respect to them."""
    if share.whole:
        return losses.gradient(student, teacher)
    with torch.no_grad():
        targets = _contrastive_gradients(teacher, share)
    own = _contrastive_gradients(student, share)
    return torch.stack([F.mse_loss(g, t.to(g)) for g, t in zip(own, targets, strict=True)]).sum() * share.weight


def _info_nce(queries: Tensor, keys: Tensor, scale: Scale, share: Share) -> Tensor:
    return losses.info_nce(queries, share.all(keys), scale=scale, offset=share.rows.start, count=share.count)


def _contrastive_gradients(features: Features, share: Share) -> list[Tensor]:
    """The rows here of g_x, g_y of image-to-text, then of text-to-image (ops.mimicry.gradient).

    Row i of g_y sums over column i of the softmax P, whose rows are normalised elsewhere too: the processes exchange
    their rows' log-sum-exps, m numbers, and each forms the columns it needs.
    """
    image, text, scale = full_precision(features.image, features.text, features.scale)
    gradients = []
    with no_autocast(image):
        for x, y in ((image, text), (text, image)):
            all_x, all_y = share.all(x), share.all(y)
            own = torch.zeros(len(x), share.count, dtype=x.dtype, device=x.device)
            own.diagonal(share.rows.start).fill_(1)
            logits = scale * x @ all_y.T  # [n, m]
            normaliser = share.gather(torch.logsumexp(logits, dim=1))  # [m]
            columns = torch.exp(scale * all_x @ y.T - normaliser[:, None])  # [m, n]
            gradients.append(scale * (torch.softmax(logits, dim=1) - own) @ all_y / share.count)
            gradients.append(scale * (columns - own.T).T @ all_x / share.count)
    return gradients
