"""Choose the score from which on rows are kept: by a share of the rows, or by a value.

>>> cut = cut_share(np.array([0.3, 0.1, 0.2, 0.2], np.float32), share=0.5)
>>> cut.threshold == np.float32(0.2), cut.num_kept  # both rows at 0.2 are kept
(True, 3)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32

from distilclip.errors import InputError

NUM_CURVE_POINTS = 20


@dataclass(frozen=True, kw_only=True)
class Cut:
    """The lowest score that is kept, and how many of the rows have it or a higher one."""

    threshold: float
    num_kept: int


def cut_share(scores: Float32[np.ndarray, " n"], *, share: float) -> Cut:
    """Return the cut that keeps the best `share` of the rows; rows with the same score as the last are kept, too."""
    num = max(1, round(share * len(scores)))
    threshold = float(np.partition(scores, len(scores) - num)[len(scores) - num])
    return cut_value(scores, threshold=threshold)


def cut_value(scores: Float32[np.ndarray, " n"], *, threshold: float) -> Cut:
    """Return the cut that keeps every row with at least this score.

    Raises:
        InputError: no row has.
    """
    num_kept = int((scores >= np.float32(threshold)).sum())
    if not num_kept:
        raise InputError(
            f"No row has a score of {threshold:g} or more: the largest is {scores.max():g}. Give a smaller value, or "
            "the share to keep (--top 0.3)."
        )
    return Cut(threshold=float(np.float32(threshold)), num_kept=num_kept)


def share_curve(scores: Float32[np.ndarray, " n"]) -> list[dict[str, float]]:
    """Return the thresholds that keep 5, 10, ... 100 % of the rows."""
    shares = np.arange(1, NUM_CURVE_POINTS + 1) / NUM_CURVE_POINTS
    ordered = np.sort(scores)[::-1]
    places = np.maximum(1, np.round(shares * len(ordered)).astype(int)) - 1
    return [{"share": s, "threshold": t} for s, t in zip(shares.tolist(), ordered[places].tolist(), strict=True)]
