from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from distilclip.data.store import Store, sample_id
from distilclip.errors import InputError
from distilclip.report.gallery import (
    KINDS,
    PictureReader,
    Strip,
    choose_clusters,
    choose_pairs,
    choose_removals,
    read_strips,
    thumbnail,
)
from tests.conftest import picture
from tests.report.made_run import NASTY, write_embed, write_pairs


def choose(samples: np.ndarray, kept: np.ndarray, distance: np.ndarray, **more: int) -> dict[str, list[Strip]]:
    settings = {"num_groups": 1, "num_pictures": 3, "seed": 0, **more}
    return choose_removals(
        samples.astype(np.uint64), kept.astype(np.uint64), distance.astype(np.float32), threshold=0.07, **settings
    )


def test_largest_random_and_borderline_by_hand() -> None:
    samples = np.array([11, 12, 13, 14, 21, 31])
    kept = np.array([10, 10, 10, 10, 20, 30])
    distance = np.array([0.01, 0.02, 0.03, 0.04, 0.069, 0.005])
    chosen = choose(samples, kept, distance)
    assert [(r.samples[0], r.title, r.detail) for r in chosen["largest"]] == [(10, "4 removed", "3 shown")]
    assert chosen["largest"][0].distance == pytest.approx([None, 0.01, 0.03, 0.04])
    assert chosen["largest"][0].samples[1:] == [11, 13, 14], "spread over the distances, nearest and farthest included"
    assert [(r.samples, r.detail) for r in chosen["borderline"]] == [([20, 21], "")]
    assert [r.samples for r in chosen["random"]] == [[30, 31]]


def test_borderline_shows_what_lies_nearest_to_the_threshold_on_either_side() -> None:
    samples = np.arange(100, 106)
    distance = np.array([0.001, 0.05, 0.066, 0.071, 0.09, 0.2])
    chosen = choose(
        np.append(samples, [1, 2, 3, 4, 5, 6, 7]), np.repeat([99, 0], [6, 7]), np.append(distance, [0.0] * 7)
    )
    assert chosen["largest"][0].samples[0] == 0
    assert chosen["borderline"][0].samples[1:] == [101, 102, 103]


def test_no_group_is_shown_twice_and_order_does_not_matter() -> None:
    random = np.random.default_rng(0)
    kept = random.integers(0, 40, 300)
    samples, distance = np.arange(1000, 1300), random.random(300)
    chosen = choose(samples, kept, distance, num_groups=5)
    shown = [strip.samples[0] for kind in KINDS for strip in chosen[kind]]
    assert len(shown) == len(set(shown)) == 15
    order = random.permutation(300)
    assert choose(samples[order], kept[order], distance[order], num_groups=5) == chosen


def test_the_first_page_is_the_same_however_many_follow() -> None:
    random = np.random.default_rng(0)
    kept, samples, distance = random.integers(0, 40, 300), np.arange(1000, 1300), random.random(300)
    one = choose(samples, kept, distance, num_groups=3)
    several = choose(samples, kept, distance, num_groups=3, num_pages=4)
    assert {kind: strips[:3] for kind, strips in several.items()} == one
    shown = [strip.samples[0] for kind in KINDS for strip in several[kind]]
    assert len(shown) == len(set(shown)) == 36
    many = choose(samples, kept, distance, num_groups=3, num_pages=99)
    assert sum(map(len, many.values())) == len(np.unique(kept)), "pages end where the groups do"


def test_pages_of_clusters_run_from_both_ends_and_meet_once() -> None:
    cluster = np.repeat(np.arange(9), np.arange(1, 10))
    samples = np.arange(len(cluster), dtype=np.uint64)
    found = choose_clusters(
        samples, cluster, np.zeros(len(cluster), np.float32), num_clusters=2, num_pictures=1, num_pages=9
    )
    assert [s.title for s in found["largest"]] == [f"Cluster {n}" for n in (8, 7, 6, 5, 4)]
    assert [s.title for s in found["smallest"]] == [f"Cluster {n}" for n in (0, 1, 2, 3)]


