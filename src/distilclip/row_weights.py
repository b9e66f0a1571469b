"""Read the weight of every row that is trained on from a side file: by shard and row, by key, or in order."""

from __future__ import annotations

import functools
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Float64, Int64, UInt32

from distilclip import files
from distilclip.errors import InputError, did_you_mean

_PLACE_COLUMNS = ("shard", "row", "key")


@dataclass(frozen=True, kw_only=True)
class RowPlaces:
    """The n rows whose weights are wanted, ascending by (shard, row).

    `num_rows` are those of each shard, the unusable ones and those that are not kept included.
    """

    shard: UInt32[np.ndarray, " n"]
    row: UInt32[np.ndarray, " n"]
    key: pa.LargeStringArray
    num_rows: Int64[np.ndarray, " shards"]

    def __len__(self) -> int:
        return len(self.row)

    def describe(self, at: int) -> str:
        """Say which row stands at a place; the file of a single shard names the shard itself."""
        shard = f" of shard {self.shard[at]}" if len(self.num_rows) > 1 else ""
        return f"row {self.row[at]}{shard} ({self.key[at]})"

    def of_shard(self, shard: int) -> RowPlaces:
        """Return the rows of one shard, as of the only one."""
        first, last = np.searchsorted(self.shard, [shard, shard + 1]).tolist()
        return RowPlaces(
            shard=np.zeros(last - first, np.uint32),
            row=self.row[first:last],
            key=self.key[first:last],
            num_rows=self.num_rows[shard : shard + 1],
        )


def weights_path(folder: str, shard: int) -> str:
    """Return the path of the weights of a shard in a folder of weights."""
    return files.join(folder, weights_name(shard))


def weights_name(shard: int) -> str:
    """Return the name of the weights of a shard within such a folder."""
    return f"weights/{shard:06d}.parquet"


def read_row_weights(path: str, places: RowPlaces, *, column: str = "weight") -> Float64[np.ndarray, " n"]:
    """Read the weights of n rows from a folder of Parquet files, one a shard, from one Parquet file, or from a .npy.

    A table names its rows by `row` (of all shards: `shard` and `row`) or by `key`; one that has neither, and a .npy,
    have a value for every row of the shards in order. Where a table has `row` and `key`, keys are compared.

    Raises:
        InputError: a row has no weight, or one that is negative or infinite; all weights are 0; the file has another
            form, another number of rows, a row twice, or another key for it.
    """
    if files.is_folder(path):
        read = functools.partial(_read_shard, path, places, column)
        with ThreadPoolExecutor(16) as pool:  # each shard of a remote folder takes a few requests
            weights = np.concatenate(list(pool.map(read, range(len(places.num_rows)))))
    else:
        weights = _check_weights(read_row_values(path, places, column=column), places, path)
    if not weights.any():
        raise InputError(f"{path}: all weights are 0, so there is nothing to train on. Give some rows more.")
    return weights


def read_row_values(path: str, places: RowPlaces, *, column: str) -> Float64[np.ndarray, " n"]:
    """Read a number of each of n rows from one Parquet file or a .npy, as `read_row_weights`; NaN where it has none."""
    if not path.endswith((".npy", ".parquet")):
        raise InputError(f"{path} is no folder, no .parquet and no .npy. Give one of these; docs/formats.md says more.")
    table = _read_array(path) if path.endswith(".npy") else _read_table(path, column)
    found = _find(table, places, path)
    return np.append(table["weight"].to_numpy(), np.nan)[found]  # -1, not found, is the NaN at the end


def _read_shard(folder: str, places: RowPlaces, column: str, shard: int) -> Float64[np.ndarray, " m"]:
    own, path = places.of_shard(shard), weights_path(folder, shard)
    if not len(own):
        return np.empty(0)
    if not files.exists(path):
        raise InputError(f"{path} is missing: a folder of weights has such a file for every shard that is trained on.")
    return _check_weights(read_row_values(path, own, column=column), own, path)


def _check_weights(weights: Float64[np.ndarray, " n"], places: RowPlaces, path: str) -> Float64[np.ndarray, " n"]:
    """Return the weights, once each is one."""
    wrong = ~((weights >= 0) & (weights < np.inf))
    if wrong.any():
        at = int(np.argmax(wrong))
        said = "no weight" if np.isnan(weights[at]) else f"the weight {weights[at]:g}"
        raise InputError(
            f"{path}: {places.describe(at)} has {said}. Every row that is trained on needs one that is finite and at "
            "least 0; 0 leaves it out."
        )
    return weights


