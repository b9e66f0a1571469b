from typing import Any

import numpy as np
import pytest
import torch

from distilclip.errors import InputError
from distilclip.grouping import near_pairs, search_gpu
from distilclip.grouping.forest import ForestBuilder
from distilclip.grouping.near_pairs import nearest, pairs_within
from distilclip.grouping.search_cpu import AllPairs, search
from distilclip.grouping.search_gpu import compare_all
from distilclip.vectors.points import Points, distinct
from distilclip.vectors.tolerance import Tolerance, equivalents

METRICS = ("euclidean", "sqeuclidean", "cosine")


def clustered(n: int, dim: int, *, seed: int = 0, spread: float = 0.02) -> np.ndarray:
    """Unit rows around a tenth as many centers, some of them equal, in half precision."""
    random = np.random.default_rng(seed)
    x: np.ndarray = random.standard_normal((n // 10, dim))[random.integers(0, n // 10, n)]
    x = x + spread * random.standard_normal(x.shape) * random.random((n, 1))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    x[n // 2 : n // 2 + n // 20] = x[: n // 20]
    return x.astype(np.float16)


def all_distances(x: np.ndarray, metric: str) -> np.ndarray:
    """Every distance in float64, by the formula."""
    x = x.astype(np.float64)
    if metric == "cosine":
        x = x / np.linalg.norm(x, axis=1, keepdims=True)
    squared = ((x[:, None, :] - x[None, :, :]) ** 2).sum(axis=2)
    return {"euclidean": np.sqrt(squared), "sqeuclidean": squared, "cosine": squared / 2}[metric]


def as_dict(pairs: near_pairs.Pairs) -> dict[tuple[int, int], float]:
    return {(int(i), int(j)): float(d) for i, j, d in zip(pairs.left, pairs.right, pairs.distance, strict=True)}


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_pairs_equal_brute_force_in_float64(metric: str, dtype: type) -> None:
    x: np.ndarray = clustered(400, 48).astype(dtype)
    threshold = equivalents(0.1, "euclidean")[metric]
    pairs = pairs_within(x, threshold=threshold, metric=metric)
    distances = all_distances(x, metric)
    left, right = np.nonzero(np.triu(distances < threshold, k=1))
    assert len(pairs) > 500
    np.testing.assert_array_equal(pairs.left, left)
    np.testing.assert_array_equal(pairs.right, right)
    np.testing.assert_allclose(pairs.distance, distances[left, right], rtol=1e-6, atol=1e-12)


def test_threshold_is_strict_and_the_distance_by_hand() -> None:
    x = np.array([[0.0, 0.0], [3.0, 4.0], [3.0, 4.5]])
    assert as_dict(pairs_within(x, threshold=5.0, metric="euclidean")) == {(1, 2): 0.5}
    assert as_dict(pairs_within(x, threshold=5.0 + 1e-6, metric="euclidean")) == {(0, 1): 5.0, (1, 2): 0.5}
    assert as_dict(pairs_within(x, threshold=0.3, metric="sqeuclidean")) == {(1, 2): 0.25}
    right_angle = np.array([[2.0, 0.0], [0.0, 7.0], [5.0, 0.0]])
    assert as_dict(pairs_within(right_angle, threshold=1.5, metric="cosine")) == {(0, 1): 1.0, (0, 2): 0.0, (1, 2): 1.0}


def test_near_duplicates_far_from_the_origin_do_not_cancel() -> None:
    # Products of float32 know these squared distances to about 1e-3 only; 1e-8 and 9e-8 straddle the threshold.
    x: np.ndarray = 30 * np.ones((3, 64))
    x[1, 0] += 1e-4
    x[2, 0] += 4e-4
    assert as_dict(pairs_within(x, threshold=2e-4, metric="euclidean")) == {(0, 1): pytest.approx(1e-4)}


def test_order_of_rows_does_not_matter() -> None:
    x = clustered(500, 32)
    whole = as_dict(pairs_within(x, threshold=0.1, metric="euclidean"))
    shuffled = np.random.default_rng(1).permutation(len(x))
    found = pairs_within(x[shuffled], threshold=0.1, metric="euclidean")
    renamed = {tuple(sorted((int(shuffled[i]), int(shuffled[j])))): d for (i, j), d in as_dict(found).items()}
    assert renamed == whole


@pytest.mark.parametrize("resident", [False, True])
@pytest.mark.parametrize("length", [1.0, 300.0])
@pytest.mark.parametrize("metric", METRICS)
def test_an_accelerator_compares_all_tiles_to_the_same_pairs(
    metric: str, length: float, resident: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unit rows go through half precision, long ones do not; either way, and whatever fits the device."""
    monkeypatch.setattr(search_gpu, "_free_bytes", lambda device: 10**9 if resident else 0)
    monkeypatch.setattr(search_gpu, "CANDIDATES", 1 << 10)
    x = clustered(500, 32)
    x = x if length == 1 else (length * x.astype(np.float32)).astype(np.float16)
    threshold = equivalents(0.1 * length, "euclidean")[metric] if metric != "cosine" else 0.005
    points = Points.of(x, metric=metric)
    rows = distinct(points.values, np.arange(len(x))).first
    for num_searched in (0, 170):
        both = AllPairs(), AllPairs()
        tolerance, cpu = Tolerance(threshold, metric), torch.device("cpu")
        search(points, rows, tolerance, into=both[0], num_searched=num_searched)
        compare_all(points, rows, tolerance, into=both[1], size=64, device=cpu, num_searched=num_searched)
        ours, all_tiles = (sorted(zip(*(c.tolist() for c in pairs.joined()), strict=True)) for pairs in both)
        assert len(all_tiles) > 50
        assert sorted((min(i, j), max(i, j), d) for i, j, d in ours) == all_tiles
        forests = ForestBuilder(len(x), batch=100), ForestBuilder(len(x))
        compare_all(points, rows, tolerance, into=forests[0], size=64, device=cpu, num_searched=num_searched)
        forests[1].add(*both[1].joined())
        assert (forests[0].forest().left == forests[1].forest().left).all()
        assert (forests[0].forest().distance == forests[1].forest().distance).all()


def test_equal_rows_pair_among_themselves_and_with_all_neighbours() -> None:
    x = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.01], [1.0, 0.0]], np.float16)
    pairs = as_dict(pairs_within(x, threshold=0.1, metric="euclidean"))
    assert {p for p, d in pairs.items() if d == 0} == {(0, 2), (0, 4), (2, 4)}
    assert set(pairs) == {(0, 2), (0, 4), (2, 4), (0, 3), (2, 3), (3, 4)}


def test_distinct_points_to_the_smallest_equal_row() -> None:
    x = np.array([[1, 2], [3, 4], [1, 2], [3, 4], [5, 6]], np.float32)
    same = distinct(x, np.array([1, 2, 3, 4]))
    assert same.first.tolist() == [1, 2, 4]
    assert same.position.tolist() == [-1, 0, 1, 0, 2]


def test_torch_tensors_lists_and_memory_maps_are_read_alike(tmp_path: object) -> None:
    x = clustered(300, 16)
    path = f"{tmp_path}/rows.npy"
    np.save(path, x)
    expected = as_dict(pairs_within(x, threshold=0.1, metric="euclidean"))
    assert as_dict(pairs_within(np.load(path, mmap_mode="r"), threshold=0.1, metric="euclidean")) == expected
    for rows in (torch.from_numpy(x), torch.from_numpy(x).requires_grad_(), x.tolist()):
        assert as_dict(pairs_within(rows, threshold=0.1, metric="euclidean")) == expected


def test_no_rows_and_one_row_have_no_pairs() -> None:
    for n in (0, 1):
        assert len(pairs_within(np.zeros((n, 4), np.float32), threshold=1.0, metric="euclidean")) == 0


@pytest.mark.parametrize("size", [23, 4096])
def test_nearest_equals_sorting_all_distances(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(near_pairs, "tile_rows", lambda dim, memory_gb: size)
    x = np.random.default_rng(0).standard_normal((120, 12))
    found = nearest(Points.of(x, metric="euclidean"), np.arange(120), Tolerance(100.0, "euclidean"), k=5)
    distances = all_distances(x, "euclidean")
    np.fill_diagonal(distances, np.inf)
    np.testing.assert_array_equal(found.row, distances.argsort(axis=1)[:, :5])
    np.testing.assert_allclose(found.distance, np.sort(distances, axis=1)[:, :5], rtol=1e-6)
    near = nearest(Points.of(x, metric="euclidean"), np.arange(120), Tolerance(3.0, "euclidean"), k=5)
    np.testing.assert_array_equal(near.row, np.where(found.distance < 3.0, found.row, -1))
    assert 0 < (near.row < 0).mean() < 1


def test_nearest_fills_up_with_minus_one() -> None:
    x = np.eye(3)
    found = nearest(Points.of(x, metric="cosine"), np.arange(3), Tolerance(2.0, "cosine"), k=4)
    assert found.row[0].tolist() == [1, 2, -1, -1]
    assert np.isinf(found.distance[:, 2:]).all()


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"threshold": 0.0}, "positive"),
        ({"threshold": float("nan")}, "positive"),
        ({"metric": "cosin"}, "'cosine'"),
        ({"x": np.array([[1.0, 2.0], [np.nan, 0.0]])}, "Row 1 is not finite"),
        ({"x": np.array([[1.0, 2.0], [0.0, 0.0]]), "metric": "cosine"}, "Row 1 is zero"),
        ({"x": np.ones((2, 2), np.int64)}, "float16"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"x": np.eye(2), "threshold": 0.1, "metric": "euclidean", **change}
    with pytest.raises(InputError, match=message):
        pairs_within(**arguments)
