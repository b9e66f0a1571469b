from __future__ import annotations

import doctest
import itertools

import numpy as np
import pytest
from scipy import stats

from distilclip.report import evidence, seeds, truth
from distilclip.report.evidence import difference, paired_difference, seeds_difference, t_reach, t_tails
from distilclip.sets import score as scores
from distilclip.sets.score import Score, mean_interval_of


def score(value: float, low: float | None = None, high: float | None = None, **more: object) -> Score:
    return Score(set="a", task="zero-shot", metric="top1", value=value, low=low, high=high, **more)  # type: ignore[arg-type]


def of_hits(hits: np.ndarray) -> Score:
    return score(float(hits.mean()), 0.0, 1.0, num_test=len(hits)).with_hits(hits)


@pytest.mark.parametrize("module", [evidence, scores, seeds, truth])
def test_the_examples_are_true(module: object) -> None:
    assert doctest.testmod(module, raise_on_error=True).attempted > 1  # type: ignore[arg-type]


@pytest.mark.parametrize("length", [1, 7, 8, 9, 500])
def test_hits_survive_being_written(length: int) -> None:
    hits = np.random.default_rng(length).random(length) < 0.5
    kept = Score.from_row(of_hits(hits).row())
    np.testing.assert_array_equal(kept.hits, hits)
    assert score(0.5).hits is None


def test_the_p_of_one_set_is_that_of_all_ways_to_swap_the_models() -> None:
    """McNemar's exact test: under the null, each image that only one model has right is as likely to be the other's."""
    ours = np.array([1, 1, 1, 1, 1, 0, 0, 1, 0, 1], bool)
    theirs = np.array([0, 0, 0, 0, 1, 1, 0, 0, 0, 1], bool)
    signs = (ours.astype(int) - theirs)[ours != theirs]
    sums = [abs(np.dot(signs, swap)) for swap in itertools.product((1, -1), repeat=len(signs))]
    expected = np.mean([value >= abs(signs.sum()) for value in sums])
    assert paired_difference([(ours, theirs)]).p == pytest.approx(expected)


def test_equal_models_differ_by_nothing() -> None:
    hits = np.arange(50) % 3 == 0
    found = paired_difference([(hits, hits)])
    assert (found.value, found.p) == (0.0, 1.0)
    assert not found.is_clear


def test_swapping_the_models_changes_the_sign_only() -> None:
    random = np.random.default_rng(1)
    pairs = [(random.random(90) < 0.6, random.random(90) < 0.4) for _ in range(3)]
    one, other = paired_difference(pairs), paired_difference([(theirs, ours) for ours, theirs in pairs])
    assert (one.value, one.low, one.high, one.p) == pytest.approx((-other.value, -other.high, -other.low, other.p))  # type: ignore[operator]


def test_the_interval_holds_the_true_difference_as_often_as_it_says() -> None:
    random = np.random.default_rng(0)
    held = 0
    for _ in range(2000):
        pairs = []
        for share in (0.5, 0.8):  # both right, ours only, theirs only: a true difference of 0.04
            kind = random.choice(4, size=150, p=[share - 0.1, 0.1, 0.06, 1 - share - 0.06])
            pairs.append((kind < 2, (kind == 0) | (kind == 2)))
        found = paired_difference(pairs)
        held += found.low <= 0.04 <= found.high  # type: ignore[operator]
    assert 0.945 < held / 2000 < 0.975


def test_pairs_show_what_two_intervals_cannot() -> None:
    theirs = np.arange(500) % 2 == 0
    ours = theirs.copy()
    ours[1:61:4] = True  # 15 of 500 images more, none fewer
    paired = difference([of_hits(ours)], [of_hits(theirs)])
    assert paired.basis == "images"
    assert paired.num_images == 500
    assert paired.is_clear
    apart = difference([score(0.53, 0.486, 0.573)], [score(0.5, 0.456, 0.544)])
    assert apart.basis == "scores"
    assert apart.p is None
    assert not apart.is_clear


def test_images_that_only_one_model_could_read_are_not_paired() -> None:
    hits = np.arange(10) % 2 == 0
    other = score(0.5, 0.2, 0.8, num_test=10, num_unreadable=1).with_hits(hits)
    assert difference([of_hits(hits)], [other]).basis == "scores"


def test_seeds_are_compared_by_welch() -> None:
    ours, theirs = [0.63, 0.60, 0.66], [0.55, 0.61, 0.49]
    found = seeds_difference(ours, theirs)
    expected = stats.ttest_ind(ours, theirs, equal_var=False)
    assert found.p == pytest.approx(expected.pvalue)
    assert found.value == pytest.approx(0.08)
    assert found.low < 0 < found.high  # type: ignore[operator]
    assert seeds_difference([0.6], theirs).low is None
    assert seeds_difference([0.6, 0.6], [0.5, 0.5]).low is None


def test_a_mean_of_sets_is_surer_than_one_set() -> None:
    assert mean_interval_of([score(0.5, 0.4, 0.6)] * 4) == pytest.approx((0.45, 0.55))
    assert mean_interval_of([score(0.5, 0.4, 0.6), score(0.5)]) is None


@pytest.mark.parametrize("freedom", [1.0, 2.4, 4.0, 30.0])
def test_t_is_scipys(freedom: float) -> None:
    for t in (0.1, 1.0, 3.0, 12.0):
        assert t_tails(t, freedom) == pytest.approx(2 * stats.t.sf(t, freedom), rel=1e-4)
    assert t_reach(0.95, freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=1e-4)


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (1, 0), (3, 3), (10, 2), (40, 61), (700, 650)])
def test_mcnemar_is_scipys_binomial_test(gained: int, lost: int) -> None:
    ours = np.repeat([True, False, True], [gained, lost, 5])
    theirs = np.repeat([False, True, True], [gained, lost, 5])
    expected = stats.binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    assert paired_difference([(ours, theirs)]).p == pytest.approx(expected, rel=1e-9)
