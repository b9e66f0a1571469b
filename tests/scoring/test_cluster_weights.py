"""Weights by cluster: the quotas of density-based pruning, and powers of sizes."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize

from distilclip.errors import InputError
from distilclip.scoring.cluster_weights import (
    cluster_curve,
    complexities,
    distances_between,
    farthest_rows,
    power_weights,
    quotas,
    round_quotas,
    softmax,
)


def unit_rows(num: int, dim: int = 6, seed: int = 0) -> np.ndarray:
    x = np.random.default_rng(seed).normal(size=(num, dim))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("seed", range(6))
def test_quotas_solve_the_paper_s_quadratic_program(seed: int) -> None:
    random = np.random.default_rng(seed)
    sizes = random.integers(0, 40, 9)
    shares = softmax(np.where(sizes > 0, random.random(9), np.nan), temperature=random.choice([0.05, 0.3, 2.0]))
    num_rows = int(random.uniform(0.15, 0.95) * sizes.sum())
    least = np.minimum(sizes, 1)
    solved = minimize(
        lambda x: 0.5 * np.square(x - num_rows * shares).sum(),
        x0=sizes * num_rows / sizes.sum(),
        jac=lambda x: x - num_rows * shares,
        bounds=list(zip(least, sizes, strict=True)),
        constraints={"type": "eq", "fun": lambda x: x.sum() - num_rows, "jac": lambda x: np.ones(9)},
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 500},
    )
    found = quotas(shares, sizes=sizes, num_rows=num_rows)
    np.testing.assert_allclose(found, solved.x, atol=1e-5)
    whole = round_quotas(found)
    assert whole.sum() == num_rows
    assert (np.abs(whole - found) < 1).all()
    assert ((whole >= least) & (whole <= sizes)).all()


def test_what_a_full_cluster_cannot_take_goes_to_the_others_alike() -> None:
    found = quotas(np.array([0.5, 0.3, 0.2]), sizes=np.array([2, 9, 9]), num_rows=10)
    np.testing.assert_allclose(found, [2, 4.5, 3.5])  # 5, 3, 2 wanted; 3 are left over
    # One cluster wants all, and each of the others keeps one row.
    np.testing.assert_allclose(quotas(np.array([1.0, 0, 0]), sizes=np.array([9, 9, 9]), num_rows=7), [5, 1, 1])
    everything = quotas(np.array([0.9, 0.1, 0.0]), sizes=np.array([3, 4, 0]), num_rows=7)
    np.testing.assert_allclose(everything, [3, 4, 0])
    for num_rows in (1, 8):
        with pytest.raises(InputError, match=f"A quota of {num_rows} rows is not possible"):
            quotas(np.array([0.5, 0.5]), sizes=np.array([3, 4]), num_rows=num_rows)


@pytest.mark.parametrize("num_centers", [3, 40])
def test_complexity_is_width_times_distance_to_the_nearest_centers(num_centers: int) -> None:
    centers, cluster = unit_rows(num_centers), np.random.default_rng(1).integers(0, num_centers - 1, 200)
    distance = np.random.default_rng(2).random(200).astype(np.float32)
    found = complexities(centers, cluster, distance)
    assert np.isnan(found[-1])  # it has no rows, and others do not measure their distance to it
    there = np.unique(cluster)
    between = 1 - centers[there].astype(np.float64) @ centers[there].astype(np.float64).T
    for place, c in enumerate(there):
        others = np.sort(np.delete(between[place], place))[:20]
        assert found[c] == pytest.approx(distance[cluster == c].astype(np.float64).mean() * others.mean(), abs=1e-6)
    with pytest.raises(InputError, match="only one has rows"):
        distances_between(centers[:1])


def test_softmax_by_hand_and_its_limits() -> None:
    values = np.array([0.0, np.log(3) / 10, np.nan])
    np.testing.assert_allclose(softmax(values, temperature=0.1), [0.25, 0.75, 0])
    np.testing.assert_allclose(softmax(values, temperature=1e9), [0.5, 0.5, 0])
    np.testing.assert_allclose(softmax(values, temperature=1e-6), [0, 1, 0])


def test_the_farthest_rows_fill_a_quota_and_of_equals_the_first() -> None:
    cluster = np.array([1, 0, 1, 0, 1, 0])
    distance = np.array([0.1, 0.5, 0.3, 0.5, 0.3, 0.6], np.float32)
    chosen = farthest_rows(cluster, distance, np.array([2, 1, 0]))
    assert chosen.tolist() == [False, True, True, False, False, True]
    order = np.random.default_rng(0).permutation(500)
    cluster, distance = np.arange(500) % 7, np.random.default_rng(1).random(500).astype(np.float32)
    quota = np.arange(7) * 9
    chosen = farthest_rows(cluster, distance, quota)
    assert np.bincount(cluster[chosen], minlength=7).tolist() == quota.tolist()
    np.testing.assert_array_equal(farthest_rows(cluster[order], distance[order], quota), chosen[order])


def test_a_power_of_the_size_is_the_share_of_a_cluster() -> None:
    sizes = np.array([1, 4, 0, 16])
    for power in (0.0, 0.5, 1.0):
        shares = sizes * power_weights(sizes, power=power)
        np.testing.assert_allclose(shares, np.where(sizes > 0, sizes.astype(float) ** power, 0))


def test_the_curve_counts_the_largest_clusters_first() -> None:
    curve = cluster_curve(np.array([1.0, 3.0, 0.0, 4.0]), np.ones(4), num_points=4)
    assert [point["before"] for point in curve] == [0.5, 0.875, 1.0, 1.0]
    assert [point["after"] for point in curve] == [0.25, 0.5, 0.75, 1.0]