def _read_array(path: str) -> pa.Table:
    try:
        with files.open_read(path) as file:
            values = np.load(file, allow_pickle=False)
    except (ValueError, EOFError, MemoryError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} is no .npy file of numbers ({error}). Write it with `numpy.save`.") from error
    if not isinstance(values, np.ndarray):
        raise InputError(f"{path} holds several arrays, as `numpy.savez` writes. Write one with `numpy.save`.")
    if values.ndim != 1 or values.dtype.kind not in "fiub":
        raise InputError(f"{path} holds {values.dtype} of shape {values.shape}; weights are one number for each row.")
    return pa.table({"weight": pa.array(values.astype(np.float64))})


def _read_table(path: str, column: str) -> pa.Table:
    """Return the weights as `weight`, with those of the columns `shard`, `row` and `key` that there are."""
    try:
        with files.open_read(path) as source:
            file = pq.ParquetFile(source)
            names = file.schema_arrow.names
            if column not in names:
                raise InputError(
                    f"{path} has no column {column!r}. {did_you_mean(column, names)} Say which one with "
                    "--row-weights-column."
                )
            table = file.read(columns=[name for name in _PLACE_COLUMNS if name in names and name != column] + [column])
    except pa.ArrowInvalid as error:
        raise InputError(f"{path} is no complete Parquet file ({error}). Write it again.") from error
    kinds = {"shard": pa.int64(), "row": pa.int64(), "key": pa.large_string(), column: pa.float64()}
    columns = {}
    for name in table.column_names:
        try:
            cast = table[name].cast(kinds[name]).combine_chunks()
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise InputError(f"{path}: the column {name!r} holds {table[name].type}, not {kinds[name]}.") from error
        columns["weight" if name == column else name] = cast
    return pa.table(columns)


def _find(table: pa.Table, places: RowPlaces, path: str) -> Int64[np.ndarray, " n"]:
    """Return the line of the table for each row, -1 where it has none."""
    names, total = table.column_names, int(places.num_rows.sum())
    starts = np.cumsum(places.num_rows) - places.num_rows
    position = starts[places.shard] + places.row
    if "row" in names:
        lines = np.full(total, -1)
        lines[_positions(table, places, starts, path)] = np.arange(len(table))
        found = lines[position]
        if "key" in names:
            _check_keys(table["key"], places, found, path)
        return found
    if "key" in names:
        for keys, where in ((table["key"], path), (places.key, "the data")):
            if pc.count_distinct(keys).as_py() < len(keys):
                raise InputError(
                    f"{path} names rows by key, and a key occurs twice in {where}. Name them by the columns shard and "
                    "row, counted from 0."
                )
        lines = pc.index_in(places.key, value_set=table["key"].combine_chunks())
        return lines.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
    if len(table) != total:
        raise InputError(
            f"{path} has {len(table)} weights where the data have {total} rows. Give every row one, in the order of "
            "the files, also rows that are unusable or not kept; or name the rows by columns shard and row, or key."
        )
    return position


def _positions(
    table: pa.Table, places: RowPlaces, starts: Int64[np.ndarray, " shards"], path: str
) -> Int64[np.ndarray, " lines"]:
    """Return the position that each line of the table names, counted through the shards."""
    if "shard" not in table.column_names and len(starts) > 1:
        raise InputError(f"{path} has a column row and no column shard, and the data are {len(starts)} shards. Add it.")
    row = table["row"].to_numpy()
    shard = table["shard"].to_numpy() if len(starts) > 1 else np.zeros_like(row)
    is_there = (shard >= 0) & (shard < len(starts)) & (row >= 0)
    is_there &= row < places.num_rows[np.where(is_there, shard, 0).astype(np.int64)]
    if not is_there.all():
        at = int(np.argmin(is_there))
        raise InputError(
            f"{path} has a weight for row {row[at]} of shard {shard[at]}, which the data have not. The weights were "
            "made for other data."
        )
    positions = starts[shard] + row
    if len(np.unique(positions)) < len(positions):
        raise InputError(f"{path} has a row twice. Give every row one weight.")
    return positions


def _check_keys(keys: pa.ChunkedArray, places: RowPlaces, found: Int64[np.ndarray, " n"], path: str) -> None:
    """Raise `InputError` where the table has another key for a row than the data."""
    rows = np.flatnonzero(found >= 0)
    theirs, own = keys.take(pa.array(found[rows])).combine_chunks(), places.key.take(pa.array(rows))
    is_same = pc.equal(theirs, own).fill_null(False).to_numpy(zero_copy_only=False)
    if not is_same.all():
        at = int(np.argmin(is_same))
        raise InputError(
            f"{path}: {places.describe(int(rows[at]))} has the key {theirs[at]} there. The weights were made for other "
            "data."
        )
