"""The three distances a threshold can be given in, and what each says in terms of the others.

Everything is searched in one space: the rows themselves for the Euclidean metrics, the rows scaled to unit length for
`cosine`. There, squared Euclidean distance s gives euclidean = sqrt(s), sqeuclidean = s, cosine = s / 2.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import numpy as np
from jaxtyping import Float

from distilclip.errors import InputError, did_you_mean

Metric = Literal["euclidean", "sqeuclidean", "cosine"]


def squared_threshold(threshold: float, metric: str) -> float:
    """The squared Euclidean distance that a threshold stands for; `InputError` for a threshold no distance can have."""
    check_metric(metric)
    if not (math.isfinite(threshold) and threshold > 0):
        raise InputError(f"threshold={threshold!r}: a distance threshold is a positive, finite number.")
    if metric == "euclidean":
        return threshold * threshold
    return threshold if metric == "sqeuclidean" else 2 * threshold


def distance(squared: Float[np.ndarray, " n"], metric: str) -> Float[np.ndarray, " n"]:
    """Squared Euclidean distances in the metric's own unit, rounded to float32: the value compared with thresholds."""
    check_metric(metric)
    if metric == "euclidean":
        squared = np.sqrt(squared)
    elif metric == "cosine":
        squared = squared / 2
    return squared.astype(np.float32)


def squared(distance: Float[np.ndarray, " n"], metric: str) -> Float[np.ndarray, " n"]:
    """The squared Euclidean distances that distances in the metric's unit stand for."""
    check_metric(metric)
    if metric == "euclidean":
        return distance * distance
    return distance if metric == "sqeuclidean" else 2 * distance


def equivalents(threshold: float, metric: str) -> dict[str, float]:
    """The same threshold between unit vectors in every metric: euclidean 0.07 is sqeuclidean 0.0049, cosine 0.00245."""
    squared = squared_threshold(threshold, metric)
    return {"euclidean": math.sqrt(squared), "sqeuclidean": squared, "cosine": squared / 2}


def check_metric(metric: str) -> None:
    """`InputError` naming the known metrics unless `metric` is one of them."""
    known = get_args(Metric)
    if metric not in known:
        raise InputError(f"metric={metric!r} is unknown. {did_you_mean(metric, known)}")
