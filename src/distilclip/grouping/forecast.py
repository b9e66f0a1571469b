"""Forecast how long a search will take, from short searches among a sample of the rows.

If 8,000 rows take 1 s and 32,000 take 8 s, four times the rows take 8 times as long: seconds grow as n^1.5. Then
128,000 rows take 64 s.

>>> growth = Growth.fit(few=(8_000, 1.0), many=(32_000, 8.0))
>>> growth.exponent, round(growth.within(128_000))
(1.5, 64)
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int

from distilclip.grouping.rule import Rule
from distilclip.grouping.search_forest import search_forest
from distilclip.vectors.points import Points

SAMPLE = 1 << 15  # rows searched to learn the constant; a quarter of them, to learn the growth
BYTES_PER_EDGE = 20  # of a forest on disk, before compression


@dataclass(frozen=True)
class Growth:
    """Seconds of a search among n rows: constant * n^exponent."""

    constant: float
    exponent: float

    @classmethod
    def fit(cls, *, few: tuple[int, float], many: tuple[int, float]) -> Growth:
        """Fit the growth to two searches, each given as (rows, seconds)."""
        # Never less than reading the rows (1) or more than comparing all pairs (2), which noise could suggest.
        steps = np.log(many[0] / few[0])
        exponent = float(np.clip(np.log(many[1] / few[1]) / steps, 1, 2)) if steps > 0 else 2.0
        return cls(constant=many[1] / many[0] ** exponent, exponent=exponent)

    def within(self, num_rows: int) -> float:
        """Return the seconds for the pairs of one block of rows."""
        return float(self.constant * num_rows**self.exponent)

    def across(self, num_left: int, num_right: int) -> float:
        """Return the seconds for the pairs of a row of one block and one of the other."""
        both = self.within(num_left + num_right)
        return max(both - self.within(num_left) - self.within(num_right), 0.1 * both)


def calibrate(
    take: Callable[[Int[np.ndarray, " m"]], Float[np.ndarray, "m dim"]],
    rows: Int[np.ndarray, " n"],
    *,
    rule: Rule,
    memory_gb: float | None = None,
    device: str | torch.device | None = None,
) -> Growth:
    """Search among evenly spaced rows of `rows` (ascending), twice, and fit the growth.

    A sample has fewer near pairs to a row than all rows have, so data of many copies take longer than this says.
    """

    def seconds(count: int) -> float:
        chosen = rows[:: max(1, len(rows) // count)][:count]
        points = Points.of(take(chosen), metric=rule.metric)
        valid = np.ones(len(points), bool)
        start = time.perf_counter()
        search_forest(points, valid, rule, memory_gb=memory_gb, device=device)
        return time.perf_counter() - start

    large = min(SAMPLE, len(rows))
    small = max(2, large // 4)
    seconds(small)  # compiles what is not compiled yet
    few = min(seconds(small), seconds(small))
    return Growth.fit(few=(small, few), many=(large, seconds(large)))
