import itertools
import subprocess
import sys

import numpy as np
import pytest

from distilclip.clustering import _assign_cpu, sketches
from distilclip.clustering.fit_options import FitOptions
from distilclip.clustering.kmeans import KMeans, gini, is_finished, kmeans, size_histogram
from distilclip.clustering.sums import CenterSums
from distilclip.errors import InputError


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


def first_rows(x: np.ndarray, k: int) -> np.ndarray:
    centers = x[:k].astype(np.float64)
    return centers / np.linalg.norm(centers, axis=1, keepdims=True)


@pytest.mark.parametrize("k", [9, 300])
def test_rounds_equal_a_naive_reference(k: int) -> None:
    x, _ = blobs(900)
    result = kmeans(x, num_centers=k, num_iterations=4, initial=x[:k])
    centers, labels = naive(x, first_rows(x, k).astype(np.float32).astype(np.float64), 4)
    np.testing.assert_allclose(result.centers, centers, atol=1e-6)
    np.testing.assert_array_equal(result.labels, labels)
    unit = x.astype(np.float64) / np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True)
    assert result.objective == pytest.approx(1 - (unit * centers[labels]).sum(axis=1).mean(), abs=1e-6)


def test_agrees_with_scikit_learn() -> None:
    cluster = pytest.importorskip("sklearn.cluster")
    x, truth = blobs()
    unit = first_rows(x, len(x))
    initial = unit[np.unique(truth, return_index=True)[1]]
    # Its means are shorter than unit vectors, which moves no row between blobs as far apart as these.
    theirs = cluster.KMeans(6, init=initial, n_init=1, tol=0).fit(unit)
    ours = kmeans(x, num_centers=6, initial=initial)
    np.testing.assert_array_equal(ours.labels, theirs.labels_)
    means = theirs.cluster_centers_ / np.linalg.norm(theirs.cluster_centers_, axis=1, keepdims=True)
    np.testing.assert_allclose(ours.centers, means, atol=1e-6)


def test_two_directions_by_hand() -> None:
    x = np.array([[2.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 5.0]])
    result = kmeans(x, num_centers=2)
    assert result.labels[0] == result.labels[2] != result.labels[1] == result.labels[3]
    assert result.objective == 0
    assert sorted(result.centers.tolist()) == [[0.0, 1.0], [1.0, 0.0]]
    assert result.sizes.tolist() == [2, 2]


def test_the_example_of_the_docstring() -> None:
    angles = np.radians([0, 20, 90])
    result = kmeans(np.stack([np.cos(angles), np.sin(angles)], axis=1), num_centers=2, initial=[[1.0, 0.0], [0.0, 1.0]])
    assert result.labels.tolist() == [0, 0, 1]
    assert result.distance == pytest.approx([0.0152, 0.0152, 0], abs=1e-4)
    assert result.objective == pytest.approx(0.0101, abs=1e-4)


WRONG_INPUTS = """
import numpy as np, torch
import distilclip as dc
x = np.eye(4)
same = dc.kmeans(x, num_centers=2).centers
assert (dc.kmeans(x.tolist(), num_centers=2).centers == same).all()
assert (dc.kmeans(torch.from_numpy(x), num_centers=np.int64(2)).centers == same).all()
for given, options in [
    (x, {"num_centers": 2.5}), (x, {"num_centers": 0}), (x, {"num_centers": 2, "seed": -1}),
    (x, {"num_centers": 2, "num_iterations": 0}), (x, {"num_centers": 2, "tolerance": float("nan")}),
    (x, {"num_centers": 2, "points_per_center": 0}), (x, {"num_centers": 2, "device": "nonsense"}),
    ([[1.0, 2.0], [3.0]], {"num_centers": 1}), (x.astype(int), {"num_centers": 1}), ("rows", {"num_centers": 1}),
    (x, {"num_centers": 2, "initial": [1.0, 2.0]}), (x, {"num_centers": True}), (x, {"num_centers": 2, "device": 3}),
]:
    try:
        dc.kmeans(given, **options)
    except dc.InputError as error:
        print(error)
"""


