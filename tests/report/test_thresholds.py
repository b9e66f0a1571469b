from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from distilclip.data.side_files import ForestEdges
from distilclip.errors import InputError
from distilclip.grouping.balance import balance
from distilclip.report.load import load
from distilclip.report.sections import GallerySize, balance_sections
from distilclip.report.thresholds import choose_near_edges, edges_below, largest_below, outcomes_of
from distilclip.stage_folder import read_record
from tests.report.made_run import forest_edges, naive_largest, write_balance, write_run

SIZE = GallerySize(num_groups=2, num_clusters=1, num_pictures=3, thumbnail=48)


@pytest.mark.parametrize("seed", range(5))
def test_the_largest_group_equals_a_naive_count(seed: int) -> None:
    random = np.random.default_rng(seed)
    num_rows = int(random.integers(2, 80))
    # A random tree, its edges in random order; then only some of them, so that several groups stay.
    edges = np.array([(int(random.integers(row)), row) for row in range(1, num_rows)])
    edges = random.permutation(edges)[: int(random.integers(1, num_rows))]
    stops = np.sort(random.integers(0, len(edges) + 1, 6))
    found = largest_below(edges[:, 0].astype(np.uint64), edges[:, 1].astype(np.uint64), stops)
    assert found.tolist() == [naive_largest(*edges[:stop].T.tolist()) for stop in stops]


def test_a_long_chain_in_any_order_is_one_group() -> None:
    rows = np.random.default_rng(0).permutation(3000).astype(np.uint64)
    order = np.random.default_rng(1).permutation(2999)
    found = largest_below(rows[:-1][order], rows[1:][order], np.array([0, 2999]))
    assert found.tolist() == [1, 3000]


def test_every_threshold_gives_what_balance_gives_there(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    x = np.repeat(random.normal(size=(20, 8)), 5, axis=0) + 0.2 * random.normal(size=(100, 8))
    whole = balance(x, threshold=0.05, metric="cosine", max_threshold=0.3)
    forest = ForestEdges(
        left=whole.forest.left.astype(np.uint64),
        right=whole.forest.right.astype(np.uint64),
        distance=whole.forest.distance,
    )
    thresholds = np.linspace(0.003, 0.3, 40)
    below = edges_below(forest, thresholds)
    largest = largest_below(forest.left, forest.right, below)
    others = [whole.at(threshold) for threshold in thresholds.tolist()]
    assert (100 - below).tolist() == [other.num_groups for other in others]
    assert largest.tolist() == [other.largest_group for other in others]


def test_the_folders_own_numbers_stand_at_its_own_threshold(tmp_path: Path) -> None:
    write_balance(tmp_path, tmp_path / "no-store")
    record = read_record(str(tmp_path))
    assert record is not None
    found = outcomes_of(record)
    assert found is not None
    assert found.threshold[found.chosen] == 0.07
    assert (found.num_groups[found.chosen], found.largest_group[found.chosen]) == (14, 4)
    assert len(found.threshold) == 200, "one of 200 steps is the chosen one"
    at = int(np.searchsorted(found.threshold, 0.0555))
    assert found.num_groups[at] == 22 - 6 + (found.threshold[at] <= 0.055)


def test_without_a_forest_and_by_a_cover_the_curve_answers(tmp_path: Path) -> None:
    write_balance(tmp_path, tmp_path / "no-store")
    result = json.loads((tmp_path / "result.json").read_text())
    steps = [point["threshold"] for point in result["curve"] if point["threshold"]]
    for change in ({"rule": "cover"}, {}):
        (tmp_path / "result.json").write_text(json.dumps(result | change))
        if not change:
            (tmp_path / "forest.parquet").unlink()
        record = read_record(str(tmp_path))
        assert record is not None
        found = outcomes_of(record)
        assert found is not None
        assert found.threshold.tolist() == sorted({*steps, 0.07})


def test_a_damaged_forest_is_told_and_the_page_stands(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    (run / "balance/forest.parquet").write_bytes(b"PAR1")
    (section,) = balance_sections(load([str(run)]), SIZE)
    assert section.slider is None
    assert "forest.parquet is no complete Parquet file" in section.slider_problem
    record = read_record(str(run / "balance"))
    assert record is not None
    with pytest.raises(InputError, match=r"forest\.parquet"):
        outcomes_of(record)


def test_the_pairs_next_to_a_threshold_are_those_of_the_forest(tmp_path: Path) -> None:
    edges = choose_near_edges(forest_edges(), np.array([0.01, 0.07, 0.14]), chosen=1, num_places=1)
    assert edges.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9], (
        "three to either side of the first place and the chosen one"
    )
    (section,) = balance_sections(load([str(write_run(tmp_path))]), SIZE)
    assert section.slider is not None
    distances = [pair[2] for pair in section.slider["pairs"]]
    assert distances == sorted(distances)
    assert {0.065, 0.075} <= {round(distance, 4) for distance in distances}
    images = section.slider["pictures"]
    assert len({tuple(image) for image in images}) == len(images), "a picture that recurs is there once"


def test_nothing_that_can_be_joined_makes_a_slider_without_pairs() -> None:
    nothing = ForestEdges(left=np.empty(0, np.uint64), right=np.empty(0, np.uint64), distance=np.empty(0, np.float32))
    steps = np.array([0.1, 0.2])
    assert edges_below(nothing, steps).tolist() == [0, 0]
    assert largest_below(nothing.left, nothing.right, np.array([0, 0])).tolist() == [1, 1]
    assert choose_near_edges(nothing, steps, chosen=0, num_places=5).tolist() == []
