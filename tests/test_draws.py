"""Rows are drawn as often as their weights say: in every epoch to within one, and by the law of chance over many."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from scipy.stats import chisquare

from distilclip.draws import Draws

WEIGHTS = np.array([1.0, 0.25, 3.0, 0.5, 0.125, 2.0, 1.0, 0.7, 0.3])


def epoch(draws: Draws, shift: int) -> np.ndarray:
    return draws.rows(np.arange(draws.num_rows), shift)[0]


def counts(draws: Draws, shift: int) -> np.ndarray:
    return np.bincount(epoch(draws, shift), minlength=draws.num_rows)


def naive_epoch(weights: np.ndarray, shift: Fraction) -> list[int]:
    """The definition in exact fractions: the row in whose piece of the line the point (i + shift) W / n lies."""
    pieces = [Fraction(weight) for weight in weights.tolist()]
    found = []
    for place in range(len(pieces)):
        point = (place + shift) * sum(pieces) / len(pieces)
        row = 0
        while point >= sum(pieces[: row + 1]):
            row += 1
        found.append(row)
    return found


def test_draws_equal_the_definition_in_exact_fractions() -> None:
    random = np.random.default_rng(0)
    for _ in range(20):
        weights = random.integers(1, 64, 13) / 64.0
        weights[3] = 1.0  # the largest is a power of two, so that all are kept exactly
        draws = Draws.of_weights(weights)
        shift = int(random.integers(draws.length))
        assert epoch(draws, shift).tolist() == naive_epoch(weights, Fraction(shift, draws.length))


def test_a_hand_made_answer() -> None:
    """Rows of weight 1, 2, 1 on a line of 4: three points, 4/3 apart."""
    draws = Draws.of_weights(np.array([1.0, 2.0, 1.0]))
    unit = draws.length // 4
    rows, repeats = draws.rows(np.array([2, 0, 1]), 0)  # at 8/3, 0 and 4/3
    assert (rows.tolist(), repeats.tolist()) == ([1, 0, 1], [1, 0, 0])
    rows, repeats = draws.rows(np.arange(3), 3 * unit)  # shifted by 3/4 of a distance: at 1, 7/3 and 11/3
    assert (rows.tolist(), repeats.tolist()) == ([1, 1, 2], [0, 1, 0])


@pytest.mark.parametrize("value", [1.0, 0.1, 3e-200, 1e300])
def test_equal_weights_give_every_row_its_own_place_whatever_the_shift(value: float) -> None:
    draws = Draws.of_weights(np.full(1000, value))
    assert draws.ends is None
    as_ends = Draws(1000, np.arange(1, 1001) * 2**52)  # the same without the short cut
    for length, tried in ((1000, draws), (1000 * 2**52, as_ends)):
        for shift in (0, 1, length // 3, length - 1):
            rows, repeats = tried.rows(np.arange(1000), shift)
            assert np.array_equal(rows, np.arange(1000))
            assert not repeats.any()


def test_weights_that_are_equal_but_for_rounding_are_equal() -> None:
    """As of parts that have their rows' share: 0.7 / 7 and 0.3 / 3 may differ in the last bit."""
    assert Draws.of_weights(np.array([0.1, np.nextafter(0.1, 1), 0.1])).ends is None


def test_an_epoch_has_every_row_as_often_as_its_weight_says_rounded_down_or_up() -> None:
    random = np.random.default_rng(1)
    for size in (1, 2, 17, 300):
        for spread in (0.1, 1.0, 4.0):
            draws = Draws.of_weights(np.exp(spread * random.standard_normal(size)))
            lengths = np.diff(draws.ends, prepend=0) if draws.ends is not None else np.ones(size, np.int64)
            expected = [Fraction(length * size, draws.length) for length in lengths.tolist()]
            for _ in range(5):
                found = counts(draws, int(random.integers(draws.length)))
                assert found.sum() == size
                assert all(int(e) <= count <= -int(-e // 1) for e, count in zip(expected, found.tolist(), strict=True))


def test_whole_weights_are_drawn_exactly() -> None:
    weights = np.array([2.0, 1.0, 0.5, 0.5])  # two rows of a half: one of them in each epoch
    draws = Draws.of_weights(weights)
    for shift in np.random.default_rng(2).integers(draws.length, size=50).tolist():
        found = counts(draws, shift)
        assert found[:2].tolist() == [2, 1]
        assert sorted(found[2:].tolist()) == [0, 1]


def test_repeats_count_the_places_of_a_row_in_an_epoch() -> None:
    draws = Draws.of_weights(WEIGHTS)
    for shift in np.random.default_rng(3).integers(draws.length, size=50).tolist():
        rows, repeats = draws.rows(np.arange(len(WEIGHTS)), shift)
        for row in set(rows.tolist()):
            assert repeats[rows == row].tolist() == list(range((rows == row).sum()))


def first_rows(draws: Draws, *, num_epochs: int, is_shifted: bool = True) -> np.ndarray:
    """The row at the first place of many shuffled epochs, drawn as the stream does."""
    found = []
    for number in range(num_epochs):
        generator = np.random.Generator(np.random.PCG64([4, number]))
        places = generator.permutation(draws.num_rows)
        shift = int(generator.integers(draws.length)) if is_shifted else 0
        found.append(draws.rows(places[:1], shift)[0][0])
    return np.bincount(found, minlength=draws.num_rows)


def test_the_draws_of_many_epochs_pass_the_chi_square_test_and_those_of_broken_samplers_fail() -> None:
    """One place of each epoch, so that the draws are independent of one another."""
    num_epochs = 2000
    expected = num_epochs * WEIGHTS / WEIGHTS.sum()
    draws = Draws.of_weights(WEIGHTS)
    assert 0.001 < chisquare(first_rows(draws, num_epochs=num_epochs), expected).pvalue < 0.999
    broken = {
        "without weights": first_rows(Draws(len(WEIGHTS)), num_epochs=num_epochs),
        "without a shift": first_rows(draws, num_epochs=num_epochs, is_shifted=False),
        "of other weights": first_rows(Draws.of_weights(WEIGHTS**0.7), num_epochs=num_epochs),
    }
    for name, found in broken.items():
        assert chisquare(found, expected).pvalue < 1e-6, name


def test_a_single_draw_passes_the_chi_square_test_too() -> None:
    draws, generator = Draws.of_weights(WEIGHTS), np.random.default_rng(5)
    found = np.bincount([draws.draw_one(generator) for _ in range(6000)], minlength=len(WEIGHTS))
    assert 0.001 < chisquare(found, 6000 * WEIGHTS / WEIGHTS.sum()).pvalue < 0.999


def test_effective_rows_and_the_largest_weight() -> None:
    draws = Draws.of_weights(np.array([3.0, 1.0, 1.0, 1.0]))
    assert draws.effective_rows == 36 / 12
    assert draws.most_often == pytest.approx(2.0)
    assert (Draws(7).effective_rows, Draws(7).most_often) == (7, 1)


def test_many_rows_take_eight_bytes_each_and_no_product_overflows() -> None:
    size = 2_000_000
    weights = np.ones(size)
    weights[-1] = 1e6
    draws = Draws.of_weights(weights)
    assert draws.ends is not None
    assert draws.ends.nbytes == 8 * size
    rows, repeats = draws.rows(np.array([0, size - 1]), draws.length - 1)
    assert rows[0] == 1  # at 1.5 of a line of 3 million: a shift of almost one distance
    assert rows[1] == size - 1
    assert repeats[1] == pytest.approx(size / 3, abs=2)  # a million in three: it is drawn so often
