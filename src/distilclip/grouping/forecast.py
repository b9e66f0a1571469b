"""How long a search will take, from short ones among a sample of the rows."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int

from distilclip.grouping.balance import similarity_forest
from distilclip.vectors.points import Points

SAMPLE = 1 << 15  # rows searched to learn the constant; a quarter of them, to learn the growth
BYTES_PER_EDGE = 20  # of a forest on disk, before compression


@dataclass(frozen=True)
class Growth:
    """Seconds of a search among n rows: constant * n^exponent."""

    constant: float
    exponent: float

    def within(self, num_rows: int) -> float:
        """Seconds for the pairs of one block of rows."""
        return float(self.constant * num_rows**self.exponent)

    def across(self, num_left: int, num_right: int) -> float:
        """Seconds for the pairs of a row of one block and one of the other."""
        both = self.within(num_left + num_right)
        return max(both - self.within(num_left) - self.within(num_right), 0.1 * both)


def calibrate(
    take: Callable[[Int[np.ndarray, " m"]], Float[np.ndarray, "m dim"]],
    rows: Int[np.ndarray, " n"],
    *,
    threshold: float,
    metric: str,
    memory_gb: float | None = None,
    device: str | torch.device | None = None,
) -> Growth:
    """Search among evenly spaced ones of `rows` (ascending), twice, and fit the growth.

    A sample has fewer near pairs to a row than all rows have, so data of many copies take longer than this says.
    """

    def seconds(count: int) -> float:
        chosen = rows[:: max(1, len(rows) // count)][:count]
        points = Points.of(take(chosen), metric=metric)
        valid = np.ones(len(points), bool)
        start = time.perf_counter()
        similarity_forest(points, valid, threshold=threshold, metric=metric, memory_gb=memory_gb, device=device)
        return time.perf_counter() - start

    large = min(SAMPLE, len(rows))
    small = max(2, large // 4)
    seconds(small)  # compiles what is not compiled yet
    few, many = min(seconds(small), seconds(small)), seconds(large)
    exponent = float(np.clip(np.log(many / few) / np.log(large / small), 1, 2)) if large > small else 2.0
    return Growth(constant=many / large**exponent, exponent=exponent)