def test_nothing_removed_gives_an_empty_gallery() -> None:
    empty = np.array([])
    assert choose(empty, empty, empty) == {"largest": [], "random": [], "borderline": []}


def test_pairs_are_the_first_that_balance_lists() -> None:
    pairs = [{"left": 5, "right": 6, "distance": 0.0699}, {"left": 7, "right": 8, "distance": 0.0698}]
    (strip,) = choose_pairs(pairs, num_pairs=1)
    assert (strip.samples, strip.distance, strip.kept) == ([5, 6], [None, 0.0699], False)


def test_strips_by_hand() -> None:
    samples = np.arange(10, dtype=np.uint64)
    cluster = np.array([7, 7, 7, 7, 7, 2, 2, 2, 5, 9])
    distance = np.array([0.5, 0.1, 0.3, 0.2, 0.4, 0.3, 0.2, 0.1, 0.0, 0.0], np.float32)
    strips = choose_clusters(samples, cluster, distance, num_clusters=2, num_pictures=3)
    assert [(s.title, s.detail, s.samples) for s in strips["largest"]] == [
        ("Cluster 7", "5 pictures", [1, 2, 0]),
        ("Cluster 2", "3 pictures", [7, 6, 5]),
    ]
    assert [(s.title, s.detail) for s in strips["smallest"]] == [("Cluster 9", "1 picture"), ("Cluster 5", "1 picture")]


def test_few_clusters_are_not_shown_twice() -> None:
    strips = choose_clusters(
        np.arange(3, dtype=np.uint64), np.array([0, 0, 1]), np.zeros(3, np.float32), num_clusters=2, num_pictures=3
    )
    assert [s.title for s in strips["largest"]] == ["Cluster 0", "Cluster 1"]
    assert strips["smallest"] == []


def test_pictures_of_a_strip_are_at_most_the_number_asked_for() -> None:
    strips = choose_clusters(
        np.arange(50, dtype=np.uint64),
        np.zeros(50, int),
        np.linspace(0, 1, 50, dtype=np.float32),
        num_clusters=1,
        num_pictures=8,
    )
    assert len(strips["largest"][0].samples) == 8
    assert (strips["largest"][0].samples[0], strips["largest"][0].samples[-1]) == (0, 49)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(str(write_embed(tmp_path / "embed", write_pairs(tmp_path / "pairs"), teacher="t")))


def test_a_sample_is_read_by_its_offset(store: Store) -> None:
    reader = PictureReader(store, size=48)
    found = reader.picture(int(sample_id(1, 5)))
    assert (found.key, found.caption, found.problem) == ("00005", "picture 5 of shard 1", "")
    assert (found.width, found.height) == (48, 32)
    assert reader.picture(int(sample_id(0, 0))).caption == NASTY
    reader.close()


def test_the_thumbnail_is_the_picture_made_smaller_never_larger() -> None:
    image = picture(3, size=(96, 64))
    uri, size = thumbnail(image, 48)
    decoded = Image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/jpeg;base64,"))))
    assert decoded.size == size == (48, 32)
    assert thumbnail(image, 500)[1] == (96, 64)


def test_a_damaged_picture_is_told_not_raised(store: Store) -> None:
    reader = PictureReader(store, size=48)
    found = reader.picture(int(sample_id(0, 3)))
    reader.close()
    assert found.image == ""
    assert "row 3" in found.problem


def test_a_moved_tar_is_told_not_raised(store: Store) -> None:
    Path(store.shards[1].uri).rename(Path(store.shards[1].uri).with_suffix(".moved"))
    found = PictureReader(store, size=48).picture(int(sample_id(1, 1)))
    assert found.image == ""
    assert "00001.tar" in found.problem


def test_strips_without_any_picture_are_an_error_with_the_first_reason(store: Store) -> None:
    good, damaged = int(sample_id(0, 1)), int(sample_id(0, 3))
    strips = read_strips({"a": [Strip(samples=[damaged, good], distance=[None, 0.1])]}, store, size=48)
    assert [bool(found.problem) for found in strips["a"][0].pictures] == [True, False]
    with pytest.raises(InputError, match="row 3"):
        read_strips({"a": [Strip(samples=[damaged], distance=[None])]}, store, size=48)
