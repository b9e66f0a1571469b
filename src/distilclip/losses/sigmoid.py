"""Compute SigLIP's pairwise sigmoid loss, and the distillation between two models trained with it, in tiles.

Each of the n x m pairs of a batch is a yes or no of its own, so no row or column is normalised:

    sigmoid(x, y; s, b) = 1/n sum_ij softplus(-z_ij (s x_i . y_j + b)),      z_ij = 1 where j belongs to i, else -1

In large batches only `block` rows of logits exist at a time, forward and backward. Rows are expected to have unit
length; sums are float32 whatever the autocast. Source: Zhai et al. 2023 (SigLIP), algorithm 1.

Example: two orthogonal pairs, s = 2, b = 0. Each row has its own pair at 2 and one other at 0, so the loss is
softplus(-2) + softplus(0) = 0.1269 + 0.6931 = 0.8201.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from distilclip.losses._checks import check_scale
from distilclip.losses._tiling import full_precision, no_autocast, sum_over_rows
from distilclip.losses.contrastive import PLAIN_ENTRIES, row_block
from distilclip.losses.features import Features, RankRows

Scalar = Float[Tensor, ""] | float


def sigmoid(
    queries: Float[Tensor, "n dim"],
    keys: Float[Tensor, "m dim"],
    *,
    scale: Scalar,
    bias: Scalar,
    offset: int = 0,
    count: int | None = None,
    block: int | None = None,
) -> Float[Tensor, ""]:
    """Return the sigmoid loss of n pairs, or what one rank adds to it; key `offset + i` belongs to query i.

    With `keys` gathered from all ranks, `offset` the rows of the ranks before and `count` the global number of queries
    (default: n), the ranks' results add up to the loss of the whole batch. Differentiable in everything but sizes.
    Raises `ValueError` where widths differ or a query has no key.
    """
    if queries.shape[1] != keys.shape[1]:
        raise ValueError(f"queries are {queries.shape[1]} wide, keys {keys.shape[1]}: both must lie in one space.")
    check_scale(scale)
    if not 0 <= offset <= len(keys) - len(queries):
        raise ValueError(
            f"offset={offset} with {len(queries)} queries and {len(keys)} keys: key offset + i must exist."
        )
    queries, keys, scale, bias = full_precision(queries, keys, scale, bias)
    count = len(queries) if count is None else count
    if block is None and len(queries) * len(keys) <= PLAIN_ENTRIES:
        with no_autocast(queries):
            logits = scale * queries @ keys.T + bias  # [n, m]
            own = logits.diagonal(offset)[: len(logits)]
            return (F.softplus(logits).sum() - own.sum()) / count  # softplus(-x) = softplus(x) - x

    def softplus_(logits: Tensor, rows: slice) -> Tensor:
        own = logits.diagonal(offset + rows.start)[: len(logits)]  # a view
        value = F.softplus(logits).sum() - own.sum()
        # The gradient: sigma of the logits, minus 1 at the own pairs.
        logits.sigmoid_()
        own.sub_(1)
        return value

    queries, keys = _with_bias(queries, keys, scale, bias)
    return sum_over_rows(queries, keys, scale, softplus_, count=count, block=block or row_block(keys))


def sigmoid_relational(
    student: Features, teacher: Features, *, rows: RankRows | None = None, block: int | None = None
) -> Float[Tensor, ""]:
    """Return how far the student's answers for all pairs are from the teacher's; both models have a bias.

        1/n sum_ij KL( Bernoulli(sigma(T_ij)) || Bernoulli(sigma(S_ij)) ),   S = s x . y + b, T the teacher's logits

    It is to sigmoid models what CLIP-KD's relational term is to softmax models. Widths may differ. Differentiable in
    the student's embeddings, scale and bias; the teacher is a constant.
    """
    if len(student.image) != len(teacher.image) or len(student.text) != len(teacher.text):
        raise ValueError("student and teacher must have the same rows: one image and one text for each sample.")
    if student.bias is None or teacher.bias is None:
        raise ValueError("sigmoid_relational compares two models with a bias; use relational for others.")
    rows = rows or RankRows.alone(len(student.image))
    queries, keys, scale, bias = full_precision(student.image, rows.all(student.text), student.scale, student.bias)
    constants = full_precision(
        teacher.image.detach(), rows.all(teacher.text).detach(), teacher.scale.detach(), teacher.bias.detach()
    )
    target_queries, target_keys, target_scale, target_bias = (value.to(queries) for value in constants)

    def divergence(logits: Tensor, targets: Tensor) -> Tensor:
        # KL of two yes-no answers: a (T - S) + softplus(S) - softplus(T), with a = sigma(T)
        answers = torch.sigmoid(targets)
        return (answers * (targets - logits) + F.softplus(logits) - F.softplus(targets)).sum()

    if block is None and len(queries) * len(keys) <= PLAIN_ENTRIES:
        with no_autocast(queries):
            targets = target_scale * target_queries @ target_keys.T + target_bias  # [n, m]
            return divergence(scale * queries @ keys.T + bias, targets) / rows.count

    def divergence_(logits: Tensor, block: slice) -> Tensor:
        targets = target_scale * target_queries[block] @ target_keys.T + target_bias  # [r, m]
        value = divergence(logits, targets)
        logits.sigmoid_().sub_(targets.sigmoid_())  # the gradient: the student's answers minus the teacher's
        return value

    queries, keys = _with_bias(queries, keys, scale, bias)
    return sum_over_rows(queries, keys, scale, divergence_, count=rows.count, block=block or row_block(keys))


def _with_bias(queries: Tensor, keys: Tensor, scale: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Add one coordinate, through which scale * x . y contains the bias, and autograd finds the bias's gradient."""
    ones = queries.new_ones(len(queries), 1)
    return torch.cat([queries, ones], dim=1), torch.cat([keys, (bias / scale).expand(len(keys), 1)], dim=1)