def test_wrong_inputs_are_named_and_lists_and_tensors_work() -> None:
    """In a process of its own, as a user's: the tests check annotations, which would speak first."""
    done = subprocess.run([sys.executable, "-c", WRONG_INPUTS], check=True, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    starts = ["num_centers is 2.5; it must be a whole number of at least 1", "num_centers is 0", "seed is -1"]
    starts += ["num_iterations is 0", "tolerance is nan", "points_per_center is 0", "The device 'nonsense' cannot"]
    starts += ["Expected rows of equal length", "Expected rows of float16", "Expected rows of float16"]
    starts += ["Expected rows of float16", "num_centers is True", "The device 3 cannot be used"]
    assert [line[: len(start)] for line, start in zip(lines, starts, strict=True)] == starts


def test_separate_blobs_are_found_and_the_objective_never_rises() -> None:
    x, truth = blobs()
    result = kmeans(x, num_centers=6)
    table = np.zeros((6, 6), int)
    np.add.at(table, (truth, result.labels), 1)
    assert (np.count_nonzero(table, axis=1) == 1).all()
    objectives = [kmeans(x, num_centers=20, num_iterations=i).objective for i in (1, 2, 4, 8, 16)]
    assert all(later <= earlier + 1e-7 for earlier, later in itertools.pairwise(objectives))


def assert_same(left: KMeans, right: KMeans) -> None:
    for name in ("centers", "labels", "distance"):
        assert getattr(left, name).tobytes() == getattr(right, name).tobytes(), name


def test_same_seed_same_bytes_whatever_blocks_tiles_and_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    x, _ = blobs()
    first = kmeans(x, num_centers=40, seed=5)
    assert_same(kmeans(x, num_centers=40, seed=5), first)
    assert kmeans(x, num_centers=40, seed=6).centers.tobytes() != first.centers.tobytes()
    monkeypatch.setattr(_assign_cpu, "BLOCK", 64)
    monkeypatch.setattr(_assign_cpu, "BREADTH", 128)
    monkeypatch.setattr(_assign_cpu, "PROPOSALS", 130)
    assert_same(kmeans(x, num_centers=40, seed=5), first)
    monkeypatch.setattr(sketches, "WIDTHS", (4, 8))
    for dtype in (np.int8, np.float32):
        monkeypatch.setattr(sketches, "fastest_code", lambda dtype=dtype: dtype)
        assert_same(kmeans(x, num_centers=40, seed=5), first)


def test_order_of_rows_does_not_change_the_centers() -> None:
    x, _ = blobs()
    order = np.random.default_rng(1).permutation(len(x))
    initial = x[:40]
    first, permuted = (kmeans(rows, num_centers=40, initial=initial) for rows in (x, x[order]))
    assert first.centers.tobytes() == permuted.centers.tobytes()
    np.testing.assert_array_equal(first.labels[order], permuted.labels)


def test_empty_clusters_are_filled() -> None:
    x, _ = blobs(400, k=4)
    assert (kmeans(x, num_centers=100, num_iterations=6).sizes > 0).all()
    x[:300] = x[0]  # one placeholder, heavier than all others: splitting it would be in vain
    assert (kmeans(x, num_centers=80, num_iterations=2, initial=x[:80]).sizes > 0).all()


def test_fewer_directions_than_centers_is_an_error() -> None:
    x = np.repeat(np.eye(3, 8), 4, axis=0)
    assert kmeans(x, num_centers=3).objective == 0
    with pytest.raises(InputError, match="4 centers were asked for, but the rows have fewer directions"):
        kmeans(x, num_centers=4)


def test_when_a_fit_is_finished() -> None:
    full, lacking = np.array([3, 1]), np.array([4, 0])
    once = FitOptions(num_centers=2, num_iterations=1)
    assert not is_finished([0.5], full, once)
    assert is_finished([0.5, 0.4], full, once)
    assert not is_finished([0.5, 0.4], lacking, once)
    tolerant = FitOptions(num_centers=2, tolerance=0.01)
    assert is_finished([0.5, 0.499], full, tolerant)
    assert not is_finished([0.5, 0.49], full, tolerant)


def test_a_fit_that_changes_nothing_ends_early(monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = []
    tally = CenterSums.tally
    monkeypatch.setattr(CenterSums, "tally", lambda *given: rounds.append(0) or tally(*given))
    x, _ = blobs()
    settled = kmeans(x, num_centers=6, num_iterations=1000)
    assert len(rounds) < 50
    again = kmeans(x, num_centers=6, num_iterations=1000, initial=settled.centers)
    np.testing.assert_array_equal(again.labels, settled.labels)


def test_fit_on_a_sample_still_labels_every_row() -> None:
    x, _ = blobs()
    result = kmeans(x, num_centers=6, points_per_center=20)
    assert len(result.labels) == len(x)
    assert result.objective < 1.2 * kmeans(x, num_centers=6).objective


def test_inequality_of_sizes() -> None:
    assert gini(np.array([5, 5, 5, 5])) == 0
    assert gini(np.array([0, 0, 0, 8])) == 0.75
    assert size_histogram(np.array([0, 1, 1, 2, 3, 4, 7, 8])).tolist() == [1, 2, 2, 2, 1]


def test_too_many_centers_is_an_error() -> None:
    with pytest.raises(InputError, match=r"num_centers=21 .* number of rows, 20"):
        kmeans(np.eye(20), num_centers=21)


def test_first_centers_of_another_shape_are_an_error() -> None:
    with pytest.raises(InputError, match=r"\(3, 20\); \(4, 20\) is needed"):
        kmeans(np.eye(20), num_centers=4, initial=np.eye(3, 20))
