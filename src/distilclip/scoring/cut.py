"""Choose by their scores which rows are kept: the best share, of all or of each part, or those on one side of a value.

>>> scores = np.array([0.3, 0.1, 0.2, 0.2], np.float32)
>>> cut = cut_share(scores, share=0.5)
>>> cut.threshold.round(6).tolist(), cut.keep.tolist()  # both rows at 0.2 are kept
([0.20000000298023224], [True, False, True, True])
>>> cut_share(scores, share=0.5, part=np.array([0, 0, 0, 1])).keep.tolist()  # 2 of 3 rows, and the only one
[True, False, True, True]
>>> cut_value(scores, threshold=0.2, side="below").keep.tolist()
[False, True, False, False]
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float32, Int

from distilclip.errors import InputError

NUM_CURVE_POINTS = 20
NUM_BINS = 40


Side = Literal["at-least", "below"]
"""Keep the rows whose score is a threshold or higher, or those whose score is below it."""


@dataclass(frozen=True, kw_only=True)
class Cut:
    """Which rows are kept: those on one side of the threshold of their part. A part without rows has NaN."""

    keep: Bool[np.ndarray, " n"]
    threshold: Float32[np.ndarray, " parts"]
    side: Side

    @property
    def num_kept(self) -> int:
        """Rows that are kept."""
        return int(self.keep.sum())


def on_side(scores: Float32[np.ndarray, " n"], *, threshold: float, side: Side) -> Bool[np.ndarray, " n"]:
    """Return which rows are kept."""
    below = scores < np.float32(threshold)
    return below if side == "below" else ~below


def cut_share(scores: Float32[np.ndarray, " n"], *, share: float, part: Int[np.ndarray, " n"] | None = None) -> Cut:
    """Return the cut that keeps the best `share` of the rows, or with `part` of the rows of each part.

    At least one row of a part is kept; rows with the same score as the last are kept, too.
    """
    part = np.zeros(len(scores), np.int64) if part is None else part
    order = np.lexsort((-scores, part))  # the best of each part first
    first = np.searchsorted(part[order], np.arange(int(part.max(initial=0)) + 2))
    size = np.diff(first)
    last = first[:-1] + np.maximum(1, np.round(share * size).astype(np.int64)) - 1
    threshold = np.full(len(size), np.nan, np.float32)
    threshold[size > 0] = scores[order[last[size > 0]]]
    return Cut(keep=scores >= threshold[part], threshold=threshold, side="at-least")


def cut_value(scores: Float32[np.ndarray, " n"], *, threshold: float, side: Side) -> Cut:
    """Return the cut at a value.

    Raises:
        InputError: no row is on that side of it.
    """
    keep = on_side(scores, threshold=threshold, side=side)
    if not keep.any():
        is_below = side == "below"
        raise InputError(
            f"No row has a score {'below ' if is_below else 'of '}{threshold:g}{'' if is_below else ' or more'}: the "
            f"{'smallest' if is_below else 'largest'} is {scores.min() if is_below else scores.max():g}. Give another "
            "value, or the share to keep (--top 0.3)."
        )
    return Cut(keep=keep, threshold=np.array([threshold], np.float32), side=side)


def share_curve(scores: Float32[np.ndarray, " n"]) -> list[dict[str, float]]:
    """Return the thresholds that keep 5, 10, ... 100 % of the rows."""
    shares = np.arange(1, NUM_CURVE_POINTS + 1) / NUM_CURVE_POINTS
    ordered = np.sort(scores)[::-1]
    places = np.maximum(1, np.round(shares * len(ordered)).astype(int)) - 1
    return [{"share": s, "threshold": t} for s, t in zip(shares.tolist(), ordered[places].tolist(), strict=True)]


def score_histogram(scores: Float32[np.ndarray, " n"], keep: Bool[np.ndarray, " n"]) -> list[dict[str, float]]:
    """Count the rows, and those that are kept, in equal ranges of the scores: from `low` to before `high`."""
    edges = np.linspace(float(scores.min()), float(scores.max()), NUM_BINS + 1)
    if edges[0] == edges[-1]:
        edges = edges[:1].repeat(2)  # one range that is a point
    bins = np.clip(np.searchsorted(edges, scores.astype(np.float64), side="right") - 1, 0, len(edges) - 2)
    counts = (np.bincount(bins[rows], minlength=len(edges) - 1).tolist() for rows in (slice(None), keep))
    return [
        {"low": low, "high": high, "num_scored": scored, "num_kept": kept}
        for low, high, scored, kept in zip(edges[:-1].tolist(), edges[1:].tolist(), *counts, strict=True)
    ]
