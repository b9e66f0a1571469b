from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from distilclip.data.side_files import (
    ForestEdges,
    Groups,
    Labels,
    groups_path,
    read_centers,
    read_forest,
    read_groups,
    read_labels,
    write_centers,
    write_forest,
    write_groups,
    write_labels,
)
from distilclip.errors import InputError

ROWS = np.array([0, 2, 5], np.uint32)
IDS = np.array([2**32, 2**32 + 2, 2**33], np.uint64)
DISTANCE = np.array([0, 0.25, 0.5], np.float32)
GROUPS = Groups(ROWS, IDS, IDS[[0, 0, 2]], DISTANCE, np.array([True, False, True]))
LABELS = Labels(ROWS, np.array([7, 0, 2**31], np.uint32), DISTANCE)
FOREST = ForestEdges(IDS[:2], IDS[1:], DISTANCE[1:])
CENTERS = np.eye(3, 5, dtype=np.float32)


def equal(a: object, b: object) -> bool:
    return all(np.array_equal(getattr(b, name), value) for name, value in vars(a).items())


@pytest.mark.parametrize("remote", [False, True])
def test_side_files_round_trip(tmp_path: Path, remote: bool) -> None:
    folder = "memory://sides" if remote else str(tmp_path)
    write_groups(folder, 4, GROUPS)
    write_labels(folder, 4, LABELS)
    write_forest(folder, FOREST)
    write_centers(folder, CENTERS, {"teacher_digest": "1"})
    assert equal(GROUPS, read_groups(folder, 4))
    assert equal(LABELS, read_labels(folder, 4))
    assert equal(FOREST, read_forest(folder))
    assert np.array_equal(read_centers(folder), CENTERS)


def test_writing_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_groups(str(tmp_path / name), 0, GROUPS)
        write_centers(str(tmp_path / name), CENTERS)
    for part in ("groups/000000.parquet", "centers.safetensors"):
        assert (tmp_path / "a" / part).read_bytes() == (tmp_path / "b" / part).read_bytes()


def test_files_of_an_empty_shard(tmp_path: Path) -> None:
    empty = Labels(ROWS[:0], ROWS[:0], DISTANCE[:0])
    write_labels(str(tmp_path), 0, empty)
    assert equal(empty, read_labels(str(tmp_path), 0))


def test_missing_cut_and_foreign_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"groups/000000\.parquet is missing"):
        read_groups(str(tmp_path), 0)
    write_groups(str(tmp_path), 0, GROUPS)
    path = Path(groups_path(str(tmp_path), 0))
    content = path.read_bytes()
    path.write_bytes(content[:-9])
    with pytest.raises(InputError, match=r"000000\.parquet is no complete Parquet file"):
        read_groups(str(tmp_path), 0)
    path.write_bytes(content)
    table = pq.read_table(path)
    pq.write_table(table.drop_columns("keep"), path)
    with pytest.raises(InputError, match=r"lacks the columns keep \(bool\); it has row, group"):
        read_groups(str(tmp_path), 0)


def test_centers_must_be_finite_unit_vectors(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"centers\.safetensors is missing: run `distilclip cluster"):
        read_centers(str(tmp_path))
    for value in (np.nan, 2.0):
        centers = CENTERS.copy()
        centers[1, 1] = value
        write_centers(str(tmp_path), centers)
        with pytest.raises(InputError, match="center 1 is no unit vector"):
            read_centers(str(tmp_path))
