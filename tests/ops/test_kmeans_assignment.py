from collections.abc import Callable

import numpy as np
import pytest
import torch

from distilclip.ops import assignment as module
from distilclip.ops import centergroups, seeding
from distilclip.ops.assignment import Assignment, assign
from distilclip.ops.centergroups import CenterGroups, CenterTiles
from distilclip.ops.codes import Codes, encode, fastest_code
from distilclip.ops.nearest import Nearest
from distilclip.ops.points import Points, kernel_view
from distilclip.ops.seeding import first_centers, sample_rows

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
    tiles = module._DeviceCenters(torch.from_numpy(centers).to(CPU))
    return labels, tiles.update(labels, points, np.arange(len(points)))


@pytest.mark.parametrize("find", [assign, on_device])
@pytest.mark.parametrize("k", [1, 7, 130, 700])
def test_labels_are_those_of_all_inner_products(
    find: Callable[..., tuple[np.ndarray, np.ndarray]], k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ROWS", 256)
    x, centers = rows(1500), unit(rows(k, seed=1)).astype(np.float32)
    labels, distance = find(Points.of(x, metric="cosine"), centers)
    product = unit(x) @ centers.astype(np.float64).T
    np.testing.assert_array_equal(labels, product.argmax(axis=1))
    np.testing.assert_allclose(distance, 1 - product.max(axis=1), atol=1e-7)


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


def test_bounds_never_change_a_label(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(centergroups, "WIDTH", 32)
    x, random = rows(1200), np.random.default_rng(0)
    points, everyone = Points.of(x, metric="cosine"), np.arange(1200)
    centers = unit(rows(100, seed=1)).astype(np.float32)
    groups, before = CenterGroups.of(centers), None
    assert groups.num_groups == len(groups.order) == 4
    known = Assignment(centers, groups=groups).unknown(1200)
    slack = []
    for size in (0.3, 0.1, 0.0, 0.01, 0.003, 0.001):
        round_ = Assignment(centers, groups=groups, before=before)
        distance = round_.update(known, points, everyone)
        product = unit(x) @ centers.astype(np.float64).T
        np.testing.assert_array_equal(known.labels, product.argmax(axis=1))
        np.testing.assert_allclose(distance, 1 - product.max(axis=1), atol=1e-7)
        assert known.bounds is not None
        largest = np.stack([product[:, tile[tile >= 0]].max(axis=1) for tile in groups.order], axis=1)
        assert (known.bounds / 2**14 >= largest).all()
        slack.append((known.bounds / 2**14 - largest).max())
        before = centers
        moved = random.random((100, 1)) < 0.5
        centers = unit(centers + moved * size * random.standard_normal(centers.shape)).astype(np.float32)
    assert slack[0] < 0.05  # all groups were compared in the first round,
    assert max(slack) > 0.05  # some were skipped later: their bounds have grown since


def test_half_the_bounds_may_be_unknown() -> None:
    points, centers = Points.of(rows(300), metric="cosine"), unit(rows(90, seed=1)).astype(np.float32)
    labels, _ = assign(points, centers)
    known = Nearest(labels=np.zeros(300, np.int32), bounds=None)  # labels of a round before, found elsewhere
    Assignment(centers, groups=CenterGroups.of(centers), before=centers[::-1].copy()).update(
        known, points, np.arange(300)
    )
    np.testing.assert_array_equal(known.labels, labels)


@pytest.mark.parametrize("dtype", [np.int8, np.float32])
def test_codes_say_inner_products_to_within_their_residuals(dtype: type) -> None:
    x, origin = rows(200), rows(1, seed=9)[0].astype(np.float32) / 20
    points = Points.of(x, metric="cosine")
    codes = Codes.empty(200, 24, dtype)
    encode(kernel_view(points.values), points.scale, np.arange(200), origin, codes)
    y = unit(x) - origin
    coded = codes.step[:, None].astype(np.float64) * codes.code
    left, right = slice(0, 100), slice(100, 200)
    error = np.abs(y[left] @ y[right].T - coded[left] @ coded[right].T)
    residual, length = codes.residual.astype(np.float64), codes.length.astype(np.float64)
    limit = residual[left, None] * length[right] + (length + residual)[left, None] * residual[right]
    assert (error <= limit + 1e-6).all()
    np.testing.assert_allclose(codes.along, unit(x) @ origin, atol=1e-6)
    assert fastest_code() in (np.int8, np.float32)


def test_groups_hold_every_center_once_in_tiles_of_one_width() -> None:
    for k in (1, 5, 129, 1000):
        groups = CenterGroups.of(unit(rows(k)).astype(np.float32))
        assert sorted(groups.order[groups.order >= 0].tolist()) == list(range(k))
        assert ((groups.order >= 0).sum(axis=1) >= groups.order.shape[1] - 1).all()
        assert len(groups.order) % groups.num_groups == 0


def test_drift_is_what_centers_moved_at_most() -> None:
    before, after = (unit(rows(40, seed=seed)).astype(np.float32) for seed in (1, 2))
    tiles = CenterTiles.of(after, CenterGroups.of(before), before)
    x = unit(rows(500))
    radius = float(np.linalg.norm(x - tiles.origin, axis=1).max())
    growth = x @ (after.astype(np.float64) - before.astype(np.float64)).T
    assert growth.max() <= tiles.drift(radius).max() + 1e-6


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
    monkeypatch.setattr(seeding, "LEAST_ROWS", 70)
    fit, first = sample_rows(1000, num_centers=10, points_per_center=30, random=np.random.default_rng(0))
    assert len(fit) == len(np.unique(fit)) == 300
    assert len(first) == 80
    assert set(first) < set(fit)
    assert (np.diff(first) > 0).all()
    fit, first = sample_rows(50, num_centers=10, points_per_center=None, random=np.random.default_rng(0))
    assert fit.tolist() == first.tolist() == list(range(50))
