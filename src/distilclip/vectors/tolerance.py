"""Say how near two rows must be: a threshold together with the metric whose unit it has.

Everything is searched in one space: the rows as they are for the Euclidean metrics, the rows scaled to unit length for
`cosine`. There, a squared Euclidean distance s is euclidean = sqrt(s), sqeuclidean = s, cosine = s / 2.

>>> near = Tolerance(0.5, "cosine")
>>> near.squared
1.0
>>> near.distance_of(np.array([0.5, 1.0])).tolist()
[0.25, 0.5]
>>> near.includes(np.array([0.25, 0.5], np.float32)).tolist()
[True, False]
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from distilclip.vectors.metric import check_distance, check_metric


@dataclass(frozen=True)
class Tolerance:
    """Two rows are near when their distance in `metric` is less than `threshold`, both rounded to float32.

    Raises:
        InputError: an unknown metric, or a threshold that no distance can have.
    """

    threshold: float
    metric: str

    def __post_init__(self) -> None:
        check_metric(self.metric)
        check_distance("threshold", self.threshold)

    @property
    def squared(self) -> float:
        """The squared Euclidean distance that the threshold stands for."""
        if self.metric == "euclidean":
            return self.threshold * self.threshold
        return self.threshold if self.metric == "sqeuclidean" else 2 * self.threshold

    @property
    def largest_squared(self) -> float:
        """The largest squared Euclidean distance of two rows that are near."""
        near, far = 0.0, 2 * self.squared
        while near < (middle := (near + far) / 2) < far:
            is_near = self.includes(self.distance_of(np.array([middle])))[0]
            near, far = (middle, far) if is_near else (near, middle)
        return near

    def distance_of(self, squared: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
        """Squared Euclidean distances in the metric's unit, as float32: what is compared with the threshold."""
        if self.metric == "euclidean":
            squared = np.sqrt(squared)
        elif self.metric == "cosine":
            squared = squared / 2
        return squared.astype(np.float32)

    def squared_of(self, distance: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
        """The squared Euclidean distances that distances in the metric's unit stand for."""
        if self.metric == "euclidean":
            return distance * distance
        return distance if self.metric == "sqeuclidean" else 2 * distance

    def includes(self, distance: Float[np.ndarray, "*shape"]) -> Bool[np.ndarray, "*shape"]:
        """Whether distances in the metric's unit are below the threshold."""
        return distance < np.float32(self.threshold)


def equivalents(threshold: float, metric: str) -> dict[str, float]:
    """The same threshold between unit vectors in every metric: euclidean 0.07 is sqeuclidean 0.0049, cosine 0.00245."""
    squared = Tolerance(threshold, metric).squared
    return {"euclidean": math.sqrt(squared), "sqeuclidean": squared, "cosine": squared / 2}
