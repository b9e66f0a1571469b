"""SigLIP's pairwise sigmoid loss, and distillation between two models trained with it, in tiles.

Each of the n x m pairs of a batch is a yes or no of its own, so no row or column has to be normalised:

    sigmoid(x, y; s, b) = 1/n sum_ij softplus(-z_ij (s x_i . y_j + b)),      z_ij = 1 where j belongs to i, else -1

In large batches only `block` rows of logits exist at a time, forward and backward. Rows are expected to have unit
length; sums are float32 whatever the autocast. Source: Zhai et al. 2023 (SigLIP), algorithm 1.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from distilclip.losses._tiling import full_precision, no_autocast, sum_over_rows
from distilclip.losses.contrastive import PLAIN_ENTRIES, row_block

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
    """The sigmoid loss of n pairs, or one rank's share of it; key `offset + i` belongs to query i.

    With `keys` gathered from all ranks, `offset` the rows of the ranks before and `count` the global number of queries
    (default: n), the ranks' results add up to the loss of the whole batch. Differentiable in everything but sizes.
    Raises `ValueError` where widths differ or a query has no key.
    """
    if queries.shape[1] != keys.shape[1]:
        raise ValueError(f"queries are {queries.shape[1]} wide, keys {keys.shape[1]}: both must lie in one space.")
    if not 0 <= offset <= len(keys) - len(queries):
        raise ValueError(
            f"offset={offset} with {len(queries)} queries and {len(keys)} keys: key offset + i must exist."
        )
    queries, keys, scale, bias = full_precision(queries, keys, scale, bias)
    count = len(queries) if count is None else count
    if block is None and len(queries) * len(keys) <= PLAIN_ENTRIES:
        with no_autocast(queries):
            logits = scale * queries @ keys.T + bias
            own = logits.diagonal(offset)[: len(logits)]
            return (F.softplus(logits).sum() - own.sum()) / count  # softplus(-x) = softplus(x) - x

    def softplus_(logits: Tensor, rows: slice) -> Tensor:
        own = logits.diagonal(offset + rows.start)[: len(logits)]  # a view
        value = F.softplus(logits).sum() - own.sum()
        logits.sigmoid_()
        own.sub_(1)
        return value

    queries, keys = _with_bias(queries, keys, scale, bias)
    return sum_over_rows(queries, keys, scale, softplus_, count=count, block=block or row_block(keys))


def sigmoid_relational(
    queries: Float[Tensor, "n dim"],
    keys: Float[Tensor, "m dim"],
    teacher_queries: Float[Tensor, "n width"],
    teacher_keys: Float[Tensor, "m width"],
    *,
    scale: Scalar,
    bias: Scalar,
    teacher_scale: Scalar,
    teacher_bias: Scalar,
    count: int | None = None,
    block: int | None = None,
) -> Float[Tensor, ""]:
    """Divergence of the student's answers for all pairs from the teacher's.

        1/n sum_ij KL( Bernoulli(sigma(T_ij)) || Bernoulli(sigma(S_ij)) ),   S = s x . y + b, T the teacher's logits

    What CLIP-KD's relational term is to softmax models. Widths may differ; `count` and gathered keys as in `sigmoid`.
    Differentiable in `queries`, `keys`, `scale` and `bias`; the teacher is a constant.
    """
    if len(queries) != len(teacher_queries) or len(keys) != len(teacher_keys):
        raise ValueError("student and teacher must have the same rows: one query and one key for each sample.")
    queries, keys, scale, bias = full_precision(queries, keys, scale, bias)
    teacher = full_precision(teacher_queries.detach(), teacher_keys.detach(), teacher_scale, teacher_bias)
    target_queries, target_keys, target_scale, target_bias = (value.detach().to(queries) for value in teacher)
    count = len(queries) if count is None else count

    def divergence(logits: Tensor, targets: Tensor) -> Tensor:
        answers = torch.sigmoid(targets)
        return (answers * (targets - logits) + F.softplus(logits) - F.softplus(targets)).sum()

    if block is None and len(queries) * len(keys) <= PLAIN_ENTRIES:
        with no_autocast(queries):
            targets = target_scale * target_queries @ target_keys.T + target_bias
            return divergence(scale * queries @ keys.T + bias, targets) / count

    def divergence_(logits: Tensor, rows: slice) -> Tensor:
        targets = target_scale * target_queries[rows] @ target_keys.T + target_bias
        value = divergence(logits, targets)
        logits.sigmoid_().sub_(targets.sigmoid_())
        return value

    queries, keys = _with_bias(queries, keys, scale, bias)
    return sum_over_rows(queries, keys, scale, divergence_, count=count, block=block or row_block(keys))


def _with_bias(queries: Tensor, keys: Tensor, scale: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """One more coordinate, through which scale * x . y contains the bias, and autograd finds the bias's gradient."""
    ones = queries.new_ones(len(queries), 1)
    return torch.cat([queries, ones], dim=1), torch.cat([keys, (bias / scale).expand(len(keys), 1)], dim=1)
