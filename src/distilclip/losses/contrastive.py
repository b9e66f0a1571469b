"""Compute the contrastive loss at any batch size: plain where the logits are few, in tiles where n x n do not fit.

    InfoNCE(x, y; s)  = mean_i -log softmax_j(s x_i . y_j)[i]
    contrast(x, y; s) = 1/2 (InfoNCE(x, y; s) + InfoNCE(y, x; s))

All rows are expected to have unit length. Sums and softmaxes are float32 (float64 for float64 input) whatever the
autocast. Example: two orthogonal pairs and s = log 3 give the logits (log 3, 0; 0, log 3); each softmax gives its own
pair 3/4, so the loss is log 4/3 = 0.2877. Source: Radford et al. 2021 (CLIP), figure 3; CLIP-CID, section 3.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from distilclip.losses._checks import check_scale, check_share
from distilclip.losses._tiling import (
    add_exponentials_,
    ask_gradients,
    blocks,
    full_precision,
    matmul,
    no_autocast,
    scaled_exp,
    softmax_,
    sum_over_rows,
    with_gradient,
)
from distilclip.losses.features import Features, RankRows

PLAIN_ENTRIES = 1 << 22
"""Up to so many logits (16 MiB) the materialised form is used: it is faster there, and equal."""

_TILE_ENTRIES = {"cpu": 1 << 21, "cuda": 1 << 25}


def contrastive(
    image: Float[Tensor, "n dim"],
    text: Float[Tensor, "n dim"],
    *,
    scale: Float[Tensor, ""] | float,
    rows: RankRows | None = None,
    tile: tuple[int, int] | None = None,
) -> Float[Tensor, ""]:
    """Return the mean of both directions' InfoNCE over n pairs, or what the `rows` of one rank add to it.

    Differentiable in `image`, `text` and `scale`. `tile` (rows, columns) forces the tiled form, which holds
    O((rows + columns) dim + rows columns) numbers; by default it is used above 2,048 pairs. Raises `ValueError` where
    the shapes differ, and for a `scale` that is not positive.
    """
    check_pairs(image, text, names=("image", "text"), rows=rows)
    check_scale(scale)
    if rows is not None and not rows.whole:
        # Each direction has other keys on every rank: own images to all texts, own texts to all images.
        by_image = info_nce(image, rows.all(text), scale=scale, offset=rows.offset, count=rows.count)
        by_text = info_nce(text, rows.all(image), scale=scale, offset=rows.offset, count=rows.count)
        return (by_image + by_text) / 2
    image, text, scale = full_precision(image, text, scale)
    if tile is None and len(image) ** 2 <= PLAIN_ENTRIES:
        with no_autocast(image):
            logits = scale * image @ text.T  # [n, n], for both directions
            own = torch.arange(len(image), device=image.device)
            return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
    return _tiled_contrastive(image, text, scale, tile or _default_tile(image))


def info_nce(
    queries: Float[Tensor, "n dim"],
    keys: Float[Tensor, "m dim"],
    *,
    scale: Float[Tensor, ""] | float,
    offset: int = 0,
    count: int | None = None,
    block: int | None = None,
) -> Float[Tensor, ""]:
    """Return one direction of the contrastive loss, for all queries or for those of one rank.

        1 / count * sum_i -log softmax_j(scale q_i . k_j)[offset + i]

    Query i belongs to key `offset + i`. With `keys` gathered from all ranks, `offset` the rows of the ranks before and
    `count` the global number of queries (default: n), the ranks' results add up to the loss of the whole batch.
    Differentiable in `queries`, `keys` and `scale`; `block` rows of logits exist at a time when n x m is large. Raises
    `ValueError` where widths differ or a query has no key.
    """
    if queries.shape[1] != keys.shape[1]:
        raise ValueError(_width_message("queries", queries, "keys", keys))
    check_scale(scale)
    if not 0 <= offset <= len(keys) - len(queries):
        raise ValueError(
            f"offset={offset} with {len(queries)} queries and {len(keys)} keys: key offset + i must exist for every "
            "query i. Gather the keys of all ranks, and pass the number of rows on the ranks before this one."
        )
    queries, keys, scale = full_precision(queries, keys, scale)
    count = len(queries) if count is None else count
    if block is None and len(queries) * len(keys) <= PLAIN_ENTRIES:
        with no_autocast(queries):
            own = torch.arange(offset, offset + len(queries), device=queries.device)  # each query's key
            return F.cross_entropy(scale * queries @ keys.T, own, reduction="sum") / count

    def cross_entropy_(logits: Tensor, rows: slice) -> Tensor:
        own = logits.diagonal(offset + rows.start)[: len(logits)]  # a view
        own_sum = own.sum()  # before the logits are overwritten
        _, normaliser = softmax_(logits)
        own.sub_(1)  # the gradient: softmax minus 1 at the own key
        return normaliser.sum() - own_sum

    return sum_over_rows(queries, keys, scale, cross_entropy_, count=count, block=block or row_block(keys))


def instance(
    student: Features,
    teacher: Features,
    *,
    scale: Float[Tensor, ""] | float,
    gamma: float = 0.5,
    rows: RankRows | None = None,
) -> Float[Tensor, ""]:
    """Return CLIP-CID's instance-level distillation: each student tower against the teacher's other tower.

        gamma contrast(u, c_t; s) + (1 - gamma) contrast(v, e_t; s)

    u, v are the student's image and text embeddings projected to the teacher's width (CLIP-CID, section 3.3).
    """
    check_share(gamma, name="gamma")
    check_pairs(student.image, teacher.text, names=("student", "teacher"), rows=rows)
    check_pairs(student.text, teacher.image, names=("student", "teacher"), rows=rows)
    # Two contrastive losses, each of them both ways.
    by_image = contrastive(student.image, teacher.text, scale=scale, rows=rows)
    by_text = contrastive(student.text, teacher.image, scale=scale, rows=rows)
    return gamma * by_image + (1 - gamma) * by_text


def row_block(keys: Float[Tensor, "m dim"]) -> int:
    """Return how many rows of logits to hold at a time: as many as fit PLAIN_ENTRIES, 32 at the least."""
    return max(32, PLAIN_ENTRIES // len(keys))


def check_pairs(left: Tensor, right: Tensor, *, names: tuple[str, str], rows: RankRows | None = None) -> None:
    """Raise `ValueError` unless the rows of `left` and `right` are pairs of one width.

    There must be one at least, or, where `rows` says so, one on another rank.
    """
    if left.ndim != 2 or right.ndim != 2:
        raise ValueError(f"{names[0]} {tuple(left.shape)}, {names[1]} {tuple(right.shape)}: both must be [n, dim].")
    if len(left) != len(right):
        raise ValueError(
            f"{names[0]} has {len(left)} rows, {names[1]} {len(right)}: row i of both must be the same pair."
        )
    if len(left) == 0 and (rows is None or rows.whole):
        raise ValueError(f"{names[0]} and {names[1]} have no rows: a mean over no pairs does not exist.")
    if left.shape[1] != right.shape[1]:
        raise ValueError(_width_message(names[0], left, names[1], right))


def _width_message(left_name: str, left: Tensor, right_name: str, right: Tensor) -> str:
    message = f"{left_name} is {left.shape[1]} wide, {right_name} {right.shape[1]}"
    if right_name == "teacher":
        return f"{message}: project the student first (models.heads)."
    return f"{message}: both must lie in one space."


def _default_tile(image: Tensor) -> tuple[int, int]:
    """One row to two columns; within the last-level cache on CPUs."""
    rows = math.isqrt(_TILE_ENTRIES.get(image.device.type, _TILE_ENTRIES["cpu"]) // 2)
    return rows, 2 * rows


def _tiled_contrastive(image: Tensor, text: Tensor, scale: Tensor, tile: tuple[int, int]) -> Tensor:
    """Log-normalisers of all rows and columns in a first sweep over the tiles, gradients in a second."""
    n = len(image)
    need_image, need_text, need_scale = ask_gradients(image, text, scale)
    image_gradient = text_gradient = scale_gradient = None
    with torch.no_grad(), no_autocast(image):
        scaled = image * scale  # [n, dim]
        # First sweep: the normalisers of all rows and columns give the value.
        rows, columns = _log_normalisers(scaled, text, tile)
        value = (rows + columns).sum() / (2 * n) - (scaled * text).sum() / n
        if need_image or need_text or need_scale:
            # Second sweep: with them, every tile's softmaxes give its part of the gradients.
            by_image, by_text = _softmax_products(scaled, text, rows, columns, tile, need_text=need_text)
            by_image = (by_image - 2 * text) / (2 * n)  # with respect to the scaled images
            image_gradient = scale * by_image
            scale_gradient = (image * by_image).sum()
            if by_text is not None:  # each pair itself counts -1 in both directions
                text_gradient = (by_text - 2 * scaled) / (2 * n)
    return with_gradient(value, [image, text, scale], [image_gradient, text_gradient, scale_gradient])


def _log_normalisers(scaled: Tensor, text: Tensor, tile: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """log sum exp over each row and over each column of scaled @ text.T, by running maxima and sums."""
    n, m = len(scaled), len(text)
    row_maximum, column_maximum = (scaled.new_full((length,), -torch.inf) for length in (n, m))
    row_sum, column_sum = scaled.new_zeros(n), scaled.new_zeros(m)
    # The same memory for every tile: its logits, and their exponentials.
    logits_buffer, exp_buffer = scaled.new_empty(2, min(tile[0], n) * min(tile[1], m))
    for rows in blocks(n, tile[0]):
        for columns in blocks(m, tile[1]):
            logits = matmul(scaled[rows], text[columns].T, logits_buffer)  # [r, c]
            scratch = exp_buffer[: logits.numel()].view_as(logits)
            # The tile counts in the softmaxes of its rows and in those of its columns.
            add_exponentials_(logits, 1, row_maximum[rows], row_sum[rows], scratch)
            add_exponentials_(logits, 0, column_maximum[columns], column_sum[columns], scratch)
    return row_maximum + row_sum.log(), column_maximum + column_sum.log()


def _softmax_products(
    scaled: Tensor, text: Tensor, rows: Tensor, columns: Tensor, tile: tuple[int, int], *, need_text: bool
) -> tuple[Tensor, Tensor | None]:
    """(P + Q) text and (P + Q)^T scaled, P and Q the softmaxes over rows and columns with the given normalisers."""
    by_image = torch.zeros_like(scaled)
    by_text = torch.zeros_like(text) if need_text else None
    logits_buffer, exp_buffer = scaled.new_empty(2, min(tile[0], len(scaled)) * min(tile[1], len(text)))
    for r in blocks(len(scaled), tile[0]):
        for c in blocks(len(text), tile[1]):
            logits = matmul(scaled[r], text[c].T, logits_buffer)
            # P + Q of the tile: both softmaxes of its logits.
            both = scaled_exp(logits, 1.0, rows[r, None], out=exp_buffer[: logits.numel()].view_as(logits))
            both += scaled_exp(logits, 1.0, columns[None, c], out=logits)
            by_image[r].addmm_(both, text[c])
            if by_text is not None:
                by_text[c].addmm_(both.T, scaled[r])
    return by_image, by_text
