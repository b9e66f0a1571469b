"""The rule `complete`: every two rows of a group are near each other."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import get_args

import numpy as np
import pytest

from distilclip.errors import InputError
from distilclip.grouping import complete_linkage
from distilclip.grouping.balance import balance
from distilclip.grouping.complete_linkage import link_completely
from distilclip.grouping.representatives import choose_in_batches
from distilclip.vectors.metric import Metric
from distilclip.vectors.points import Points
from distilclip.vectors.tolerance import Tolerance
from tests.grouping.test_cover import clouds


def distances(x: np.ndarray, near: Tolerance) -> np.ndarray:
    """All distances [n, n] in the metric's unit."""
    rows = x.astype(np.float64)
    if near.metric == "cosine":
        rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return near.distance_of(((rows[:, None] - rows[None]) ** 2).sum(axis=2))


def naive_groups(x: np.ndarray, near: Tolerance) -> np.ndarray:
    """Join the two groups whose farthest rows are nearest, until none are near: of every row, its smallest."""
    apart = distances(x, near)
    groups = [[i] for i in range(len(x))]
    while True:
        pairs = itertools.combinations(range(len(groups)), 2)
        far, a, b = min((apart[np.ix_(groups[a], groups[b])].max(), a, b) for a, b in pairs)
        if far >= np.float32(near.threshold):
            break
        groups[a] += groups.pop(b)
    found = np.empty(len(x), int)
    for group in groups:
        found[group] = min(group)
    return found


@pytest.mark.parametrize("metric", get_args(Metric))
@pytest.mark.parametrize("threshold", [0.1, 0.4, 0.8])
def test_the_groups_equal_those_of_naive_complete_linkage(metric: Metric, threshold: float) -> None:
    x = clouds(num=45, dim=5)  # with a few equal rows, and otherwise no equal distances
    result = balance(x, threshold=threshold, metric=metric, rule="complete")
    np.testing.assert_array_equal(result.group, naive_groups(x, Tolerance(threshold, metric)))
    assert result.num_groups >= len(np.unique(balance(x, threshold=threshold, metric=metric).group))


def test_a_chain_falls_apart_by_hand() -> None:
    """On a line: 1 and 1.9 are nearest; then 2.8 and 3.6 (0.8 apart were first); 0 is 1.9 from the first pair."""
    x = np.array([[0.0], [1.0], [1.9], [2.8], [3.6]])
    with pytest.warns(UserWarning, match="not 1"):
        result = balance(x, threshold=1.2, metric="euclidean", rule="complete")
    assert result.group.tolist() == [0, 1, 1, 3, 3]
    assert result.representative.tolist() == [0, 1, 1, 3, 3]  # of two, the smaller row
    assert result.explain(2).chain[0].next_row == 1


def test_every_two_rows_of_a_group_are_near_and_no_two_groups_could_be_joined() -> None:
    """On a grid, where most distances are equal, this is what every order of joining keeps; twice it is the same."""
    x = np.stack(np.meshgrid(np.arange(9.0), np.arange(7.0)), axis=-1).reshape(-1, 2)
    x = np.append(x, x[::4], axis=0)
    valid = np.random.default_rng(1).random(len(x)) < 0.9
    with pytest.warns(UserWarning, match="not 1"):
        result, again = (balance(x, threshold=2.5, metric="euclidean", rule="complete", valid=valid) for _ in "ab")
    np.testing.assert_array_equal(result.group, again.group)
    assert (result.group[~valid] == -1).all()
    apart = distances(x, Tolerance(2.5, "euclidean"))
    groups = [np.flatnonzero(result.group == name) for name in np.unique(result.group[valid])]
    assert max(apart[np.ix_(rows, rows)].max() for rows in groups) < 2.5
    assert min(apart[np.ix_(a, b)].max() for a, b in itertools.combinations(groups, 2)) >= 2.5
    assert result.num_chained == 0
    assert (result.distance[valid & ~result.keep] < 2.5).all()


def test_batches_and_threads_link_the_same_rows(
    monkeypatch: pytest.MonkeyPatch, set_threads: Callable[[int], None]
) -> None:
    x = clouds(num=400, seed=2)
    group = balance(x, threshold=0.5, metric="euclidean").group
    assert np.bincount(group).max() > 50
    whole = link_completely(Points.of(x, metric="euclidean"), group)
    parts = choose_in_batches(
        link_completely, lambda rows: Points.of(x[rows], metric="euclidean"), group, batch_rows=40
    )
    monkeypatch.setattr(complete_linkage, "THREAD_ROWS", 2)
    set_threads(3)
    for found in (parts, link_completely(Points.of(x, metric="euclidean"), group)):
        np.testing.assert_array_equal(found[0], whole[0])
        np.testing.assert_array_equal(found[1], whole[1])


def test_the_curve_other_thresholds_and_shares_are_those_of_complete_linkage() -> None:
    x = clouds(seed=5)
    result = balance(x, threshold=0.3, metric="euclidean", rule="complete", max_threshold=0.8)
    for place in (20, 60, 99):
        alone = balance(x, threshold=result.curve.threshold[place], metric="euclidean", rule="complete")
        assert result.curve.removed_ratio[place] == alone.removed_ratio
        assert result.curve.largest_group[place] == alone.largest_group
    other = result.at(0.6)
    np.testing.assert_array_equal(other.group, balance(x, threshold=0.6, metric="euclidean", rule="complete").group)
    share = balance(x, target_removed=0.4, metric="euclidean", rule="complete", max_threshold=1.2)
    assert share.removed_ratio == pytest.approx(0.4, abs=1 / len(x))


def test_a_chain_that_is_too_long_is_named_and_the_curve_ends_where_it_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.append(clouds(seed=3), np.repeat(clouds(seed=3)[:1], 100, axis=0), axis=0)  # copies count once
    monkeypatch.setattr(complete_linkage, "MOST_ROWS", 60)
    plain = balance(x, threshold=0.9, metric="euclidean")
    assert plain.largest_group > 100 + 60
    with pytest.raises(InputError, match=r"one chain joins \d+ \(copies.*60 fit. Use rule=cover, or .* at most 0\.\d+"):
        balance(x, threshold=0.9, metric="euclidean", rule="complete")
    result = balance(x, threshold=0.1, metric="euclidean", rule="complete", max_threshold=0.9)
    assert 0.1 < result.max_threshold < 0.9
    unlike = np.unique(x, axis=0, return_index=True)[1]
    longest = np.bincount(balance(x, threshold=result.max_threshold, metric="euclidean").group[unlike]).max()
    beyond = balance(
        x, threshold=np.nextafter(np.float32(result.max_threshold), np.float32(1)).item(), metric="euclidean"
    )
    assert longest <= 60 < np.bincount(beyond.group[unlike]).max()
    with pytest.raises(InputError, match=r"target_removed=0.97 is out of reach of rule=complete: it fits up to"):
        balance(x, target_removed=0.97, metric="euclidean", rule="complete", max_threshold=0.9)
