"""Cuts: the best share of all rows or of each part, and what is told about the scores."""

from __future__ import annotations

import doctest

import numpy as np

from distilclip.scoring import cut
from distilclip.scoring.cut import cut_share, score_histogram, share_curve


def test_the_examples_are_true() -> None:
    assert doctest.testmod(cut, raise_on_error=True).attempted > 3


def test_a_share_of_each_part_equals_sorting_each_part() -> None:
    random = np.random.default_rng(0)
    scores = random.integers(0, 40, 500).astype(np.float32) / 40  # many are equal
    part = random.integers(0, 9, 500)
    part[part == 4] = 5  # a part without rows
    found = cut_share(scores, share=0.3, part=part)
    for number in np.unique(part):
        own = scores[part == number]
        last = np.sort(own)[::-1][max(1, round(0.3 * len(own))) - 1]
        assert found.threshold[number] == last
        np.testing.assert_array_equal(found.keep[part == number], own >= last)
    assert np.isnan(found.threshold[4])
    order = random.permutation(500)
    np.testing.assert_array_equal(cut_share(scores[order], share=0.3, part=part[order]).keep, found.keep[order])


def test_the_histogram_counts_every_row_once_and_the_curve_ends_at_all() -> None:
    scores = np.random.default_rng(1).normal(size=1000).astype(np.float32)
    keep = cut_share(scores, share=0.25).keep
    bins = score_histogram(scores, keep)
    assert (sum(one["num_scored"] for one in bins), sum(one["num_kept"] for one in bins)) == (1000, 250)
    inside = (scores >= bins[7]["low"]) & (scores < bins[7]["high"])
    assert bins[7]["num_scored"] == inside.sum()
    assert share_curve(scores)[-1] == {"share": 1.0, "threshold": float(scores.min())}
    same = score_histogram(np.ones(5, np.float32), np.ones(5, bool))
    assert same == [{"low": 1.0, "high": 1.0, "num_scored": 5, "num_kept": 5}]
