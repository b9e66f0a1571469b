"""Files that a fault found by `make fuzz` was in: each is one clear error, or costs its own rows only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distilclip import config, failures, stage_folder
from distilclip.data.images import check_points
from distilclip.data.samples import BadSample
from distilclip.data.shards import open_shard
from distilclip.data.store import finished_shard
from distilclip.data.tensors import read_tensors
from distilclip.errors import InputError
from distilclip.export.uids import read_subset
from distilclip.integrity.folders import check_folders
from distilclip.row_weights import RowPlaces, read_row_weights
from tests.conftest import encoded, picture

PLACE = {"dtype": "F16", "shape": [2], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    "header",
    [
        [],
        3,
        {"image": None},
        {"image": {}},
        {"image": PLACE | {"dtype": []}},
        {"image": PLACE | {"shape": 2}},
        {"image": PLACE | {"shape": [-2]}},
        {"image": PLACE | {"shape": ["2"]}},
        {"image": PLACE | {"data_offsets": [0]}},
        {"image": PLACE | {"data_offsets": [-4, 0]}},
        {"image": PLACE, "__metadata__": [1]},
        {"image": PLACE, "__metadata__": {"format": 1}},
    ],
)
def test_a_header_of_tensors_that_makes_no_sense_is_one_error(tmp_path: Path, header: Any) -> None:
    path, text = tmp_path / "a.safetensors", json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    with pytest.raises(InputError, match=r"a\.safetensors"):
        read_tensors(str(path))


def test_a_row_that_has_no_direction_is_named() -> None:
    rows = np.eye(5, 8).astype(np.float16)
    check_points(rows, np.ones(5, bool), where="a")
    for bad in (np.nan, np.inf, -np.inf, 0):
        wrong = rows.copy()
        wrong[3, 3] = bad
        check_points(wrong, np.arange(5) != 3, where="a")
        with pytest.raises(InputError, match=r"^a, row 3: not a finite unit vector"):
            check_points(wrong, np.ones(5, bool), where="a")


def test_a_column_that_python_cannot_hold_costs_no_row(tmp_path: Path) -> None:
    image = encoded(picture(1))
    table = pa.table({"image": [image], "caption": ["one"], "when": pa.array([1], pa.duration("ns")), "n": [7]})
    pq.write_table(table.set_column(2, "when", pa.array([1], pa.timestamp("ns"))), tmp_path / "a.parquet")
    shard = open_shard(str(tmp_path / "a.parquet"))
    (entry,) = shard.index()
    sample = shard.read(entry.offset, entry.size)
    assert (sample.image, sample.caption, sample.meta["n"]) == (image, "one", 7)


def test_a_damaged_row_group_costs_its_own_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    images = [encoded(picture(number)) for number in range(4)]
    pq.write_table(pa.table({"image": images, "caption": list("abcd")}), path, row_group_size=2, compression="zstd")
    content = bytearray(path.read_bytes())
    content[4:24] = b"\xff" * 20  # the header of the first page
    path.write_bytes(bytes(content))
    shard, found = open_shard(str(path)), []
    for entry in shard.index():
        try:
            found.append(shard.read(entry.offset, entry.size).caption)
        except BadSample as bad:
            found.append(bad.reason)
    assert found == ["damaged row group", "damaged row group", "c", "d"]


def test_an_image_column_of_text_is_no_image_column(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [{"bytes": "text"}], "caption": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match="no column of image bytes"):
        open_shard(str(tmp_path / "a.parquet")).index()


def test_a_row_table_without_its_words_is_one_error(tmp_path: Path) -> None:
    table = pa.table({"x": [1]}).replace_schema_metadata({"distilclip.format": "1", "num_rows": "many"})
    pq.write_table(table, tmp_path / "000000.rows.parquet")
    with pytest.raises(InputError, match=r"000000\.rows\.parquet is no complete Parquet file"):
        finished_shard(str(tmp_path), 0)


@pytest.mark.parametrize("name", ["config.json", "recipe.toml", "list.json", "deep.json", "stage.json"])
def test_a_file_of_settings_that_is_none_is_one_error(tmp_path: Path, name: str) -> None:
    contents = {"list.json": b"[1]", "deep.json": b"[" * 100_000, "stage.json": b'{"stage": true}'}
    (tmp_path / name).write_bytes(contents.get(name, b"\x80\x04\x95"))
    readers = [config.read_recipe]
    readers += [] if name in ("recipe.toml", "stage.json") else [stage_folder.read_json]
    for read in readers:
        with pytest.raises(InputError, match=name) as found:
            read(str(tmp_path / name))
        failure = failures.explain(found.value)
        assert failure is not None
        assert "\n" not in failure.text


def test_arrays_that_are_none_are_one_error(tmp_path: Path) -> None:
    places = RowPlaces(
        shard=np.zeros(1, np.uint32),
        row=np.zeros(1, np.uint32),
        key=pa.array(["a"], pa.large_string()),
        num_rows=np.ones(1, int),
    )
    np.savez(tmp_path / "several.npz", x=np.ones(1))
    several = (tmp_path / "several.npz").read_bytes()
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    for content in (b"", b"x", several, (tmp_path / "objects.npy").read_bytes()):
        (tmp_path / "a.npy").write_bytes(content)
        with pytest.raises(InputError, match=r"a\.npy"):
            read_row_weights(str(tmp_path / "a.npy"), places)
        (tmp_path / "b.npy").write_bytes(content)
        read_subset.cache_clear()
        with pytest.raises(InputError, match=r"b\.npy"):
            read_subset(str(tmp_path / "b.npy"))


def test_verify_names_a_record_that_is_no_object(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"stage": "embed"}))
    (tmp_path / "inputs.json").write_text("[1]")
    (found,) = check_folders(str(tmp_path))
    assert any("inputs.json is no valid JSON (a list and no object)" in fault.text for fault in found.faults)
