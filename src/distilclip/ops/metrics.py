"""Accuracies, ranks, agreement of two models, and bootstrap intervals.

One rule settles every tie: among equal scores the smaller index comes first. A rank is the number of candidates
strictly ahead of the target plus the equal ones with a smaller index, so a constant scorer gets chance, not 100 %.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy import stats
from torch import Tensor

TILE_ELEMENTS = 1 << 22  # scores in memory at once: 16 MiB in float32


def row_tiles(num_rows: int, num_columns: int, *, tile_elements: int = TILE_ELEMENTS) -> Iterator[slice]:
    """Slices of rows such that rows x columns stays within `tile_elements` (one row at the least)."""
    step = max(1, tile_elements // max(1, num_columns))
    for start in range(0, num_rows, step):
        yield slice(start, min(num_rows, start + step))


def target_rank(scores: Float[Tensor, "n k"], target: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
    """Position of each row's target among its k scores; 0 is first.

    Raises `ValueError` for scores that are not finite: NaN compares as "not ahead" and would read as a perfect rank.
    """
    if not torch.isfinite(scores.sum()):
        raise ValueError("scores hold NaN or infinity: the model's outputs are broken")
    own = scores.gather(1, target[:, None])
    # Counted in floats, exact below 2^24 columns: a comparison into booleans and their sum take several times as long.
    buffer = torch.empty_like(scores)
    rank = torch.gt(scores, own, out=buffer).sum(dim=1).long()
    level = torch.eq(scores, own, out=buffer).sum(dim=1)
    tied = (level > 1).nonzero()[:, 0]
    if len(tied):
        column = torch.arange(scores.shape[1], device=scores.device)
        rank[tied] += ((scores[tied] == own[tied]) & (column < target[tied, None])).sum(dim=1)
    return rank


def top_k_accuracy(scores: Float[Tensor, "n k"], labels: Int[Tensor, " n"], *, top_k: int = 1) -> float:
    """Share of rows whose label is among the `top_k` highest scores."""
    return (target_rank(scores, labels) < top_k).double().mean().item()


def mean_per_class(correct: Bool[Tensor, " n"], labels: Int[Tensor, " n"]) -> float:
    """Mean over the classes that occur in `labels` of each one's share of correct rows."""
    total = torch.bincount(labels)
    hits = torch.bincount(labels[correct], minlength=len(total))
    present = total > 0
    return (hits[present].double() / total[present].double()).mean().item()


def linear_cka(x: Float[Tensor, "n dx"], y: Float[Tensor, "n dy"]) -> float:
    """Linear centred kernel alignment of two representations of the same n rows, in [0, 1].

    The feature form |X'Y|^2 / (|X'X| |Y'Y|) of centred X and Y (Kornblith et al. 2019, equation 4 and section 3):
    d x d products instead of n x n kernels, summed over row tiles in float64. Neither rotation, nor shift, nor scale of
    either side changes it. A representation that does not vary at all is aligned with nothing: 0.
    """
    mean_x, mean_y = x.double().mean(0), y.double().mean(0)
    cross = torch.zeros(x.shape[1], y.shape[1], dtype=torch.float64, device=x.device)
    gram_x = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64, device=x.device)
    gram_y = torch.zeros(y.shape[1], y.shape[1], dtype=torch.float64, device=x.device)
    for rows in row_tiles(len(x), x.shape[1] + y.shape[1]):
        a, b = x[rows].double() - mean_x, y[rows].double() - mean_y
        cross += a.T @ b
        gram_x += a.T @ a
        gram_y += b.T @ b
    spread = gram_x.norm() * gram_y.norm()
    return (cross.square().sum() / spread).item() if spread > 0 else 0.0


def mean_cosine(x: Float[Tensor, "n dim"], y: Float[Tensor, "n dim"]) -> float:
    """Mean cosine similarity of matching rows."""
    return torch.nn.functional.cosine_similarity(x.double(), y.double(), dim=1).mean().item()


def mean_kl(student_logits: Float[Tensor, "n k"], teacher_logits: Float[Tensor, "n k"]) -> float:
    """Mean over rows of KL(softmax(teacher) || softmax(student)), in nats."""
    student = student_logits.double().log_softmax(dim=1)
    teacher = teacher_logits.double().log_softmax(dim=1)
    return (teacher.exp() * (teacher - student)).sum(dim=1).mean().item()


def top_k_overlap(student_logits: Float[Tensor, "n k"], teacher_logits: Float[Tensor, "n k"], *, top_k: int) -> float:
    """Mean over rows of the share of the teacher's `top_k` first classes that are among the student's."""
    student = student_logits.topk(top_k, dim=1).indices
    teacher = teacher_logits.topk(top_k, dim=1).indices
    return (student[:, :, None] == teacher[:, None, :]).any(dim=1).double().mean().item()


def mean_interval(values: Sequence[float], *, confidence: float = 0.95) -> tuple[float, float]:
    """Student's t interval of the mean of a few independent values: accuracies of several folds or draws."""
    mean, spread = statistics.fmean(values), statistics.stdev(values)
    reach = float(stats.t.ppf((1 + confidence) / 2, len(values) - 1)) * spread / math.sqrt(len(values))
    return mean - reach, mean + reach


def bootstrap_interval(
    hits: Bool[np.ndarray, " n"],
    *,
    strata: Int[np.ndarray, " n"] | None = None,
    confidence: float = 0.95,
    num_resamples: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval of the share of hits, the same for the same seed.

    With `strata` (the labels, for mean per class) rows are drawn within each stratum and the statistic is the mean of
    the strata's shares. The number of hits among n rows drawn with replacement is binomial, so it is drawn as such.
    """
    if strata is None:
        strata = np.zeros(len(hits), dtype=np.int64)
    total = np.bincount(strata)
    present = total > 0
    total, num_hits = total[present], np.bincount(strata, weights=hits)[present]
    drawn = np.random.default_rng(seed).binomial(total, num_hits / total, size=(num_resamples, len(total)))
    tail = (1 - confidence) / 2
    low, high = np.quantile((drawn / total).mean(axis=1), [tail, 1 - tail])
    return float(low), float(high)
