from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from distilclip.data.images import ImageMatrix
from distilclip.data.store import Store
from distilclip.errors import InputError
from distilclip.grouping import reach as module
from distilclip.grouping.balance import balance
from distilclip.grouping.reach import CHANCE, Reach, check_reach, measure_reach
from distilclip.grouping.rule import Rule
from distilclip.vectors.metric import Metric
from tests.stages.conftest import write_store

CPU = torch.device("cpu")
NO_COPIES = np.empty(0, np.int64)


@pytest.fixture
def images(tmp_path: Path) -> ImageMatrix:
    """120 rows in three shards, of which some are no images and a third are near copies."""
    return ImageMatrix(Store.open(write_store(tmp_path / "store")[0]))


def rule_of(target: float, reach: float, metric: Metric = "euclidean") -> Rule:
    return Rule(metric=metric, target_removed=target, max_threshold=reach)


def distances(images: ImageMatrix, metric: Metric) -> np.ndarray:
    """Of every valid row the distance to its nearest other one, from the formula."""
    x = images.take(np.flatnonzero(images.valid())).astype(np.float64)
    if metric == "cosine":
        x /= np.linalg.norm(x, axis=1, keepdims=True)
    squared = ((x[:, None] - x[None]) ** 2).sum(axis=2)
    np.fill_diagonal(squared, np.inf)
    least = squared.min(axis=1)
    return {"euclidean": np.sqrt(least), "sqeuclidean": least, "cosine": least / 2}[metric]


@pytest.mark.parametrize("metric", ["euclidean", "sqeuclidean", "cosine"])
@pytest.mark.parametrize("block", [7, 1000])
def test_nearest_distances_equal_the_formula(
    images: ImageMatrix, metric: Metric, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BLOCK", block)
    monkeypatch.setattr(module, "TILE", block // 2)
    valid = images.valid()
    expected = distances(images, metric)
    reach = float(np.quantile(expected, 0.4))
    found = measure_reach(
        images, valid, np.flatnonzero(valid), rule_of(0.5, reach, metric), copied=NO_COPIES, device=CPU
    )
    np.testing.assert_allclose(found.nearest, np.sort(expected), rtol=1e-5, atol=1e-7)
    assert (expected < reach).sum() <= found.num_near <= (expected < reach).sum() + 2  # rounding is in its favour
    assert found.num_rows == valid.sum()


def test_rows_of_one_file_are_near_whatever_their_distance(images: ImageMatrix) -> None:
    valid = images.valid()
    rows = np.flatnonzero(valid)
    rule = rule_of(0.5, 1e-4)
    assert measure_reach(images, valid, rows, rule, copied=rows[:7], device=CPU).num_near >= 7
    assert measure_reach(images, valid, rows, rule, copied=NO_COPIES, device=CPU).num_near < 7


@pytest.mark.parametrize(("num_near", "num_far"), [(0, 128), (3, 125), (50, 974), (5, 0)])
def test_no_larger_share_is_as_unlikely_as_the_chance_allows(num_near: int, num_far: int) -> None:
    found = Reach(nearest=np.zeros(num_near + num_far), num_near=num_near, num_rows=10**6)
    if not num_far:
        assert found.most == 1.0
        return
    for share, more_likely in ((found.most * 0.99, True), (min(1.0, found.most * 1.01), False)):
        assert (stats.binom.cdf(num_near, num_near + num_far, share) > CHANCE) == more_likely


def test_the_share_by_hand() -> None:
    # None of 128 near: the share s for which (1 - s)^128 is one in 3.5 million.
    assert Reach(nearest=np.ones(128), num_near=0, num_rows=10**6).most == pytest.approx(1 - CHANCE ** (1 / 128))


@pytest.mark.parametrize("seed", range(6))
def test_a_target_that_a_search_reaches_is_never_refused(
    tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LOOKS", (12, 60))
    images = ImageMatrix(Store.open(write_store(tmp_path / "store")[0]))
    valid, draw = images.valid(), np.random.default_rng(seed)
    reach = float(draw.uniform(0.05, 1.2))
    x = np.asarray(images.read(0, len(images)))
    reached = balance(x, threshold=reach, metric="euclidean", valid=valid).removed_ratio
    for target in (0.5 * reached, reached - 1e-9):
        if target > 0:
            check_reach(images, valid, rule_of(target, reach), copied=NO_COPIES, device=CPU)


def test_a_target_out_of_reach_is_refused_with_thresholds_that_reach_it(
    images: ImageMatrix, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LOOKS", (200,))  # all rows: then what is said of the sample holds for all
    valid = images.valid()
    with pytest.raises(InputError) as error:
        check_reach(images, valid, rule_of(0.3, 0.01), copied=NO_COPIES, device=CPU)
    message = str(error.value)
    assert "target_removed=0.3 is out of reach of max_threshold=0.01 (euclidean): of 110 sampled images 0" in message
    expected = np.sort(distances(images, "euclidean"))
    least, enough = expected[int(np.ceil(0.3 * 110)) - 1], expected[int(np.ceil(0.6 * 110)) - 1]
    assert f"--max-threshold: 0.3 of the sample has a neighbour within {least:.4g}; {enough:.4g}, where" in message
    x = np.asarray(images.read(0, len(images)))
    assert balance(x, threshold=1.001 * enough, metric="euclidean", valid=valid).removed_ratio >= 0.3
    assert balance(x, threshold=0.99 * least, metric="euclidean", valid=valid).removed_ratio < 0.3
    with pytest.raises(InputError, match=r"within [\d.]+\.$"):  # no share is twice this one
        check_reach(images, valid, rule_of(0.6, 0.01), copied=NO_COPIES, device=CPU)


def test_a_doubtful_first_look_is_followed_by_a_second(images: ImageMatrix, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = []
    measure = measure_reach

    def counted(*arguments: object, **options: object) -> Reach:
        looks.append(len(arguments[2]))  # type: ignore[arg-type]
        return measure(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "measure_reach", counted)
    monkeypatch.setattr(module, "LOOKS", (4, 90))
    with pytest.raises(InputError, match="of 90 sampled images"):
        check_reach(images, images.valid(), rule_of(0.3, 0.01), copied=NO_COPIES, device=CPU)
    check_reach(images, images.valid(), rule_of(0.3, 2.0), copied=NO_COPIES, device=CPU)
    assert looks == [4, 90, 4]
