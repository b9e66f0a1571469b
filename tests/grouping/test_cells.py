import numpy as np
import pytest
import torch

from distilclip.grouping._tiles import as_bits, set_left
from distilclip.grouping.cells import partition


def bunches(n: int = 600, dim: int = 12, *, seed: int = 0) -> torch.Tensor:
    random = np.random.default_rng(seed)
    x = random.standard_normal((30, dim))[random.integers(0, 30, n)] + 0.3 * random.standard_normal((n, dim))
    return torch.from_numpy(x).bfloat16()


def test_cells_hold_every_point_once_with_its_nearest_center() -> None:
    points = bunches()
    cells = partition(points, num_cells=16, radius=20.0)
    assert sorted(cells.order.tolist()) == list(range(len(points)))
    z = points.float().numpy()[cells.order]
    squared = ((z[:, None] - cells.gaps.centers[None]) ** 2).sum(axis=2)
    label = np.repeat(np.arange(16), np.diff(cells.start))
    np.testing.assert_array_equal(squared.argmin(axis=1), label)
    np.testing.assert_allclose(cells.own, squared.min(axis=1), atol=1e-4)
    gap = squared - cells.own[:, None]
    expected = np.stack([gap[label == c].min(axis=0, initial=np.inf) for c in range(16)])
    np.testing.assert_allclose(cells.gaps.least, expected, atol=1e-4)


def test_columns_beside_the_points_make_a_product_a_squared_distance() -> None:
    points = bunches()
    z = partition(points, num_cells=4, radius=20.0).z
    left = torch.empty_like(z[:50])
    set_left(left, z[:50])
    left, x, y = left.double(), z[:50].double(), z[50:120].double()
    torch.testing.assert_close(left @ y.T, torch.cdist(x[:, :-4], y[:, :-4]).square(), atol=2e-3, rtol=0)


def test_no_pair_within_the_distance_is_out_of_reach() -> None:
    points = bunches()
    for num_cells in (2, 9, 64):
        cells = partition(points, num_cells=num_cells, radius=20.0)
        z = cells.z[:, :-4].double().numpy()
        distances = np.linalg.norm(z[:, None] - z[None], axis=2)
        reached = pairs = 0
        for cell in range(num_cells):
            members = np.arange(cells.start[cell], cells.start[cell + 1])
            later = np.arange(cells.start[cell + 1], len(z))
            found, rows = np.empty(37, np.int64), np.empty((37, cells.z.shape[1]), np.int16)
            reach: list[int] = []
            (limit,) = cells.gaps.limits(0.9, range(cell, cell + 1))
            for count in cells.reach(cell, limit, found=found, rows=rows):
                np.testing.assert_array_equal(rows[:count], as_bits(cells.z)[found[:count]])
                reach += found[:count].tolist()
            needed = later[(distances[np.ix_(members, later)] < 0.9).any(axis=0)]
            assert len(set(reach)) == len(reach)
            assert set(needed) <= set(reach)
            reached += len(reach)
            pairs += len(later)
        assert reached < 0.9 * pairs or num_cells < 9


@pytest.mark.parametrize("num_searched", [0, 1, 100, 299, 300])
def test_points_that_do_not_seek_lie_behind_all_others_in_cells_of_the_same_centers(num_searched: int) -> None:
    points = bunches()[:300]
    cells = partition(points, num_cells=7, radius=20.0, num_searched=num_searched)
    whole = partition(points, num_cells=7, radius=20.0)
    assert sorted(cells.order[: cells.num_seeking].tolist()) == list(range(num_searched, 300))
    for cell in range(7):
        members = set(whole.order[whole.start[cell] : whole.start[cell + 1]].tolist())
        seeking = cells.order[list(cells.seeking(cell))].tolist()
        assert seeking == sorted(i for i in members if i >= num_searched)
        if num_searched:
            rest = cells.order[cells.start[7 + cell] : cells.start[8 + cell]].tolist()
            assert rest == sorted(i for i in members if i < num_searched)


@pytest.mark.parametrize("num_searched", [0, 40, 590])
def test_limits_leave_out_no_pair_of_any_cells(num_searched: int) -> None:
    points = bunches()
    cells = partition(points, num_cells=12, radius=20.0, num_searched=num_searched)
    z = cells.z[:, :-4].double().numpy()
    near = np.linalg.norm(z[:, None] - z[None], axis=2) < 0.9
    limits = cells.gaps.limits(0.9, range(12))
    assert np.isinf(limits).any()
    for cell in range(12):
        for other in range(len(limits.T)):
            here = slice(cells.start[cell], cells.start[cell + 1])
            there = slice(cells.start[other], cells.start[other + 1])
            gap = ((z[there] - cells.gaps.centers[cell]) ** 2).sum(axis=1) - cells.own[there]
            assert not near[here, there][:, gap >= limits[cell, other]].any()


def test_fewer_points_than_cells_and_equal_points() -> None:
    cells = partition(torch.ones(5, 3, dtype=torch.bfloat16), num_cells=8, radius=2.0)
    assert cells.start[-1] == 5
    assert (cells.own == 0).all()
