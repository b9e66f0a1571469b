"""Write and read what later stages say about the rows of a store: groups, labels, weights, forest and centers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float32, Float64, UInt32, UInt64

from distilclip import digests, files
from distilclip.data.columns import FORMAT_VERSION, read_columns, write_columns
from distilclip.data.store import Store
from distilclip.data.tensors import read_metadata, read_tensors, write_tensors
from distilclip.errors import InputError, other_version
from distilclip.row_weights import weights_name, weights_path

GROUPS_SCHEMA = pa.schema(
    [
        ("row", pa.uint32()),
        ("group", pa.uint64()),
        ("representative", pa.uint64()),
        ("distance", pa.float32()),
        ("keep", pa.bool_()),
    ]
)
LABELS_SCHEMA = pa.schema([("row", pa.uint32()), ("cluster", pa.uint32()), ("distance", pa.float32())])
WEIGHTS_SCHEMA = pa.schema([("row", pa.uint32()), ("weight", pa.float64())])
SCORES_SCHEMA = pa.schema([("row", pa.uint32()), ("score", pa.float32())])
FOREST_SCHEMA = pa.schema([("left", pa.uint64()), ("right", pa.uint64()), ("distance", pa.float32())])

FOREST_FILE, CENTERS_FILE = "forest.parquet", "centers.safetensors"


@dataclass(frozen=True)
class Groups:
    """The rows of one shard that were grouped, ascending: each one's group, its representative, whether it is kept.

    `representative` is a sample id, `distance` that to it.
    """

    row: UInt32[np.ndarray, " n"]
    group: UInt64[np.ndarray, " n"]
    representative: UInt64[np.ndarray, " n"]
    distance: Float32[np.ndarray, " n"]
    keep: Bool[np.ndarray, " n"]


@dataclass(frozen=True)
class Scores:
    """The rows of one shard that `select` scored, ascending, and their scores."""

    row: UInt32[np.ndarray, " n"]
    score: Float32[np.ndarray, " n"]


@dataclass(frozen=True)
class Labels:
    """The kept rows of one shard, ascending: each one's cluster and the distance to its center."""

    row: UInt32[np.ndarray, " n"]
    cluster: UInt32[np.ndarray, " n"]
    distance: Float32[np.ndarray, " n"]


@dataclass(frozen=True)
class WeightedRows:
    """Rows of one shard, ascending, and how often each is drawn in training: twice the weight, twice as often."""

    row: UInt32[np.ndarray, " n"]
    weight: Float64[np.ndarray, " n"]


@dataclass(frozen=True)
class ForestEdges:
    """The edges of a spanning forest of sample ids, left < right."""

    left: UInt64[np.ndarray, " m"]
    right: UInt64[np.ndarray, " m"]
    distance: Float32[np.ndarray, " m"]


def groups_path(folder: str, shard: int) -> str:
    """Return the path of the groups of a shard in a balance folder."""
    return files.join(folder, groups_name(shard))


def groups_name(shard: int) -> str:
    """Return the name of the groups of a shard within a balance folder."""
    return f"groups/{shard:06d}.parquet"


def labels_path(folder: str, shard: int) -> str:
    """Return the path of the labels of a shard in a cluster folder."""
    return files.join(folder, labels_name(shard))


def labels_name(shard: int) -> str:
    """Return the name of the labels of a shard within a cluster folder."""
    return f"labels/{shard:06d}.parquet"


def write_groups(folder: str, shard: int, groups: Groups) -> None:
    """Write the groups of a shard into a balance folder."""
    _write(groups_path(folder, shard), GROUPS_SCHEMA, vars(groups))


def read_groups(folder: str, shard: int) -> Groups:
    """Read the groups of a shard from a balance folder."""
    _check(folder, groups_name(shard), stage="balance")
    return Groups(**_read(groups_path(folder, shard), GROUPS_SCHEMA))


def kept_rows(store: Store, shard: int, valid: Bool[np.ndarray, " r"], groups: str | None) -> Bool[np.ndarray, " r"]:
    """Return which of the r rows of a shard are valid and kept by `groups`, a folder of `balance` or `select`.

    These are the rows to cluster, to train on and to export. Without `groups` all valid rows are kept. `valid` is that
    column of the shard's row table. A row that `groups` does not list was not kept by what it was made from.

    Raises:
        InputError: the groups were made for another store.
    """
    if groups is None:
        return valid
    table = read_groups(groups, shard)
    if not np.isin(table.row, np.flatnonzero(valid), assume_unique=True).all():
        raise InputError(
            f"{groups}: the rows of shard {shard} are no valid rows of the store {store.path}; these groups were "
            "made for another store. Run `distilclip balance` on this one."
        )
    keep = np.zeros(len(valid), bool)
    keep[table.row[table.keep]] = True
    return keep


def kept_images(store: Store, shard: int, groups: str | None) -> Bool[np.ndarray, " r"]:
    """Return which of the r rows of a shard have a picture and are kept by `groups`; errors as in `kept_rows`."""
    table = store.columns(shard, "valid", "has_image")
    kept = kept_rows(store, shard, table["valid"].to_numpy(), groups)
    return kept & table["has_image"].to_numpy()


