from __future__ import annotations

import numpy as np

from distilclip.report.gallery import KINDS, Removal, choose_removals, choose_strips


def choose(samples: np.ndarray, kept: np.ndarray, distance: np.ndarray, **more: int) -> dict[str, list[Removal]]:
    settings = {"num_groups": 1, "num_pictures": 3, "seed": 0, **more}
    return choose_removals(
        samples.astype(np.uint64), kept.astype(np.uint64), distance.astype(np.float32), threshold=0.07, **settings
    )


def test_largest_random_and_borderline_by_hand() -> None:
    samples = np.array([11, 12, 13, 14, 21, 31])
    kept = np.array([10, 10, 10, 10, 20, 30])
    distance = np.array([0.01, 0.02, 0.03, 0.04, 0.069, 0.005])
    chosen = choose(samples, kept, distance)
    assert [(r.kept, r.num_removed) for r in chosen["largest"]] == [(10, 4)]
    assert chosen["largest"][0].removed == [11, 13, 14], "spread over the distances, nearest and farthest included"
    assert [(r.kept, r.removed) for r in chosen["borderline"]] == [(20, [21])]
    assert [(r.kept, r.removed) for r in chosen["random"]] == [(30, [31])]


def test_borderline_shows_what_lies_nearest_to_the_threshold_on_either_side() -> None:
    samples = np.arange(100, 106)
    distance = np.array([0.001, 0.05, 0.066, 0.071, 0.09, 0.2])
    chosen = choose(
        np.append(samples, [1, 2, 3, 4, 5, 6, 7]), np.repeat([99, 0], [6, 7]), np.append(distance, [0.0] * 7)
    )
    assert chosen["largest"][0].kept == 0
    assert chosen["borderline"][0].removed == [101, 102, 103]


def test_no_group_is_shown_twice_and_order_does_not_matter() -> None:
    random = np.random.default_rng(0)
    kept = random.integers(0, 40, 300)
    samples, distance = np.arange(1000, 1300), random.random(300)
    chosen = choose(samples, kept, distance, num_groups=5)
    shown = [removal.kept for kind in KINDS for removal in chosen[kind]]
    assert len(shown) == len(set(shown)) == 15
    order = random.permutation(300)
    assert choose(samples[order], kept[order], distance[order], num_groups=5) == chosen


def test_nothing_removed_gives_an_empty_gallery() -> None:
    empty = np.array([])
    assert choose(empty, empty, empty) == {"largest": [], "random": [], "borderline": []}


def test_strips_by_hand() -> None:
    samples = np.arange(10, dtype=np.uint64)
    cluster = np.array([7, 7, 7, 7, 7, 2, 2, 2, 5, 9])
    distance = np.array([0.5, 0.1, 0.3, 0.2, 0.4, 0.3, 0.2, 0.1, 0.0, 0.0], np.float32)
    strips = choose_strips(samples, cluster, distance, num_clusters=2, num_pictures=3)
    assert [(s.cluster, s.num_samples, s.samples) for s in strips["largest"]] == [(7, 5, [1, 2, 0]), (2, 3, [7, 6, 5])]
    assert [s.cluster for s in strips["smallest"]] == [9, 5], "smallest first"


def test_few_clusters_are_not_shown_twice() -> None:
    strips = choose_strips(
        np.arange(3, dtype=np.uint64), np.array([0, 0, 1]), np.zeros(3, np.float32), num_clusters=2, num_pictures=3
    )
    assert [s.cluster for s in strips["largest"]] == [0, 1]
    assert strips["smallest"] == []


def test_pictures_of_a_strip_are_at_most_the_number_asked_for() -> None:
    strips = choose_strips(
        np.arange(50, dtype=np.uint64),
        np.zeros(50, int),
        np.linspace(0, 1, 50, dtype=np.float32),
        num_clusters=1,
        num_pictures=8,
    )
    assert len(strips["largest"][0].samples) == 8
    assert (strips["largest"][0].samples[0], strips["largest"][0].samples[-1]) == (0, 49)
