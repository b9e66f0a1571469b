"""The rule `cover`: every row removed is near the row kept for it."""

from __future__ import annotations

from functools import partial
from typing import get_args

import numpy as np
import pytest
from jaxtyping import Float

from distilclip.errors import InputError
from distilclip.grouping import cover
from distilclip.grouping.balance import balance
from distilclip.grouping.cover import cells, choose_cover
from distilclip.grouping.representatives import choose_in_batches
from distilclip.vectors.metric import Metric
from distilclip.vectors.points import Points
from distilclip.vectors.tolerance import Tolerance


def clouds(num: int = 300, dim: int = 12, seed: int = 0) -> Float[np.ndarray, "n dim"]:
    """Unit rows in loose clouds that chains join, a few of them equal."""
    rng = np.random.default_rng(seed)
    centers = rng.normal(size=(8, dim))
    x = centers[rng.integers(0, 8, num)] + rng.normal(size=(num, dim)) * rng.uniform(0.05, 0.5, (num, 1))
    x[rng.integers(0, num, 20)] = x[rng.integers(0, num, 20)]
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def naive_cover(x: np.ndarray, group: np.ndarray, near: Tolerance) -> np.ndarray:
    """Follow the rule by all distances [n, n]: of every row, the row that stands for it."""
    rows = x.astype(np.float64)
    if near.metric == "cosine":
        rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    squared = ((rows[:, None] - rows[None]) ** 2).sum(axis=2)
    is_near = near.includes(near.distance_of(squared))
    chosen = np.full(len(x), -1)
    for name in np.unique(group[group >= 0]):
        members = np.flatnonzero(group == name)
        from_mean = ((rows[members] - rows[members].mean(axis=0)) ** 2).sum(axis=1)
        kept: list[int] = []
        for i in members[np.argsort(from_mean.round(11), kind="stable")].tolist():
            if not is_near[i, kept].any():
                kept.append(i)
        to_kept = np.where(is_near[np.ix_(members, kept)], squared[np.ix_(members, kept)], np.inf)
        to_kept[members[:, None] == np.array(kept)] = -1
        order = np.argsort(kept)
        chosen[members] = np.array(kept)[order][to_kept[:, order].argmin(axis=1)]
    return chosen


@pytest.mark.parametrize("metric", get_args(Metric))
@pytest.mark.parametrize("threshold", [0.05, 0.2, 0.5, 0.9])
def test_a_cover_equals_the_rule_followed_by_all_distances(metric: Metric, threshold: float) -> None:
    x = clouds()
    result = balance(x, threshold=threshold, metric=metric, rule="cover")
    joined = balance(x, threshold=threshold, metric=metric).group
    expected = naive_cover(x, joined, Tolerance(threshold, metric))
    np.testing.assert_array_equal(result.representative, expected)
    np.testing.assert_array_equal(result.group, cells(expected))


@pytest.mark.parametrize("threshold", [0.1, 0.4, 0.8])
def test_removed_rows_are_near_what_is_kept_and_kept_rows_are_apart(threshold: float) -> None:
    x = clouds(seed=1)
    valid = np.random.default_rng(2).random(len(x)) < 0.9
    result = balance(x, threshold=threshold, metric="euclidean", rule="cover", valid=valid)
    removed = valid & ~result.keep
    assert removed.any()
    assert (result.distance[removed] < np.float32(threshold)).all()
    kept = x[result.keep].astype(np.float64)
    apart = np.sqrt(((kept[:, None] - kept[None]) ** 2).sum(axis=2))[~np.eye(len(kept), dtype=bool)]
    assert (apart.astype(np.float32) >= np.float32(threshold)).all()
    assert (result.representative[~valid] == -1).all()
    assert (result.group[~valid] == -1).all()
    np.testing.assert_array_equal(np.unique(result.group[valid], return_counts=True)[1].sum(), valid.sum())
    assert np.bincount(result.group[result.keep]).max() == 1


def test_where_one_row_is_near_all_others_cover_and_union_find_agree() -> None:
    x = np.repeat(np.eye(6, dtype=np.float32), 5, axis=0)
    x += np.random.default_rng(3).normal(size=x.shape).astype(np.float32) * 0.01
    plain, cover = (balance(x, threshold=0.3, metric="cosine", rule=rule) for rule in ("union-find", "cover"))
    np.testing.assert_array_equal(plain.representative, cover.representative)
    np.testing.assert_array_equal(plain.group, cover.group)


def test_a_large_group_shared_among_threads_is_covered_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    x = clouds(num=700, seed=7)
    points, group = Points.of(x, metric="euclidean"), np.zeros(len(x), int)
    alone = choose_cover(points, group, near=Tolerance(0.6, "euclidean"))
    monkeypatch.setattr(cover, "LARGE", 2)
    for block in (1, 100, 700):
        monkeypatch.setattr(cover, "BLOCK", block)
        shared = choose_cover(points, group, near=Tolerance(0.6, "euclidean"))
        np.testing.assert_array_equal(shared[0], alone[0])
        np.testing.assert_array_equal(shared[1], alone[1])


def test_batches_of_groups_choose_the_same_rows() -> None:
    x = clouds(seed=4)
    group = balance(x, threshold=0.3, metric="euclidean").group
    choose = partial(choose_cover, near=Tolerance(0.3, "euclidean"))
    whole, squared = choose(Points.of(x, metric="euclidean"), group)
    for batch_rows in (1, 40):
        parts = choose_in_batches(
            choose, lambda rows: Points.of(x[rows], metric="euclidean"), group, batch_rows=batch_rows
        )
        np.testing.assert_array_equal(parts[0], whole)
        np.testing.assert_array_equal(parts[1], squared)


def test_the_curve_and_other_thresholds_are_those_of_covers() -> None:
    x = clouds(seed=5)
    result = balance(x, threshold=0.3, metric="euclidean", rule="cover", max_threshold=0.6)
    assert len(result.curve.threshold) == 20
    for place in (0, 7, 19):
        alone = balance(x, threshold=result.curve.threshold[place], metric="euclidean", rule="cover")
        assert result.curve.removed_ratio[place] == alone.removed_ratio
        assert result.curve.largest_group[place] == alone.largest_group
    other = result.at(0.45)
    np.testing.assert_array_equal(other.group, balance(x, threshold=0.45, metric="euclidean", rule="cover").group)
    assert other.curve.removed_ratio.tolist() == result.curve.removed_ratio.tolist()


def test_a_share_is_removed_as_exactly_as_the_rows_allow() -> None:
    x = clouds(num=600, seed=6)
    result = balance(x, target_removed=0.4, metric="euclidean", rule="cover", max_threshold=1.2)
    assert result.removed_ratio == pytest.approx(0.4, abs=0.01)
    assert result.num_chained == 0
    with pytest.raises(InputError, match=r"target_removed=0.9 is out of reach: .* a cover removes 0\.\d+. Raise max"):
        balance(x, target_removed=0.9, metric="euclidean", rule="cover", max_threshold=0.4)


@pytest.mark.parametrize("metric", get_args(Metric))
def test_the_largest_near_squared_distance_is_the_last_that_is_near(metric: Metric) -> None:
    for threshold in (1e-4, 0.07, 0.3, 1.1):
        near = Tolerance(threshold, metric)
        squared = np.array([near.largest_squared, np.nextafter(near.largest_squared, np.inf)])
        assert near.includes(near.distance_of(squared)).tolist() == [True, False]
