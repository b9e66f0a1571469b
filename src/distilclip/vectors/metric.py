"""Name the metrics that a threshold can be in, and check both. Imports neither torch nor numpy."""

from __future__ import annotations

import math
import numbers
from typing import Any, Literal, get_args

from distilclip.errors import InputError, did_you_mean

Metric = Literal["euclidean", "sqeuclidean", "cosine"]


def check_metric(metric: str) -> None:
    """Raise `InputError` naming the known metrics unless `metric` is one of them."""
    known = get_args(Metric)
    if metric not in known:
        raise InputError(f"metric={metric!r} is unknown. {did_you_mean(str(metric), known)}")


def check_distance(name: str, value: Any) -> None:
    """Raise `InputError` unless the argument `name` is a positive, finite number."""
    if not (isinstance(value, numbers.Real) and math.isfinite(value) and float(value) > 0):
        raise InputError(f"{name}={value!r}: a distance threshold is a positive, finite number.")
