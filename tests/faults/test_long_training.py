"""Loader processes begun anew: `make torture` also kills them, and trains for ten thousand steps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.faults.children import run_in_fresh_process
from tests.faults.long_training import fit_slope


@pytest.mark.slow
def test_loaders_that_are_begun_anew_lose_and_double_nothing(tmp_path: Path) -> None:
    for outcome in run_in_fresh_process("long_training", tmp_path, size="small"):
        assert outcome.num_cases == 4
        assert outcome.num_survived == outcome.num_cases, outcome.notes


def test_the_slope_of_a_line_is_found_with_its_error() -> None:
    noise = np.random.default_rng(0).normal(0, 1.0, 800)
    samples = [(10 * number, 500 + 0.02 * number + noise[number]) for number in range(800)]
    slope, error, largest = fit_slope(samples, first=0)
    assert slope == pytest.approx(2.0, abs=3 * error)
    assert 0.001 < error < 0.2
    assert largest > 510
