import itertools

import numpy as np
import pytest

from distilclip.errors import InputError
from distilclip.ops import kmeans as module
from distilclip.ops.kmeans import assign, gini, kmeans, size_histogram
from distilclip.ops.points import Points


def blobs(n: int = 600, dim: int = 16, k: int = 6, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    truth = random.integers(0, k, n)
    x = random.standard_normal((k, dim))[truth] + 0.15 * random.standard_normal((n, dim))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float16), truth


def naive(x: np.ndarray, centers: np.ndarray, num_iterations: int) -> tuple[np.ndarray, np.ndarray]:
    """Lloyd's rounds in float64 with the whole n x k matrix."""
    x = x.astype(np.float64)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    for _ in range(num_iterations):
        labels = (x @ centers.T).argmax(axis=1)
        sums = np.stack([x[labels == c].sum(axis=0) for c in range(len(centers))])
        centers = sums / np.linalg.norm(sums, axis=1, keepdims=True)
    return centers, (x @ centers.T).argmax(axis=1)


def test_rounds_equal_a_naive_reference() -> None:
    x, _ = blobs()
    points = Points.of(x, metric="cosine")
    start = module.first_centers(points, np.arange(len(x)), num_centers=9, random=np.random.default_rng(3))
    result = kmeans(x, num_centers=9, num_iterations=4, seed=3)
    centers, labels = naive(x, start.astype(np.float64), 4)
    np.testing.assert_allclose(result.centers, centers, atol=1e-6)
    np.testing.assert_array_equal(result.labels, labels)
    unit = x.astype(np.float64) / np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True)
    assert result.objective == pytest.approx(1 - (unit * centers[labels]).sum(axis=1).mean(), abs=1e-6)


def test_two_directions_by_hand() -> None:
    x = np.array([[2.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 5.0]])
    result = kmeans(x, num_centers=2)
    assert result.labels[0] == result.labels[2] != result.labels[1] == result.labels[3]
    assert result.objective == 0
    assert sorted(result.centers.tolist()) == [[0.0, 1.0], [1.0, 0.0]]
    assert result.sizes.tolist() == [2, 2]


def test_separate_blobs_are_found_and_the_objective_never_rises() -> None:
    x, truth = blobs()
    result = kmeans(x, num_centers=6)
    table = np.zeros((6, 6), int)
    np.add.at(table, (truth, result.labels), 1)
    assert (np.count_nonzero(table, axis=1) == 1).all()
    objectives = [kmeans(x, num_centers=20, num_iterations=i).objective for i in (1, 2, 4, 8, 16)]
    assert all(later <= earlier + 1e-7 for earlier, later in itertools.pairwise(objectives))


def test_same_seed_same_bytes_whatever_the_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    x, _ = blobs()
    first = kmeans(x, num_centers=20, seed=5)
    again = kmeans(x, num_centers=20, seed=5)
    assert first.centers.tobytes() == again.centers.tobytes()
    monkeypatch.setattr(module, "TILE", 7)
    tiled = kmeans(x, num_centers=20, seed=5)
    np.testing.assert_array_equal(tiled.labels, first.labels)
    np.testing.assert_allclose(tiled.centers, first.centers, atol=1e-6)


def test_empty_clusters_are_filled_by_splitting_the_heaviest() -> None:
    x, _ = blobs(400, k=4)
    result = kmeans(x, num_centers=100, num_iterations=6)
    assert (result.sizes > 0).all()
    centers = np.eye(5, 16, dtype=np.float32)
    module._split_heaviest(centers, np.array([10, 0, 3, 0, 4]))
    np.testing.assert_allclose(centers[[0, 1, 3]] @ centers[0], 1, atol=1e-5)
    assert len(np.unique(centers, axis=0)) == 5
    np.testing.assert_allclose(np.linalg.norm(centers, axis=1), 1, rtol=1e-6)


def test_fit_on_a_sample_still_labels_every_row() -> None:
    x, _ = blobs()
    result = kmeans(x, num_centers=6, points_per_center=20)
    assert len(result.labels) == len(x)
    assert result.objective < 1.2 * kmeans(x, num_centers=6).objective


def test_assign_takes_the_first_of_equal_centers() -> None:
    x, _ = blobs(20)
    centers = np.repeat(np.eye(1, 16, dtype=np.float32), 3, axis=0)
    labels, distance = assign(Points.of(x, metric="cosine"), centers)
    assert (labels == 0).all()
    np.testing.assert_allclose(distance, 1 - x[:, 0].astype(np.float64), atol=2e-3)


def test_inequality_of_sizes() -> None:
    assert gini(np.array([5, 5, 5, 5])) == 0
    assert gini(np.array([0, 0, 0, 8])) == 0.75
    assert size_histogram(np.array([0, 1, 1, 2, 3, 4, 7, 8])).tolist() == [1, 2, 2, 2, 1]


def test_too_many_centers_is_an_error() -> None:
    with pytest.raises(InputError, match=r"num_centers=21 .* number of rows, 20"):
        kmeans(np.eye(20), num_centers=21)