def rows_kept_by_all(store: Store, shard: int, groups: Sequence[str]) -> Bool[np.ndarray, " r"]:
    """Return which of the r rows of a shard are valid and kept by every one of some folders, as `kept_rows` does."""
    valid = store.columns(shard, "valid")["valid"].to_numpy()
    return np.logical_and.reduce([valid, *(kept_rows(store, shard, valid, folder) for folder in groups)])


def scores_name(shard: int) -> str:
    """Return the name of the scores of a shard in a folder of `select`."""
    return f"scores/{shard:06d}.parquet"


def write_scores(folder: str, shard: int, scores: Scores) -> None:
    """Write the scores of a shard into a folder of `select`."""
    _write(files.join(folder, scores_name(shard)), SCORES_SCHEMA, vars(scores))


def read_scores(folder: str, shard: int) -> Scores:
    """Read the scores of a shard from a folder of `select`."""
    _check(folder, scores_name(shard), stage="select")
    return Scores(**_read(files.join(folder, scores_name(shard)), SCORES_SCHEMA))


def write_labels(folder: str, shard: int, labels: Labels) -> None:
    """Write the labels of a shard into a cluster folder."""
    _write(labels_path(folder, shard), LABELS_SCHEMA, vars(labels))


def read_labels(folder: str, shard: int) -> Labels:
    """Read the labels of a shard from a cluster folder."""
    _check(folder, labels_name(shard), stage="cluster")
    return Labels(**_read(labels_path(folder, shard), LABELS_SCHEMA))


def write_weights(folder: str, shard: int, weights: WeightedRows) -> None:
    """Write the weights of a shard into a folder of weights, for `train --row-weights`."""
    _write(weights_path(folder, shard), WEIGHTS_SCHEMA, vars(weights))


def read_weights(folder: str, shard: int) -> WeightedRows:
    """Read the weights of a shard from a folder of `weigh`."""
    _check(folder, weights_name(shard), stage="weigh")
    return WeightedRows(**_read(weights_path(folder, shard), WEIGHTS_SCHEMA))


def write_forest(folder: str, forest: ForestEdges) -> None:
    """Write the spanning forest into a balance folder."""
    write_edges(files.join(folder, FOREST_FILE), forest)


def read_forest(folder: str) -> ForestEdges:
    """Read the spanning forest of a balance folder."""
    return read_edges(files.join(folder, FOREST_FILE))


def write_edges(path: str, forest: ForestEdges) -> None:
    """Write the edges of a forest, whole or of a part of the search."""
    _write(path, FOREST_SCHEMA, vars(forest))


def read_edges(path: str) -> ForestEdges:
    """Read edges that `write_edges` wrote."""
    folder, _, name = path.rpartition("/")
    _check(folder or ".", name, stage="balance")
    return ForestEdges(**_read(path, FOREST_SCHEMA))


def write_centers(folder: str, centers: Float32[np.ndarray, "k dim"], metadata: Mapping[str, str] | None = None) -> str:
    """Write unit centers into a cluster folder; return the SHA-256 of the file."""
    path = files.join(folder, CENTERS_FILE)
    return write_tensors(path, {"centers": centers}, {"format": FORMAT_VERSION, **(metadata or {})}).sha256


def read_centers(folder: str) -> Float32[np.ndarray, "k dim"]:
    """Read the centers of a cluster folder. Raises `InputError` where they are not finite unit vectors."""
    path = files.join(folder, CENTERS_FILE)
    if not files.exists(path):
        raise InputError(f"{path} is missing: run `distilclip cluster --out {folder}` first.")
    _check(folder, CENTERS_FILE, stage="cluster")
    version, centers = read_metadata(path).get("format"), read_tensors(path).get("centers")
    if version != FORMAT_VERSION:
        raise other_version(path, version, known=FORMAT_VERSION)
    if centers is None or centers.ndim != 2:
        raise InputError(f"{path} holds no centers: run `distilclip cluster` again.")
    lengths = np.linalg.norm(centers, axis=1)
    wrong = ~(np.abs(lengths - 1) < 1e-4)  # ~(<), so that NaN is wrong too
    if wrong.any():
        raise InputError(f"{path}: center {int(np.argmax(wrong))} is no unit vector. Run `distilclip cluster` again.")
    return centers


def _check(folder: str, name: str, *, stage: str) -> None:
    digests.check_file(folder, name, remedy=digests.repair_with(folder, stage))


def _write(path: str, schema: pa.Schema, columns: Mapping[str, np.ndarray]) -> None:
    rows = columns.get("row")
    assert rows is None or (np.diff(rows.astype(np.int64)) > 0).all(), "rows ascend"
    write_columns(path, schema, columns)


def _read(path: str, schema: pa.Schema) -> dict[str, np.ndarray]:
    table = read_columns(path, schema)
    return {name: table.column(name).to_numpy() for name in schema.names}
