"""Draw the rows of an epoch: each once, or as often as its weight says, spread evenly instead of left to chance."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int64


@dataclass(frozen=True)
class Draws:
    """Which of n rows stands at each of the n places of an epoch, before the places are shuffled.

    The rows lie end to end on a line, each as long as its weight. n points at equal distances draw the rows that they
    fall on; all are shifted together, by less than one distance. So every epoch has a row floor(n w / sum w) times or
    once more, and in the mean exactly n w / sum w times. `ends` are the ends of the rows on the line, in whole numbers,
    so that every machine draws alike; None stands for rows of equal length, where point i falls on row i in any case.

    Source: systematic sampling (Madow and Madow 1944, "On the theory of systematic sampling").
    """

    num_rows: int
    ends: Int64[np.ndarray, " n"] | None = None

    @classmethod
    def of_weights(cls, weights: Float64[np.ndarray, " n"]) -> Draws:
        """Return the draws of n rows by their weights, which are finite and positive.

        A weight is kept to 2^-40 of the largest, for 400 million rows to 2^-33: too coarse for differences that are
        rounding only, as between 0.7 / 7 and 0.3 / 3.
        """
        assert len(weights)
        assert (weights > 0).all()
        bits = min(40, 62 - len(weights).bit_length())  # the sum stays below 2^62
        lengths = np.maximum(np.rint(weights / weights.max() * 2.0**bits), 1).astype(np.int64)
        return cls(len(weights), None if (lengths == lengths[0]).all() else np.cumsum(lengths))

    @property
    def length(self) -> int:
        """The length of the line: a shift is a whole number below it."""
        return self.num_rows if self.ends is None else int(self.ends[-1])

    def rows(
        self, places: Int64[np.ndarray, " m"], shift: int
    ) -> tuple[Int64[np.ndarray, " m"], Int64[np.ndarray, " m"]]:
        """Return the rows at m places of an epoch, and how many places before each have the same row.

        `shift` is the epoch's own, in parts of a distance: point i lies at (i x length + shift) / n.
        """
        if self.ends is None:
            return places, np.zeros_like(places)
        rows = np.searchsorted(self.ends, self._points(places, shift), side="right")
        begins = np.where(rows > 0, self.ends[rows - 1], 0)
        near = np.floor(begins * (self.num_rows / self.length)).astype(np.int64) - 1  # of the first place, at most 3 on
        first = near + sum((self._points(near + ahead, shift) < begins).astype(np.int64) for ahead in range(3))
        return rows, places - first

    def _points(self, places: Int64[np.ndarray, " m"], shift: int) -> Int64[np.ndarray, " m"]:
        """Return (places x length + shift) // n; in two parts, since the product has more than 64 bits."""
        (whole, rest), (whole_shift, rest_shift) = (divmod(x, self.num_rows) for x in (self.length, shift))
        return places * whole + whole_shift + (places * rest + rest_shift) // self.num_rows

    def draw_one(self, generator: np.random.Generator) -> int:
        """Draw one row by chance, as likely as its weight says."""
        point = int(generator.integers(self.length))
        return point if self.ends is None else int(np.searchsorted(self.ends, point, side="right"))

    @property
    def effective_rows(self) -> float:
        """How many rows of equal weight vary as little: (sum w)^2 / sum w^2.

        Source: Kish 1965, "Survey Sampling".
        """
        if self.ends is None:
            return float(self.num_rows)
        lengths = np.diff(self.ends, prepend=0).astype(np.float64)
        return round(float(self.ends[-1]) ** 2 / float(np.square(lengths).sum()), 1)  # sums differ in the last bits

    @property
    def most_often(self) -> float:
        """How often the row of the largest weight is drawn in the mean epoch."""
        if self.ends is None:
            return 1.0
        return int(np.diff(self.ends, prepend=0).max()) * self.num_rows / self.length
