import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch

from distilclip.grouping import search_cpu as module
from distilclip.grouping._tiles import product_in_bfloat16, product_in_float32
from distilclip.grouping.forest import Forest, ForestBuilder, spanning_forest
from distilclip.grouping.search_cpu import AllPairs, search
from distilclip.vectors.points import Points
from distilclip.vectors.tolerance import Tolerance

METRICS = {"euclidean": 0.3, "sqeuclidean": 0.09, "cosine": 0.045}


def rows_of(kind: str, *, n: int = 700, dim: int = 80) -> np.ndarray:
    """Rows in half precision: unit, unless the kind says otherwise."""
    random = np.random.default_rng(0)
    x: np.ndarray = random.standard_normal((n, dim)) / np.arange(1, dim + 1) ** 0.5
    if kind == "bunches":
        x = x[random.integers(0, n // 10, n)] + 0.1 * random.random((n, 1)) * x
    elif kind == "one dense group":
        x = x[0] + 0.04 * x
    elif kind == "sphere":
        x = random.standard_normal((n, 6))
    elif kind == "far from the origin":
        return (3 + 0.02 * x).astype(np.float16)
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float16)


KINDS = ("bunches", "one dense group", "sphere", "far from the origin")


def naive(x: np.ndarray, threshold: float, metric: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Near pairs by every difference in float64, the distance rounded to float32."""
    x = x.astype(np.float64)
    if metric == "cosine":
        x = x / np.linalg.norm(x, axis=1, keepdims=True)
    squared = np.stack([((row - x) ** 2).sum(axis=1) for row in x])
    distances = {"euclidean": np.sqrt(squared), "sqeuclidean": squared, "cosine": squared / 2}[metric]
    left, right = np.nonzero(np.triu(distances.astype(np.float32) < np.float32(threshold), k=1))
    return left, right, distances[left, right].astype(np.float32)


def found(x: np.ndarray, *, threshold: float, metric: str, num_cells: int) -> dict[tuple[int, int], float]:
    pairs = AllPairs()
    points = Points.of(x, metric=metric)
    search(points, np.arange(len(x)), Tolerance(threshold, metric), into=pairs, num_cells=num_cells)
    left, right, distance = pairs.joined()
    both = np.sort(np.stack([left, right]), axis=0)
    assert len(np.unique(both, axis=1).T) == len(left)
    return dict(zip(zip(*both.tolist(), strict=True), distance.tolist(), strict=True))


def forest_of(x: np.ndarray, *, threshold: float, metric: str, num_cells: int) -> Forest:
    builder = ForestBuilder(len(x), batch=500)
    points = Points.of(x, metric=metric)
    search(points, np.arange(len(x)), Tolerance(threshold, metric), into=builder, num_cells=num_cells)
    return builder.forest()


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every branch at small n: several tiles to a cell, full buffers, the nearest first, products of whole points."""
    for name, value in {"HEIGHT": 64, "BREADTH": 128, "PROPOSALS": 100, "FIRST": 50, "NUM_SAMPLES": 256}.items():
        monkeypatch.setattr(module, name, value)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_cells", [1, 20])
def test_every_near_pair_is_found_once(kind: str, num_cells: int, small_tiles: None) -> None:
    x = rows_of(kind, n=700 if kind in ("bunches", "sphere") else 400)  # else most pairs are near
    for metric, threshold in METRICS.items():
        left, right, distance = naive(x, threshold, metric)
        pairs = found(x, threshold=threshold, metric=metric, num_cells=num_cells)
        assert len(left) > 50
        assert set(pairs) == set(zip(left.tolist(), right.tolist(), strict=True))
        ordered = [pairs[pair] for pair in zip(left.tolist(), right.tolist(), strict=True)]
        np.testing.assert_allclose(ordered, distance, rtol=2e-7)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_cells", [1, 20])
def test_the_forest_is_that_of_all_pairs(kind: str, num_cells: int, small_tiles: None) -> None:
    x = rows_of(kind)
    for metric, threshold in METRICS.items():
        expected = spanning_forest(*naive(x, threshold, metric), num_rows=len(x))
        forest = forest_of(x, threshold=threshold, metric=metric, num_cells=num_cells)
        np.testing.assert_array_equal(forest.left, expected.left)
        np.testing.assert_array_equal(forest.right, expected.right)
        np.testing.assert_allclose(forest.distance, expected.distance, rtol=2e-7)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("num_cells", "num_searched"), [(1, 300), (20, 60), (20, 450), (20, 600)])
def test_pairs_of_two_searched_rows_are_left_out(
    kind: str, num_cells: int, num_searched: int, small_tiles: None
) -> None:
    x = rows_of(kind)
    left, right, _ = naive(x, 0.3, "euclidean")
    wanted = right >= num_searched
    pairs = AllPairs()
    search(
        Points.of(x, metric="euclidean"),
        np.arange(len(x)),
        Tolerance(0.3, "euclidean"),
        into=pairs,
        num_cells=num_cells,
        num_searched=num_searched,
    )
    found_left, found_right, _ = pairs.joined()
    assert wanted.any()
    assert len(found_left) == wanted.sum()
    both = np.sort(np.stack([found_left, found_right]), axis=0).T.tolist()
    assert sorted(both) == np.stack([left[wanted], right[wanted]], axis=1).tolist()


def test_a_dense_group_is_decided_for_few_of_its_pairs(monkeypatch: pytest.MonkeyPatch, small_tiles: None) -> None:
    decided = []
    decide = module.decide

    def counting(values, scale, left, right, limit, out):  # type: ignore[no-untyped-def]
        decided.append(len(left))
        decide(values, scale, left, right, limit, out)

    monkeypatch.setattr(module, "decide", counting)
    x = rows_of("one dense group", n=1500)
    forest_of(x, threshold=0.3, metric="euclidean", num_cells=10)
    assert sum(decided) < 0.2 * len(x) * (len(x) - 1) / 2


def test_the_kind_of_product_and_the_number_of_threads_change_nothing(
    monkeypatch: pytest.MonkeyPatch, set_threads: Callable[[int], None]
) -> None:
    x = rows_of("bunches", n=3000)
    forests = []
    for product, threads in itertools.product((product_in_bfloat16, product_in_float32), (1, 2)):
        monkeypatch.setattr(module, "fastest_product", lambda product=product: product)
        set_threads(threads)
        forests.append(forest_of(x, threshold=0.3, metric="euclidean", num_cells=16))
        assert torch.get_num_threads() == threads
    for forest in forests[1:]:
        for name in ("left", "right", "distance"):
            assert getattr(forest, name).tobytes() == getattr(forests[0], name).tobytes()


def test_a_budget_that_is_too_small_is_an_error() -> None:
    x = rows_of("sphere")
    points = Points.of(x, metric="cosine")
    with pytest.raises(module.InputError, match="memory_gb=1e-06"):
        search(points, np.arange(len(x)), Tolerance(0.1, "cosine"), into=AllPairs(), memory_gb=1e-6)
