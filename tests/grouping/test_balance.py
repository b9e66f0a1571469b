import subprocess
import sys
import typing
from typing import Any

import numpy as np
import pytest
import torch
from scipy.sparse.csgraph import connected_components

from distilclip.errors import InputError
from distilclip.grouping import search_cpu
from distilclip.grouping.balance import Balance, balance
from distilclip.grouping.near_pairs import pairs_within
from distilclip.vectors.metric import Metric
from distilclip.vectors.tolerance import equivalents

# Examples by hand are points of a line, not unit rows.
by_hand = pytest.mark.filterwarnings("ignore:Row . has length:UserWarning")


def copies_of_scenes(n: int = 300, dim: int = 24, *, seed: int = 0) -> np.ndarray:
    """Unit rows: a third of them near-copies of earlier ones, a few exactly equal."""
    random = np.random.default_rng(seed)
    x = random.standard_normal((n, dim))
    source = random.integers(0, n // 2, n)
    copied = random.random(n) < 0.35
    x[copied] = x[source[copied]] + 0.08 * random.random((copied.sum(), 1)) * random.standard_normal(
        (copied.sum(), dim)
    )
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    x[-10:] = x[:10]
    return x.astype(np.float16)


def naive(x: np.ndarray, threshold: float, metric: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Group, representative and distance from the definition, in float64 with full matrices."""
    x = x.astype(np.float64)
    if metric == "cosine":
        x = x / np.linalg.norm(x, axis=1, keepdims=True)
    squared = ((x[:, None] - x[None]) ** 2).sum(axis=2)
    distances = {"euclidean": np.sqrt(squared), "sqeuclidean": squared, "cosine": squared / 2}[metric]
    _, labels = connected_components(distances < threshold, directed=False)
    group, representative = np.empty(len(x), int), np.empty(len(x), int)
    for label in range(labels.max() + 1):
        members = np.flatnonzero(labels == label)
        to_mean = ((x[members] - x[members].mean(axis=0)) ** 2).sum(axis=1)
        group[members] = members[0]
        representative[members] = members[np.flatnonzero(to_mean <= to_mean.min() + 1e-12)[0]]
    return group, representative, distances[np.arange(len(x)), representative]


@pytest.mark.parametrize("metric", ["euclidean", "sqeuclidean", "cosine"])
def test_balance_equals_its_definition(metric: str) -> None:
    x = copies_of_scenes()
    threshold = equivalents(0.3, "euclidean")[metric]
    result = balance(x, threshold=threshold, metric=metric)
    group, representative, distance = naive(x, threshold, metric)
    np.testing.assert_array_equal(result.group, group)
    np.testing.assert_array_equal(result.representative, representative)
    np.testing.assert_allclose(result.distance, distance, rtol=1e-6, atol=1e-9)
    assert 0.2 < result.removed_ratio < 0.6
    assert result.removed_ratio == pytest.approx(1 - len(np.unique(group)) / len(x))


@by_hand
def test_five_rows_by_hand() -> None:
    x = np.array([[0.0], [1.0], [1.9], [10.0], [10.5]])
    result = balance(x, threshold=1.2, metric="euclidean")
    assert result.group.tolist() == [0, 0, 0, 3, 3]
    assert result.representative.tolist() == [1, 1, 1, 3, 3]  # 1.0 is nearest to 0.967; 3 and 4 tie, 3 is smaller
    assert result.distance.tolist() == pytest.approx([1.0, 0.0, 0.9, 0.0, 0.5])
    assert result.keep.tolist() == [False, True, False, True, False]
    assert (result.num_groups, result.largest_group, result.removed_ratio) == (2, 3, 0.6)


def same(a: Balance, b: Balance) -> bool:
    return all(
        np.array_equal(getattr(a, name), getattr(b, name)) for name in ("group", "representative", "distance", "keep")
    ) and (a.threshold == b.threshold)


def test_at_answers_what_another_run_would() -> None:
    x = copies_of_scenes()
    wide = balance(x, threshold=0.4, metric="euclidean")
    for threshold in (0.05, 0.2, 0.33, 0.4):
        assert same(wide.at(threshold), balance(x, threshold=threshold, metric="euclidean"))
    with pytest.raises(InputError, match="Search wider"):
        wide.at(0.41)


def test_groups_survive_any_chunking_and_permutation(monkeypatch: pytest.MonkeyPatch) -> None:
    x = copies_of_scenes()
    whole = balance(x, threshold=0.3, metric="euclidean")
    monkeypatch.setattr(search_cpu, "HEIGHT", 29)
    monkeypatch.setattr(search_cpu, "default_num_cells", lambda num_points: 7)
    assert same(balance(x, threshold=0.3, metric="euclidean"), whole)
    order = np.random.default_rng(1).permutation(len(x))
    shuffled = balance(x[order], threshold=0.3, metric="euclidean")
    together = whole.group[order][:, None] == whole.group[order][None, :]
    np.testing.assert_array_equal(shuffled.group[:, None] == shuffled.group[None, :], together)


def test_curve_and_target_removed_agree_with_the_groups() -> None:
    x = copies_of_scenes()
    result = balance(x, target_removed=0.25, max_threshold=0.5, metric="euclidean")
    assert result.removed_ratio == pytest.approx(0.25, abs=2 / len(x))
    curve = result.curve
    assert curve.threshold[-1] == 0.5
    for i in (10, 50, 99):
        there = result.at(curve.threshold[i])
        assert (curve.num_groups[i], curve.largest_group[i]) == (there.num_groups, there.largest_group)
        assert curve.removed_ratio[i] == pytest.approx(there.removed_ratio)


def test_invalid_rows_belong_to_no_group_and_are_never_kept() -> None:
    x = copies_of_scenes().astype(np.float32)
    valid = np.random.default_rng(2).random(len(x)) < 0.8
    x[~valid] = np.nan
    result = balance(x, threshold=0.3, metric="cosine", valid=valid)
    rows = np.flatnonzero(valid)
    alone = balance(x[valid], threshold=0.3, metric="cosine")
    np.testing.assert_array_equal(result.group[valid], rows[alone.group])
    np.testing.assert_array_equal(result.representative[valid], rows[alone.representative])
    assert (result.group[~valid] == -1).all()
    assert not result.keep[~valid].any()
    assert (result.num_valid, result.removed_ratio) == (len(rows), alone.removed_ratio)


@by_hand
def test_a_cover_keeps_several_rows_of_a_chain() -> None:
    x = np.arange(11, dtype=np.float64)[:, None]
    chained = balance(x, threshold=1.5, metric="euclidean")
    assert chained.keep.sum() == 1
    assert chained.distance.max() == 5
    covered = balance(x, threshold=1.5, metric="euclidean", rule="cover")
    # 5 is nearest to the mean; then 3 and 7 (4 and 6 are near 5), 1 and 9; 0 and 10 are near these.
    assert np.flatnonzero(covered.keep).tolist() == [1, 3, 5, 7, 9]
    assert covered.num_groups == 5
    assert covered.group.tolist() == [0, 0, 0, 3, 3, 5, 5, 7, 7, 9, 9]
    assert covered.num_chained == 0
    assert covered.explain(0).representative == 1
    assert [(link.row, link.next_row) for link in covered.explain(0).chain] == [(0, 1)]


@by_hand
def test_top_k_joins_by_each_rows_nearest_and_reports_saturation() -> None:
    x = copies_of_scenes()
    assert same(
        balance(x, threshold=0.3, metric="euclidean", rule="topk", top_k=len(x)),
        balance(x, threshold=0.3, metric="euclidean"),
    )
    # Three points in a row, each with one nearest: 0 <-> 1, and 2 -> 1. A fourth is too far away to count.
    line = np.array([[0.0], [1.0], [2.1], [9.0]])
    narrow = balance(line, threshold=1.5, metric="euclidean", rule="topk", top_k=1)
    assert narrow.group.tolist() == [0, 0, 0, 3]
    assert narrow.saturated == 0.75


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "either threshold or target_removed"),
        ({"threshold": 0.1, "target_removed": 0.3}, "not both"),
        ({"target_removed": 0.3}, "needs max_threshold"),
        ({"threshold": 0.3, "max_threshold": 0.2}, "is below threshold"),
        ({"target_removed": 1.0, "max_threshold": 0.2}, "between 0 and 1"),
        ({"threshold": 0.3, "rule": "topk", "top_k": 0}, "positive whole top_k"),
        ({"threshold": float("nan")}, "positive"),
        ({"threshold": 0.3, "valid": np.ones(39, bool)}, r"each of the 40 rows, not bool \(39,\)"),
        ({"threshold": 0.3, "valid": np.ones(40)}, "not float64"),
        ({"threshold": 0.3, "device": "tpu9"}, "'tpu9' cannot be used"),
        ({"threshold": 0.3, "rule": "topk", "top_k": 3, "memory_gb": -1.0}, "positive number"),
        ({"threshold": 0.3, "rule": "topk"}, "top_k"),
        ({"threshold": 0.3, "top_k": 3}, "top_k"),
        ({"threshold": -0.3}, "positive"),
    ],
)
def test_contradictions_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        balance(copies_of_scenes(40), metric="euclidean", **arguments)


def test_values_of_the_wrong_type_are_named() -> None:
    """In a process of its own: here, the types themselves are checked before the function is called."""
    code = """
import distilclip as dc
rows = [[0.0, 1.0], [1.0, 0.0]]
for change in (
    {"x": [[0.0, 1.0], [1.0]]}, {"x": "rows"}, {"x": [0.0, 1.0]}, {"top_k": 2.5, "rule": "topk"},
    {"threshold": "0.3"}, {"metric": None}, {"target_removed": "half", "max_threshold": 0.3, "threshold": None},
    {"valid": [True]}, {"rule": 3}, {"rule": "top-k"}, {"metric": "cosin"}, {"memory_gb": "1"}, {"device": 3},
    {"x": [[], []]},
):
    try:
        dc.balance(**{"x": rows, "threshold": 0.3, "metric": "euclidean", **change})
    except dc.InputError as error:
        print(error)
    else:
        print("accepted", change)
print(dc.balance(rows, threshold=0.3, metric="euclidean", valid=[True, False]).group.tolist())
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    *messages, group = done.stdout.splitlines()
    expected = ["rows of equal length", "Expected rows", "shape (2,)", "top_k=2.5"]
    expected += ["threshold='0.3'", "metric=None", "target_removed='half'", "each of the 2 rows", "rule=3"]
    expected += ["Did you mean 'topk'", "Did you mean 'cosine'", "memory_gb='1'", "device 3 cannot", "shape (2, 0)"]
    for part, message in zip(expected, messages, strict=True):
        assert part in message
    assert group == "[0, -1]"


def test_whole_numbers_typed_as_lists_are_rows() -> None:
    assert balance([[1, 0], [0, 1], [1, 0]], threshold=0.1, metric="cosine").group.tolist() == [0, 1, 0]


def test_metric_and_rule_are_literals_that_editors_list() -> None:
    hints = typing.get_type_hints(balance)
    assert typing.get_args(hints["metric"]) == ("euclidean", "sqeuclidean", "cosine")
    assert typing.get_args(hints["rule"]) == ("union-find", "topk", "cover", "complete")
    assert typing.get_type_hints(pairs_within)["metric"] == hints["metric"]


@pytest.mark.parametrize("metric", ["euclidean", "sqeuclidean"])
def test_rows_without_unit_length_are_named_where_lengths_count(metric: Metric) -> None:
    x = copies_of_scenes().astype(np.float32)
    valid = np.ones(len(x), bool)
    long = x.copy()
    long[[3, 7]] *= 11
    with pytest.warns(UserWarning, match=r"Row 3 has length 11, not 1 \(2 such rows\).*Normalise.*metric='cosine'"):
        balance(long, threshold=0.3, metric=metric)
    valid[[3, 7]] = False
    balance(long, threshold=0.3, metric=metric, valid=valid)  # warnings are errors here
    balance(x.astype(np.float16), threshold=0.3, metric=metric)


def test_cosine_does_not_look_at_lengths() -> None:
    x = copies_of_scenes().astype(np.float64)
    lengths = 2.0 ** np.random.default_rng(5).integers(-3, 4, (len(x), 1))  # exact factors
    assert same(balance(x * lengths, threshold=0.05, metric="cosine"), balance(x, threshold=0.05, metric="cosine"))


def test_to_frame_is_the_balance_as_a_table() -> None:
    pandas = pytest.importorskip("pandas")
    result = balance(copies_of_scenes(60), threshold=0.3, metric="cosine", valid=np.arange(60) != 4)
    frame = result.to_frame()
    assert isinstance(frame, pandas.DataFrame)
    assert list(frame.columns) == ["row", "group", "representative", "distance", "keep"]
    np.testing.assert_array_equal(frame["row"], np.arange(60))
    for name in ("group", "representative", "distance", "keep"):
        np.testing.assert_array_equal(frame[name], getattr(result, name))
    assert not frame["keep"][4]


def test_to_frame_says_where_pandas_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)  # as where it is not installed
    with pytest.raises(InputError, match="pip install pandas"):
        balance(copies_of_scenes(10), threshold=0.3, metric="cosine").to_frame()


def test_lists_and_tensors_are_taken_as_arrays_are() -> None:
    x = copies_of_scenes(60)
    valid = np.arange(60) % 7 > 0
    expected = balance(x, threshold=0.3, metric="cosine", valid=valid)
    assert same(balance(x.tolist(), threshold=0.3, metric="cosine", valid=valid.tolist()), expected)
    assert same(balance(torch.from_numpy(x), threshold=0.3, metric="cosine", valid=torch.from_numpy(valid)), expected)


def test_empty_and_all_invalid_input() -> None:
    assert balance(np.empty((0, 4), np.float16), threshold=0.1, metric="cosine").removed_ratio == 0
    nothing = balance(np.ones((3, 4)), threshold=0.1, metric="cosine", valid=np.zeros(3, bool))
    assert (nothing.num_valid, nothing.num_groups, nothing.keep.sum()) == (0, 0, 0)
