import numpy as np
import pytest

from distilclip.clustering.sums import STEPS, CenterSums, split_heaviest
from distilclip.errors import InputError
from distilclip.vectors.points import Points


def made(n: int = 300, dim: int = 70, k: int = 7) -> tuple[np.ndarray, Points, np.ndarray]:
    random = np.random.default_rng(0)
    x = random.standard_normal((n, dim)).astype(np.float16)
    unit = x.astype(np.float64) / np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True)
    return unit, Points.of(x, metric="cosine"), random.integers(0, k, n).astype(np.int32)


def sums_of(points: Points, rows: np.ndarray, labels: np.ndarray) -> CenterSums:
    sums = CenterSums.zero(7, points.dim)
    sums.move(points, rows, np.full(len(rows), -1, np.int32), labels)
    return sums


def test_the_example_of_the_docstring() -> None:
    points = Points.of(np.array([[1.0, 0.0], [0.6, 0.8]]), metric="cosine")
    sums = CenterSums.zero(1, 2)
    sums.move(points, np.arange(2), np.array([-1, -1]), np.array([0, 0]))
    assert sums.total.tolist() == [[27487790694, 13743895347]]
    centers = np.array([[1.0, 0.0]], np.float32)
    assert sums.renew(centers)
    assert centers == pytest.approx(np.array([[0.8944, 0.4472]]), abs=1e-4)
    assert sums.objective(centers) == pytest.approx(0.1056, abs=1e-4)


def test_sums_and_directions_equal_float64() -> None:
    unit, points, labels = made()
    sums = sums_of(points, np.arange(300), labels)
    truth = np.stack([unit[labels == c].sum(axis=0) for c in range(7)])
    np.testing.assert_allclose(sums.total / STEPS, truth, atol=300 / STEPS)
    assert sums.count.tolist() == np.bincount(labels).tolist()
    centers = np.zeros((7, 70), np.float32)
    assert sums.renew(centers)
    assert not sums.renew(centers)
    np.testing.assert_allclose(centers, truth / np.linalg.norm(truth, axis=1, keepdims=True), atol=1e-7)
    assert sums.objective(centers) == pytest.approx(1 - (unit * centers[labels]).sum(axis=1).mean(), abs=1e-9)


def test_two_rows_by_hand() -> None:
    points = Points.of(np.array([[3.0, 0.0], [0.0, 0.5]]), metric="cosine")
    sums = CenterSums.zero(1, 2)
    assert sums.move(points, np.array([0, 1]), np.array([-1, -1]), np.array([0, 0])) == 2
    assert sums.total.tolist() == [[STEPS, STEPS]]
    centers = np.zeros((1, 2), np.float32)
    assert sums.renew(centers)
    np.testing.assert_allclose(centers, [[0.5**0.5, 0.5**0.5]], rtol=1e-7)


def test_no_order_and_no_history_changes_a_bit() -> None:
    _, points, labels = made()
    whole = sums_of(points, np.arange(300), labels)
    order = np.random.default_rng(1).permutation(300)
    assert sums_of(points, order, labels[order]).total.tobytes() == whole.total.tobytes()
    parts = [sums_of(points, rows, labels[rows]) for rows in np.array_split(order, 5)]
    assert np.sum([part.total for part in parts], axis=0).tobytes() == whole.total.tobytes()
    other = (labels + 3) % 7
    other[::2] = labels[::2]
    moved = sums_of(points, np.arange(300), other)
    assert moved.move(points, np.arange(300), other, labels) == 150
    assert moved.total.tobytes() == whole.total.tobytes()
    assert moved.count.tobytes() == whole.count.tobytes()


def test_the_heaviest_is_split_and_equal_rows_weigh_nothing() -> None:
    centers = np.eye(6, 16, dtype=np.float32)
    count, distance = np.array([10, 0, 3, 0, 4, 90]), np.array([2.0, 0, 0.3, 0, 0.2, 1e-13])
    assert split_heaviest(centers, count, distance)
    assert not split_heaviest(centers, np.ones(6, np.int64), distance)
    np.testing.assert_allclose(centers[[0, 1, 3]] @ np.eye(6, 16)[0], 1, atol=1e-5)
    np.testing.assert_array_equal(centers[[2, 4, 5]], np.eye(6, 16)[[2, 4, 5]])
    assert len(np.unique(centers, axis=0)) == 6
    np.testing.assert_allclose(np.linalg.norm(centers, axis=1), 1, rtol=1e-6)
    with pytest.raises(InputError, match="fewer directions"):
        split_heaviest(centers, count, np.zeros(6))


def test_a_cluster_whose_rows_cancel_keeps_its_center() -> None:
    points = Points.of(np.array([[1.0, 0.0], [-1.0, 0.0]]), metric="cosine")
    sums = CenterSums.zero(1, 2)
    sums.move(points, np.arange(2), np.full(2, -1), np.zeros(2, np.int64))
    centers = np.array([[0.0, 1.0]], np.float32)
    assert not sums.renew(centers)
    assert centers.tolist() == [[0.0, 1.0]]
