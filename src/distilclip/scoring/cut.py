"""Choose by their scores which rows are kept: the best share, those from a value on, or those below one.

>>> cut = cut_share(np.array([0.3, 0.1, 0.2, 0.2], np.float32), share=0.5)
>>> round(cut.threshold, 6), cut.num_kept  # both rows at 0.2 are kept
(0.2, 3)
>>> cut_value(np.array([0.3, 0.1, 0.2], np.float32), threshold=0.2, side="below").num_kept
1
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float32

from distilclip.errors import InputError

NUM_CURVE_POINTS = 20


Side = Literal["at-least", "below"]
"""Keep the rows whose score is a threshold or higher, or those whose score is below it."""


@dataclass(frozen=True, kw_only=True)
class Cut:
    """A threshold of scores, on which side of it rows are kept, and how many are."""

    threshold: float
    side: Side
    num_kept: int


def on_side(scores: Float32[np.ndarray, " n"], *, threshold: float, side: Side) -> Bool[np.ndarray, " n"]:
    """Return which rows are kept."""
    below = scores < np.float32(threshold)
    return below if side == "below" else ~below


def cut_share(scores: Float32[np.ndarray, " n"], *, share: float) -> Cut:
    """Return the cut that keeps the best `share` of the rows; rows with the same score as the last are kept, too."""
    num = max(1, round(share * len(scores)))
    threshold = float(np.partition(scores, len(scores) - num)[len(scores) - num])
    return cut_value(scores, threshold=threshold, side="at-least")


def cut_value(scores: Float32[np.ndarray, " n"], *, threshold: float, side: Side) -> Cut:
    """Return the cut at a value.

    Raises:
        InputError: no row is on that side of it.
    """
    num_kept = int(on_side(scores, threshold=threshold, side=side).sum())
    if not num_kept:
        is_below = side == "below"
        raise InputError(
            f"No row has a score {'below ' if is_below else 'of '}{threshold:g}{'' if is_below else ' or more'}: the "
            f"{'smallest' if is_below else 'largest'} is {scores.min() if is_below else scores.max():g}. Give another "
            "value, or the share to keep (--top 0.3)."
        )
    return Cut(threshold=float(np.float32(threshold)), side=side, num_kept=num_kept)


def share_curve(scores: Float32[np.ndarray, " n"]) -> list[dict[str, float]]:
    """Return the thresholds that keep 5, 10, ... 100 % of the rows."""
    shares = np.arange(1, NUM_CURVE_POINTS + 1) / NUM_CURVE_POINTS
    ordered = np.sort(scores)[::-1]
    places = np.maximum(1, np.round(shares * len(ordered)).astype(int)) - 1
    return [{"share": s, "threshold": t} for s, t in zip(shares.tolist(), ordered[places].tolist(), strict=True)]
