"""The weight of every row, from each form of side file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distilclip.data.side_files import WeightedRows, write_weights
from distilclip.errors import InputError
from distilclip.row_weights import RowPlaces, read_row_weights, weights_path

# Rows 1, 2 of a shard of three, and rows 0, 3 of a shard of four: their weights are 11, 12, 20, 23.
PLACES = RowPlaces(
    shard=np.array([0, 0, 1, 1], np.uint32),
    row=np.array([1, 2, 0, 3], np.uint32),
    key=pa.array(["a1", "a2", "b0", "b3"], pa.large_string()),
    num_rows=np.array([3, 4]),
)
SHARD, ROW = np.array([0] * 3 + [1] * 4), np.array([0, 1, 2, 0, 1, 2, 3])
KEY = [f"{'ab'[shard]}{row}" for shard, row in zip(SHARD, ROW, strict=True)]
WEIGHT = 10.0 * (SHARD + 1) + ROW
EXPECTED = [11.0, 12.0, 20.0, 23.0]


def table(path: Path | str, **columns: Any) -> str:
    with fsspec.open(str(path), "wb") as file:
        pq.write_table(pa.table(columns), file)
    return str(path)


@pytest.mark.parametrize("remote", [False, True])
def test_a_folder_has_a_file_for_each_shard(tmp_path: Path, remote: bool) -> None:
    folder = "memory://weights" if remote else str(tmp_path)
    for shard in range(2):
        own = shard == SHARD
        write_weights(folder, shard, WeightedRows(ROW[own].astype(np.uint32), WEIGHT[own]))
    assert read_row_weights(folder, PLACES).tolist() == EXPECTED


def test_a_table_names_rows_by_shard_and_row_or_by_key_or_has_all_in_order(tmp_path: Path) -> None:
    mixed = np.random.default_rng(0).permutation(7)
    by_row = table(tmp_path / "row.parquet", shard=SHARD[mixed], row=ROW[mixed], weight=WEIGHT[mixed])
    keys = [KEY[at] for at in mixed]
    by_key = table(tmp_path / "key.parquet", key=keys, weight=WEIGHT[mixed].astype(np.float32))
    both = table(tmp_path / "both.parquet", key=keys, shard=SHARD[mixed], row=ROW[mixed], weight=WEIGHT[mixed])
    in_order = table(tmp_path / "order.parquet", weight=WEIGHT.astype(np.int32))
    np.save(tmp_path / "order.npy", WEIGHT.astype(np.float16))
    for path in (by_row, by_key, both, in_order, str(tmp_path / "order.npy")):
        assert read_row_weights(path, PLACES).tolist() == EXPECTED, path


def test_the_column_may_have_any_name_and_extra_rows_do_no_harm(tmp_path: Path) -> None:
    path = table(tmp_path / "a.parquet", key=[*KEY, "other"], score=[*WEIGHT, np.nan], weight=[0.0] * 8)
    assert read_row_weights(path, PLACES, column="score").tolist() == EXPECTED
    with pytest.raises(InputError, match=r"a\.parquet has no column 'scor'.*score.*--row-weights-column"):
        read_row_weights(path, PLACES, column="scor")


def test_a_row_needs_a_weight_that_is_one(tmp_path: Path) -> None:
    for value, said in ((-1.0, "the weight -1"), (np.nan, "no weight"), (np.inf, "the weight inf")):
        weights = np.where(np.arange(7) == 3, value, WEIGHT)
        path = table(tmp_path / "a.parquet", weight=weights)
        with pytest.raises(InputError, match=rf"a\.parquet: row 0 of shard 1 \(b0\) has {said}.*finite and at least 0"):
            read_row_weights(path, PLACES)
    path = table(tmp_path / "a.parquet", key=KEY[:-1], weight=WEIGHT[:-1])
    with pytest.raises(InputError, match=r"row 3 of shard 1 \(b3\) has no weight"):
        read_row_weights(path, PLACES)
    write_weights(str(tmp_path), 0, WeightedRows(np.array([1], np.uint32), np.ones(1)))
    with pytest.raises(InputError, match=r"weights/000000\.parquet: row 2 \(a2\) has no weight"):
        read_row_weights(str(tmp_path), PLACES)


def test_weights_for_other_data_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has 6 weights where the data have 7 rows"):
        read_row_weights(table(tmp_path / "a.parquet", weight=WEIGHT[:-1]), PLACES)
    path = table(tmp_path / "a.parquet", shard=SHARD, row=ROW + 1, weight=WEIGHT)
    with pytest.raises(InputError, match=r"has a weight for row 3 of shard 0, which the data have not"):
        read_row_weights(path, PLACES)
    keys = [key.upper() for key in KEY]
    path = table(tmp_path / "a.parquet", shard=SHARD, row=ROW, key=keys, weight=WEIGHT)
    with pytest.raises(InputError, match=r"row 1 of shard 0 \(a1\) has the key A1 there. .* for other data"):
        read_row_weights(path, PLACES)
    write_weights(str(tmp_path), 0, WeightedRows(ROW[:3].astype(np.uint32), WEIGHT[:3]))
    with pytest.raises(InputError, match=rf"{weights_path(str(tmp_path), 1)} is missing"):
        read_row_weights(str(tmp_path), PLACES)


def test_a_name_that_means_two_rows_is_refused(tmp_path: Path) -> None:
    path = table(tmp_path / "a.parquet", shard=[0, 0], row=[1, 1], weight=[1.0, 2.0])
    with pytest.raises(InputError, match=r"a\.parquet has a row twice"):
        read_row_weights(path, PLACES)
    with pytest.raises(InputError, match=r"a key occurs twice in .*a\.parquet"):
        read_row_weights(table(tmp_path / "a.parquet", key=["a1", "a1"], weight=[1.0, 2.0]), PLACES)
    twice = RowPlaces(**{**vars(PLACES), "key": pa.array(["x", "x", "y", "z"], pa.large_string())})
    with pytest.raises(InputError, match=r"a key occurs twice in the data. Name them by the columns shard and row"):
        read_row_weights(table(tmp_path / "a.parquet", key=["x", "y", "z"], weight=[1.0, 2.0, 3.0]), twice)
    with pytest.raises(InputError, match=r"a column row and no column shard, and the data are 2 shards"):
        read_row_weights(table(tmp_path / "a.parquet", row=[0], weight=[1.0]), PLACES)


def test_files_that_hold_no_weights_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"no Parquet")
    (tmp_path / "a.npy").write_bytes(b"no array")
    np.save(tmp_path / "b.npy", np.ones((7, 2)))
    cases = {
        "a.parquet": "is no complete Parquet file",
        "a.npy": r"is no \.npy file of numbers",
        "b.npy": r"holds float64 of shape \(7, 2\)",
        "a.csv": r"is no folder, no \.parquet and no \.npy",
        table(tmp_path / "text.parquet", weight=["much"] * 7): "the column 'weight' holds string, not double",
        table(tmp_path / "zero.parquet", weight=[0.0] * 7): "all weights are 0, so there is nothing to train on",
    }
    for name, said in cases.items():
        with pytest.raises(InputError, match=said):
            read_row_weights(str(tmp_path / name), PLACES)
