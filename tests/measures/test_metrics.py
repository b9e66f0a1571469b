from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from distilclip.measures.metrics import (
    mean_interval,
    mean_per_class,
    row_tiles,
    share_interval,
    target_rank,
)


def coarse(num_rows: int, num_columns: int, seed: int) -> torch.Tensor:
    """Scores of a few values, so that ties are everywhere."""
    return torch.randint(0, 4, (num_rows, num_columns), generator=torch.Generator().manual_seed(seed)).float()


# Ranks and accuracies


def test_rank_equals_place_in_a_stable_sort() -> None:
    scores = coarse(50, 7, seed=0)
    target = torch.arange(50) % 7
    order = scores.argsort(dim=1, descending=True, stable=True)
    naive = [order[i].tolist().index(target[i]) for i in range(50)]
    assert target_rank(scores, target).tolist() == naive


def test_among_equal_scores_the_smaller_index_comes_first() -> None:
    scores = torch.tensor([[1.0, 1.0, 1.0], [0.0, 2.0, 2.0]])
    assert target_rank(scores, torch.tensor([2, 1])).tolist() == [2, 0]


def test_a_constant_scorer_gets_chance() -> None:
    labels = torch.arange(10)
    rank = target_rank(torch.zeros(10, 10), labels)
    assert [(rank < k).double().mean().item() for k in (1, 5)] == [0.1, 0.5]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_scores_that_are_not_finite_are_no_perfect_rank(value: float) -> None:
    with pytest.raises(ValueError, match="NaN or infinity"):
        target_rank(torch.tensor([[0.0, value]]), torch.tensor([0]))


def test_mean_per_class_weighs_classes_alike_and_skips_absent_ones() -> None:
    labels = torch.tensor([0, 0, 0, 0, 2])
    correct = torch.tensor([True, True, True, False, False])
    assert mean_per_class(correct, labels) == pytest.approx((0.75 + 0.0) / 2)


def test_the_modules_worked_example() -> None:
    assert target_rank(torch.tensor([[0.0, 2.0, 2.0]]), torch.tensor([2])).tolist() == [1]
    assert share_interval(np.array([True, True, False, False])) == pytest.approx((0.12, 0.88), abs=0.005)


def test_mean_per_class_is_accuracy_for_balanced_classes() -> None:
    labels = torch.arange(12) % 3
    correct = torch.arange(12) % 5 == 0
    assert mean_per_class(correct, labels) == pytest.approx(correct.double().mean().item())


def test_tiles_cover_every_row_once() -> None:
    covered = [row for tile in row_tiles(103, 10, tile_elements=70) for row in range(tile.start, tile.stop)]
    assert covered == list(range(103))
    assert next(row_tiles(5, 10**9)) == slice(0, 1)


# Intervals


def test_interval_equals_that_of_resampled_rows() -> None:
    random = np.random.default_rng(7)
    strata = np.repeat([0, 3], [80, 20])
    hits = random.random(100) < np.where(strata == 0, 0.3, 0.9)
    shares = [
        np.mean([random.choice(hits[strata == s], (strata == s).sum()).mean() for s in (0, 3)]) for _ in range(4000)
    ]
    assert share_interval(hits, strata=strata) == pytest.approx(np.quantile(shares, [0.025, 0.975]), abs=0.01)


def test_interval_of_clusters_equals_that_of_resampled_ones() -> None:
    random = np.random.default_rng(8)
    clusters = np.repeat(np.arange(200), random.integers(1, 6, 200))
    ease = random.random(200)
    hits = random.random(len(clusters)) < ease[clusters]
    rows = [np.flatnonzero(clusters == c) for c in range(200)]
    shares = [hits[np.concatenate([rows[c] for c in random.integers(0, 200, 200)])].mean() for _ in range(2000)]
    found = share_interval(hits, clusters=clusters)
    assert found == pytest.approx(np.quantile(shares, [0.025, 0.975]), abs=0.01)
    alone = share_interval(hits)
    assert found[1] - found[0] > 1.2 * (alone[1] - alone[0])


def test_interval_is_the_quantiles_of_weights_drawn_for_rows() -> None:
    hits = np.arange(12) < 9
    weights = np.random.default_rng(9).gamma([1.0] * 12 + [0.5, 0.5], size=(40_000, 14))
    shares = weights[:, [*np.flatnonzero(hits), 12]].sum(1) / weights.sum(1)  # of the halves, one hits
    assert share_interval(hits) == pytest.approx(np.quantile(shares, [0.025, 0.975]), abs=0.005)


