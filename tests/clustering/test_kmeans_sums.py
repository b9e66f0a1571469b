import numpy as np
import pytest
import torch

from distilclip.clustering import sums as sums_module
from distilclip.clustering.sums import EQUAL, MOST_ROWS, STEPS, CenterSums, DeviceSums, Tally, check_count, split
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


def renew(sums: CenterSums, centers: np.ndarray) -> bool:
    """Move the centers; whether any changed."""
    return bool(sums.renew(centers, sums.tally(centers).length).any())


def test_the_example_of_the_docstring() -> None:
    points = Points.of(np.array([[1.0, 0.0], [0.6, 0.8]]), metric="cosine")
    sums = CenterSums.zero(1, 2)
    sums.move(points, np.arange(2), np.array([-1, -1]), np.array([0, 0]))
    assert sums.total.tolist() == [[27487790694, 13743895347]]
    centers = np.array([[1.0, 0.0]], np.float32)
    assert renew(sums, centers)
    assert centers == pytest.approx(np.array([[0.8944, 0.4472]]), abs=1e-4)
    assert sums.tally(centers).objective == pytest.approx(0.1056, abs=1e-4)


def test_sums_and_directions_equal_float64() -> None:
    unit, points, labels = made()
    sums = sums_of(points, np.arange(300), labels)
    truth = np.stack([unit[labels == c].sum(axis=0) for c in range(7)])
    np.testing.assert_allclose(sums.total / STEPS, truth, atol=300 / STEPS)
    assert sums.count.tolist() == np.bincount(labels).tolist()
    centers = np.zeros((7, 70), np.float32)
    assert renew(sums, centers)
    assert not renew(sums, centers)
    np.testing.assert_allclose(centers, truth / np.linalg.norm(truth, axis=1, keepdims=True), atol=1e-7)
    assert sums.tally(centers).objective == pytest.approx(1 - (unit * centers[labels]).sum(axis=1).mean(), abs=1e-9)


def test_two_rows_by_hand() -> None:
    points = Points.of(np.array([[3.0, 0.0], [0.0, 0.5]]), metric="cosine")
    sums = CenterSums.zero(1, 2)
    assert sums.move(points, np.array([0, 1]), np.array([-1, -1]), np.array([0, 0])) == 2
    assert sums.total.tolist() == [[STEPS, STEPS]]
    centers = np.zeros((1, 2), np.float32)
    assert renew(sums, centers)
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


def tally_of(count: np.ndarray, distance: np.ndarray) -> Tally:
    return Tally(count=count, length=count - distance, cosine=count - distance)


def test_the_heaviest_is_split_and_equal_rows_weigh_nothing() -> None:
    centers = np.eye(6, 16, dtype=np.float32)
    tally = tally_of(np.array([10, 0, 3, 0, 4, 90]), np.array([2.0, 0, 0.3, 0, 0.2, 1e-13]))
    assert tally.splits() == [(1, 0), (3, 0)]
    assert tally.num_empty == 2
    split(centers, tally.splits())
    assert tally_of(np.ones(6, np.int64), np.ones(6)).splits() == []
    np.testing.assert_allclose(centers[[0, 1, 3]] @ np.eye(6, 16)[0], 1, atol=1e-5)
    np.testing.assert_array_equal(centers[[2, 4, 5]], np.eye(6, 16)[[2, 4, 5]])
    assert len(np.unique(centers, axis=0)) == 6
    np.testing.assert_allclose(np.linalg.norm(centers, axis=1), 1, rtol=1e-6)
    with pytest.raises(InputError, match="fewer directions"):
        tally_of(np.array([10, 0, 3, 0, 4, 90]), np.zeros(6)).splits()


def naive_splits(count: np.ndarray, distance: np.ndarray) -> list[tuple[int, int]]:
    """All weights are looked at for each empty cluster."""
    weight = np.where(distance > EQUAL * count, distance, 0)
    pairs = []
    for index in np.flatnonzero(count == 0).tolist():
        heaviest = int(weight.argmax())
        weight[index] = weight[heaviest] = weight[heaviest] / 2
        pairs.append((index, heaviest))
    return pairs


def test_splits_equal_a_naive_reference() -> None:
    random = np.random.default_rng(0)
    for num_empty in (1, 3, 40, 90):
        count = random.integers(1, 30, 100)
        count[random.choice(100, num_empty, replace=False)] = 0
        distance = count * random.choice([0.125, 0.25, 0.5], 100)  # equal weights, exact halves
        assert tally_of(count, distance).splits() == naive_splits(count, distance)


def test_a_few_rows_are_split_as_in_the_whole_table() -> None:
    centers = np.random.default_rng(0).standard_normal((9, 5)).astype(np.float32)
    pairs = [(2, 7), (4, 7), (5, 2)]
    few = {index: centers[index].copy() for index in (2, 4, 5, 7)}
    split(centers, pairs)
    split(few, pairs)
    for index, center in few.items():
        assert center.tobytes() == centers[index].tobytes()


def test_a_device_finds_the_same_bits_in_any_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    _, points, labels = made()
    whole = sums_of(points, np.arange(300), labels)
    monkeypatch.setattr(sums_module, "BLOCK", 64)
    sums = DeviceSums(7, points.dim, torch.device("cpu"))
    for rows in np.array_split(np.random.default_rng(2).permutation(300), 3):
        sums.add(points, rows, labels[rows])
    found = sums.on_host()
    assert found.total.tobytes() == whole.total.tobytes()
    assert found.count.tobytes() == whole.count.tobytes()


def test_more_rows_than_a_sum_can_hold_are_an_error() -> None:
    check_count(np.array([1, MOST_ROWS]))
    with pytest.raises(InputError, match=f"has {MOST_ROWS + 1} rows"):
        check_count(np.array([1, MOST_ROWS + 1]))


def test_a_cluster_whose_rows_cancel_keeps_its_center() -> None:
    points = Points.of(np.array([[1.0, 0.0], [-1.0, 0.0]]), metric="cosine")
    sums = CenterSums.zero(1, 2)
    sums.move(points, np.arange(2), np.full(2, -1), np.zeros(2, np.int64))
    centers = np.array([[0.0, 1.0]], np.float32)
    assert not renew(sums, centers)
    assert centers.tolist() == [[0.0, 1.0]]
