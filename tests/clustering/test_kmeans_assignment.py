from collections.abc import Callable

import numpy as np
import pytest
import torch

from distilclip.clustering import _assign_cpu, _assign_gpu, kmeans, sketches
from distilclip.clustering.assignment import Assignment, assign
from distilclip.clustering.fit_options import FitOptions
from distilclip.clustering.kmeans import first_centers, sample_rows
from distilclip.clustering.sketches import Sketches, choose_projection
from distilclip.clustering.sums import CenterSums, DeviceSums
from distilclip.vectors.points import Points
from distilclip.vectors.projection import Projection

CPU = torch.device("cpu")


def rows(n: int, dim: int = 24, *, seed: int = 0) -> np.ndarray:
    """In a narrow cone, as embeddings of images are."""
    random = np.random.default_rng(seed)
    return (random.standard_normal((n, dim)) + 2 * random.standard_normal(dim)).astype(np.float16)


def unit(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def on_device(points: Points, centers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The path of accelerators, here."""
    labels = np.empty(len(points), np.int32)
    tiles = _assign_gpu.DeviceCenters(torch.from_numpy(centers).to(CPU))
    return labels, tiles.update(labels, points, np.arange(len(points)))


@pytest.mark.parametrize("find", [assign, on_device])
def test_the_example_of_the_docstring(find: Callable[..., tuple[np.ndarray, np.ndarray]]) -> None:
    angles, places = np.radians(np.arange(0, 181, 20)), np.radians([0, 90, 180])
    points = Points.of(np.stack([np.cos(angles), np.sin(angles)], axis=1), metric="cosine")
    centers = np.stack([np.cos(places), np.sin(places)], axis=1).astype(np.float32)
    labels, distance = find(points, centers)
    assert labels.tolist() == [0, 0, 0, 1, 1, 1, 1, 2, 2, 2]
    assert distance[2] == pytest.approx(0.23, abs=0.005)


@pytest.mark.parametrize("find", [assign, on_device])
@pytest.mark.parametrize("k", [1, 7, 130, 700])
def test_labels_are_those_of_all_inner_products(
    find: Callable[..., tuple[np.ndarray, np.ndarray]], k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_assign_gpu, "ROWS", 256)
    x, centers = rows(1500), unit(rows(k, seed=1)).astype(np.float32)
    labels, distance = find(Points.of(x, metric="cosine"), centers)
    product = unit(x) @ centers.astype(np.float64).T
    np.testing.assert_array_equal(labels, product.argmax(axis=1))
    np.testing.assert_allclose(distance, 1 - product.max(axis=1), atol=1e-7)


def test_a_device_sums_the_rows_that_it_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_assign_gpu, "ROWS", 64)
    x, centers = rows(300), unit(rows(9, seed=1)).astype(np.float32)
    points, chosen = Points.of(x, metric="cosine"), np.arange(0, 300, 2)
    labels, sums = np.empty(150, np.int32), DeviceSums(9, 24, CPU)
    _assign_gpu.DeviceCenters(torch.from_numpy(centers)).update(labels, points, chosen, sums)
    expected = CenterSums.zero(9, 24)
    expected.add(points, chosen, labels)
    assert sums.on_host().total.tobytes() == expected.total.tobytes()
    assert sums.on_host().count.tolist() == np.bincount(labels, minlength=9).tolist()


@pytest.mark.parametrize("find", [assign, on_device])
def test_of_equal_centers_the_first_wins_and_near_ones_are_told_apart(
    find: Callable[..., tuple[np.ndarray, np.ndarray]],
) -> None:
    x = rows(50)
    centers = np.repeat(unit(rows(3, seed=2)).astype(np.float32), 40, axis=0)  # 40 copies of each
    labels, _ = find(Points.of(x, metric="cosine"), centers)
    np.testing.assert_array_equal(labels, 40 * (unit(x) @ centers[::40].T.astype(np.float64)).argmax(axis=1))
    near = np.repeat(centers[:1], 64, axis=0)
    near += np.float32(1e-6) * rows(64, seed=3).astype(np.float32)  # nearer to each other than bytes or bfloat16 tell
    labels, _ = find(Points.of(x, metric="cosine"), near)
    np.testing.assert_array_equal(labels, (unit(x) @ near.astype(np.float64).T).argmax(axis=1))


@pytest.mark.parametrize("width", [4, 12, 24])
@pytest.mark.parametrize("dtype", [np.int8, np.float32])
def test_no_guess_no_width_and_no_code_changes_a_label(
    width: int, dtype: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sketches, "fastest_code", lambda: dtype)
    monkeypatch.setattr(_assign_cpu, "BREADTH", 256)
    x, centers = rows(700), unit(rows(300, seed=1)).astype(np.float32)
    points, everyone = Points.of(x, metric="cosine"), np.arange(700)
    assignment = Assignment(centers, Projection.fit(points, everyone, width=width))
    truth = (unit(x) @ centers.astype(np.float64).T).argmax(axis=1)
    known = assignment.begin(points, everyone)
    for guess in (-1, truth, np.random.default_rng(0).integers(0, 300, 700), 299):
        known.labels[:] = guess
        assignment.update(known, points, everyone)
        np.testing.assert_array_equal(known.labels, truth)


@pytest.mark.parametrize("width", [8, 24])
@pytest.mark.parametrize("dtype", [np.int8, np.float32])
def test_sketches_bound_inner_products(width: int, dtype: type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sketches, "fastest_code", lambda: dtype)
    x = rows(200)
    points, everyone = Points.of(x, metric="cosine"), np.arange(200)
    projection = Projection.fit(points, everyone, width=width)
    found = Sketches.of(projection, points, everyone)
    assert found.code.shape == (200, width)
    assert found.code.dtype == dtype
    y = unit(x) - projection.mean.numpy()
    coded = found.step[:, None].astype(np.float64) * found.code
    residual, length = found.residual.astype(np.float64), found.length.astype(np.float64)
    error = residual[:, None] * length + (length + residual)[:, None] * residual
    slack = coded @ coded.T + error - y @ y.T
    assert slack.min() > -1e-6
    if width == 24:  # nothing is left out but the rounding
        assert slack.max() < (0.1 if dtype == np.int8 else 1e-4)
    np.testing.assert_allclose(found.along, unit(x) @ projection.mean.numpy(), atol=1e-6)
    assert sketches.fastest_code() == dtype


def test_the_example_of_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sketches, "fastest_code", lambda: np.int8)
    x = np.array([[0.6, 0.2], [0.5, 0.1]])
    found = Sketches.of(
        Projection(mean=torch.zeros(2), directions=None), Points.of(x, metric="euclidean"), np.arange(2)
    )
    assert found.code.tolist() == [[127, 42], [127, 25]]
    assert found.residual == pytest.approx([0.0016, 0.0016], abs=5e-5)
    product = (found.step[:, None] * found.code)[0] @ (found.step[:, None] * found.code)[1]
    error = found.residual[0] * found.length[1] + (found.length[0] + found.residual[0]) * found.residual[1]
    assert (product, error) == pytest.approx((0.3195, 0.0018), abs=5e-5)
    assert product + error >= x[0] @ x[1]


def test_sketches_are_narrow_where_the_rows_are_and_wide_on_a_sphere() -> None:
    random = np.random.default_rng(0)
    flat = random.standard_normal((3000, 300)) * np.arange(1, 301) ** -1.5
    sphere = random.standard_normal((3000, 300))
    for x, narrow in ((flat, True), (sphere, False)):
        points = Points.of(x, metric="cosine")
        centers = points.block(np.arange(200)).numpy()
        assert (choose_projection(points, np.arange(3000), centers).directions is not None) == narrow


def test_first_centers_are_rows_and_far_apart() -> None:
    random = np.random.default_rng(0)
    blobs = unit(rows(8, seed=4) * 4)[random.integers(0, 8, 400)] + 0.01 * random.standard_normal((400, 24))
    points = Points.of(blobs, metric="cosine")
    centers = first_centers(points, np.arange(400), num_centers=8, random=random)
    assert (np.abs(unit(blobs)[:, None] - centers[None]).max(axis=2).min(axis=0) < 1e-6).all()
    between = centers @ centers.T - 2 * np.eye(8)
    assert between.max() < 0.999  # one of each blob
    many = first_centers(points, np.arange(400), num_centers=400, random=random)
    assert len(np.unique(many, axis=0)) == 400


def test_samples_ascend_and_lie_in_one_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kmeans, "LEAST_ROWS", 70)
    fit, first = sample_rows(1000, FitOptions(num_centers=10, points_per_center=30), np.random.default_rng(0))
    assert len(fit) == len(np.unique(fit)) == 300
    assert len(first) == 70
    assert set(first) < set(fit)
    assert (np.diff(first) > 0).all()
    fit, first = sample_rows(50, FitOptions(num_centers=10), np.random.default_rng(0))
    assert fit.tolist() == first.tolist() == list(range(50))