def test_interval_of_a_share_is_near_the_normal_one() -> None:
    low, high = share_interval(np.arange(400) % 4 == 0)
    half = 1.96 * np.sqrt(0.25 * 0.75 / 400)
    assert low == pytest.approx(0.25 - half, abs=0.01)
    assert high == pytest.approx(0.25 + half, abs=0.01)


def test_eight_of_eight_is_not_certain() -> None:
    assert share_interval(np.ones(8, dtype=bool)) == pytest.approx((0.7378, 1.0), abs=1e-4)
    assert share_interval(np.zeros(8, dtype=bool)) == pytest.approx((0.0, 0.2622), abs=1e-4)
    assert share_interval(np.ones(8, dtype=bool), strata=np.arange(8) % 3)[1] == 1.0
    assert share_interval(np.zeros(8, dtype=bool), clusters=np.arange(8) % 3)[0] == 0.0


def test_one_row_a_stratum_is_as_uncertain_as_rows_without_strata() -> None:
    hits = np.arange(40) % 4 > 0
    low, high = share_interval(hits, strata=np.arange(40))
    plain = share_interval(hits)
    assert high - low == pytest.approx(plain[1] - plain[0], rel=0.05)
    strata = np.arange(20) % 2  # all of one, none of the other
    low, high = share_interval(strata == 0, strata=strata)
    assert low < 0.45
    assert high > 0.55


def test_clusters_that_are_all_alike_count_as_rows() -> None:
    images = np.arange(30) % 3 > 0
    assert share_interval(np.repeat(images, 5), clusters=np.repeat(np.arange(30), 5)) == pytest.approx(
        share_interval(images), abs=0.01
    )
    certain = np.ones(40, dtype=bool)
    assert share_interval(certain, clusters=np.repeat(np.arange(8), 5)) == share_interval(certain[:8])


@pytest.mark.parametrize("n", [5, 8, 20, 50])
def test_coverage_is_near_nominal_however_few_rows(n: int) -> None:
    shares = np.linspace(0.02, 0.98, 97)
    chance = stats.binom.pmf(np.arange(n + 1)[:, None], n, shares)
    intervals = np.array([share_interval(np.arange(n) < k) for k in range(n + 1)])
    covered = (intervals[:, :1] <= shares) & (shares <= intervals[:, 1:])
    coverage = (chance * covered).sum(0)
    assert coverage.mean() == pytest.approx(0.95, abs=0.01)
    assert coverage.min() > 0.83  # a count is a whole number, so it swings about its mean


@pytest.mark.parametrize("rows", [(1,) * 20, (2,) * 20, (1,) * 10 + (5,) * 10 + (40,) * 5])
@pytest.mark.parametrize("mean", [0.5, 0.9])
@pytest.mark.parametrize("spread", ["alike", "apart"])
def test_coverage_of_a_mean_per_class_is_near_nominal(rows: tuple[int, ...], mean: float, spread: str) -> None:
    random = np.random.default_rng(10)
    share = np.full(len(rows), mean) if spread == "alike" else random.beta(3 * mean, 3 * (1 - mean), len(rows))
    strata = np.repeat(np.arange(len(rows)), rows)
    found = [share_interval(random.random(len(strata)) < share[strata], strata=strata) for _ in range(400)]
    assert 0.92 <= np.mean([low <= share.mean() <= high for low, high in found]) <= 1


def test_coverage_of_clusters_is_near_nominal_and_that_of_their_rows_is_not() -> None:
    random = np.random.default_rng(11)
    clusters = np.repeat(np.arange(60), 5)
    covered = np.zeros(2)
    for _ in range(400):
        ease = random.beta(0.5, 0.5, 60)
        hits = random.random(300) < ease[clusters]
        for i, (low, high) in enumerate((share_interval(hits, clusters=clusters), share_interval(hits))):
            covered[i] += low <= 0.5 <= high
    assert covered[0] / 400 == pytest.approx(0.95, abs=0.025)
    assert covered[1] / 400 < 0.85


def test_more_confidence_is_a_wider_interval() -> None:
    hits = np.arange(60) % 2 == 0
    wide, narrow = (share_interval(hits, confidence=c) for c in (0.99, 0.8))
    assert wide[0] < narrow[0] < narrow[1] < wide[1]


def test_interval_of_a_mean_is_students() -> None:
    low, high = mean_interval([1.0, 2.0, 3.0])
    assert (low + high) / 2 == pytest.approx(2)
    assert high - 2 == pytest.approx(4.302653 / 3**0.5, rel=1e-6)  # t of 2 degrees of freedom, deviation 1
