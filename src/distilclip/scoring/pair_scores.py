"""Score image-text pairs from their embeddings: by the pair alone, against others, or by what it is wanted for.

`clip_score` says how well a caption fits its picture: the cosine of the two. It likes captions that fit every picture.
`neg_clip_loss` takes off what a pair has in common with others (Wang et al. 2024, "CLIPLoss and norm-based data
selection", eq. 3): with x and y the embeddings, a the teacher's scale and m a mean over random other pairs,

    s_i = x_i . y_i  -  1 / (2 a) * (log m_j exp(a x_i . y_j)  +  log m_j exp(a x_j . y_i))

`norm_similarity` says how near a picture is to a set that matters, whatever its caption: its largest cosine to any
picture of the set (their NormSim at p = infinity).

>>> image, text = np.eye(3), np.eye(3)[[0, 1, 0]]
>>> clip_score(image, text).tolist()
[1.0, 1.0, 0.0]
>>> norm_similarity(np.array([[0.6, 0.8], [1.0, 0.0]]), np.array([[0.0, 1.0], [0.8, 0.6]])).round(2).tolist()
[0.96, 0.8]
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float32, Int
from torch import Tensor

BLOCK_ROWS = 4096
"""Rows whose products are computed at a time."""


def clip_score(image: Float[np.ndarray, "n dim"], text: Float[np.ndarray, "n dim"]) -> Float32[np.ndarray, " n"]:
    """Return the cosine of each row's two embeddings."""
    score = np.empty(len(image), np.float32)
    for start in range(0, len(image), BLOCK_ROWS):
        x, y = (_unit(rows[start : start + BLOCK_ROWS]) for rows in (image, text))
        score[start : start + BLOCK_ROWS] = (x * y).sum(axis=1)
    return score


def neg_clip_loss(
    image: Float[np.ndarray, "n dim"],
    text: Float[np.ndarray, "n dim"],
    *,
    others: tuple[Float[np.ndarray, "m dim"], Float[np.ndarray, "m dim"]],
    scale: float,
    same: Int[np.ndarray, " n"] | None = None,
    device: str | torch.device = "cpu",
) -> Float32[np.ndarray, " n"]:
    """Return the cosine of each row's two embeddings, less what the row has with other pairs.

    Args:
        image: embeddings of pictures.
        text: embeddings of their captions.
        others: embeddings of the pictures and captions of random pairs.
        scale: factor of the cosines, the teacher's.
        same: of every row, its place among `others`, which is left out there; -1 where it is none of them.
        device: where products are computed.
    """
    score = clip_score(image, text).astype(np.float64)
    other_image, other_text = (torch.from_numpy(_unit(rows)).float().to(device) for rows in others)
    for start in range(0, len(image), BLOCK_ROWS):
        here = slice(start, start + BLOCK_ROWS)
        own = None if same is None else torch.from_numpy(same[here]).to(device)
        for rows, against in ((image, other_text), (text, other_image)):
            logits = scale * torch.from_numpy(_unit(rows[here])).float().to(device) @ against.T
            score[here] -= _log_mean_exp(logits, own).double().cpu().numpy() / (2 * scale)
    return score.astype(np.float32)


def norm_similarity(
    image: Float[np.ndarray, "n dim"], targets: Float[np.ndarray, "m dim"], *, device: str | torch.device = "cpu"
) -> Float32[np.ndarray, " n"]:
    """Return the largest cosine of each row to any target."""
    return nearest_targets(image, targets, device=device).similarity


@dataclass(frozen=True, kw_only=True)
class NearestTargets:
    """Of every row the place of the target with the largest cosine to it, and that cosine."""

    place: Int[np.ndarray, " n"]
    similarity: Float32[np.ndarray, " n"]


def nearest_targets(
    image: Float[np.ndarray, "n dim"], targets: Float[np.ndarray, "m dim"], *, device: str | torch.device = "cpu"
) -> NearestTargets:
    """Find the target nearest to each row, whatever the threshold: products in float32 choose it.

    Its cosine is computed again in float64, so that equal rows have a cosine of exactly 1 on every device.
    """
    wanted = torch.from_numpy(_unit(targets)).float().to(device)
    place, similarity = np.zeros(len(image), np.int64), np.empty(len(image), np.float32)
    for start in range(0, len(image), BLOCK_ROWS):
        here = _unit(image[start : start + BLOCK_ROWS])
        rows = torch.from_numpy(here).float().to(device)
        best = torch.full((len(rows),), -torch.inf, device=rows.device)
        at = torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
        for first in range(0, len(wanted), BLOCK_ROWS):
            largest = (rows @ wanted[first : first + BLOCK_ROWS].T).max(dim=1)
            at = torch.where(largest.values > best, first + largest.indices, at)
            best = torch.maximum(best, largest.values)
        chosen = place[start : start + BLOCK_ROWS] = at.cpu().numpy()
        similarity[start : start + BLOCK_ROWS] = (here * _unit(targets[chosen])).sum(axis=1)
    return NearestTargets(place=place, similarity=similarity)


def _unit(rows: Float[np.ndarray, "n dim"]) -> Float[np.ndarray, "n dim"]:
    exact = rows.astype(np.float64)
    return exact / np.maximum(np.linalg.norm(exact, axis=1, keepdims=True), 1e-12)


def _log_mean_exp(logits: Float[Tensor, "n m"], own: Int[Tensor, " n"] | None) -> Float[Tensor, " n"]:
    """Return the logarithm of the mean of exp over each row, without its own column where it has one."""
    count = torch.full((len(logits),), logits.shape[1], device=logits.device)
    if own is not None:
        rows = torch.nonzero(own >= 0)[:, 0]
        logits[rows, own[rows]] = -torch.inf
        count[rows] -= 1
    return logits.logsumexp(dim=1) - count.clamp(min=1).log()
