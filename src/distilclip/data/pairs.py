"""List the pairs to train on: the valid, kept rows of all shards, with their place in the shard and their cluster."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float64, Int32, Int64, UInt32, UInt64

from distilclip import files
from distilclip.csv_rows import CsvColumns
from distilclip.data.bad_samples import ErrorPolicy
from distilclip.data.samples import BadSample
from distilclip.data.shards import EMBEDDING_SUFFIXES, assert_key, find_shards, open_shard, source_size
from distilclip.data.side_files import kept_rows, read_groups, read_labels
from distilclip.data.store import Rows, Store, check_unchanged, sample_id
from distilclip.errors import InputError
from distilclip.mixture import DataPart, Weighting
from distilclip.row_weights import RowPlaces, read_row_weights


@dataclass(frozen=True)
class PairTable:
    """The n rows to train on, in the order of (shard, row).

    `key` stays in Arrow, since forked processes would copy n Python strings one by one. `offset` and `size` are those
    of the shard's index; `cluster` is None where no clusters are joined. `num_rows` are those of each shard, unusable
    ones included. `columns` is what CSV files do not tell themselves. `image_digest` is the beginning of the SHA-256
    of each picture when it was embedded, as `digest_beginnings` gives it; None without a store. `has_image` and
    `has_text` are None where every row has both.
    """

    uris: list[str]
    num_rows: Int64[np.ndarray, " shards"]
    shard: UInt32[np.ndarray, " n"]
    row: UInt32[np.ndarray, " n"]
    offset: UInt64[np.ndarray, " n"]
    size: UInt32[np.ndarray, " n"]
    key: pa.LargeStringArray
    cluster: Int32[np.ndarray, " n"] | None
    columns: CsvColumns | None = None
    image_digest: UInt64[np.ndarray, " n"] | None = None
    has_image: Bool[np.ndarray, " n"] | None = None
    has_text: Bool[np.ndarray, " n"] | None = None

    def __len__(self) -> int:
        return len(self.row)

    def ids(self, rows: Int64[np.ndarray, " m"]) -> UInt64[np.ndarray, " m"]:
        """Return the sample ids of rows of this table."""
        return sample_id(self.shard[rows], self.row[rows])

    def take(self, rows: Int64[np.ndarray, " m"]) -> PairTable:
        """Return the table of these rows, in this order."""
        columns = {name: getattr(self, name)[rows] for name in ("shard", "row", "offset", "size")}
        joined = {name: getattr(self, name) for name in ("cluster", "image_digest", "has_image", "has_text")}
        columns |= {name: None if values is None else values[rows] for name, values in joined.items()}
        return dataclasses.replace(self, **columns, key=self.key.take(pa.array(rows)))

    def keep(self, mask: Bool[np.ndarray, " n"]) -> PairTable:
        """Return the table with some of its rows."""
        return self.take(np.flatnonzero(mask))


@dataclass(frozen=True)
class Index:
    """Where the n rows of a shard lie: the columns of its row table that training needs, keys in Arrow."""

    key: pa.StringArray
    offset: UInt64[np.ndarray, " n"]
    size: UInt32[np.ndarray, " n"]
    valid: Bool[np.ndarray, " n"]
    has_image: Bool[np.ndarray, " n"]
    has_text: Bool[np.ndarray, " n"]
    image_digest: UInt64[np.ndarray, " n"]

    @classmethod
    def read(cls, store: Store, shard: int) -> Index:
        """Read the index of a shard."""
        numbers = ("offset", "size", "valid", "has_image", "has_text")
        table = store.columns(shard, "key", *numbers, "image_sha256")
        return cls(
            key=table["key"].combine_chunks(),
            **{name: table[name].to_numpy() for name in numbers},
            image_digest=digest_beginnings(table["image_sha256"]),
        )


def digest_beginnings(image_sha256: pa.ChunkedArray) -> UInt64[np.ndarray, " n"]:
    """Return the first 8 bytes of each digest as one number, 0 where there is none: a quarter of the memory.

    By chance two pictures have the same with a probability of 5e-20.
    """
    whole = image_sha256.combine_chunks().fill_null(bytes(32))
    numbers = np.frombuffer(whole.buffers()[1], "<u8").reshape(-1, 4)
    return numbers[whole.offset : whole.offset + len(whole), 0].copy()


def assert_image(image: bytes | None, digest: int, *, where: str) -> None:
    """Raise `InputError` where a picture is not the one that was embedded; `digest` is 0 where that is not known."""
    if image is not None and digest and int.from_bytes(hashlib.sha256(image).digest()[:8], "little") != digest:
        raise InputError(
            f"{where}: its picture is not the one that was embedded (SHA-256 differs). Give the files that were "
            "embedded (--data), or embed these into another folder."
        )


def join_stores(
    stores: Sequence[Store], *, data: Sequence[str] = (), groups: str | None = None, clusters: str | None = None
) -> PairTable:
    """List the rows that are valid in every store and kept by `groups`, with the labels of `clusters` (-1: none).

    A row has what it has in every store, and something at least. The stores are of the same shards, by several
    teachers; groups and clusters are the first one's. `data` says where the shards lie now, in the order of the
    manifest, if not where they were embedded.

    Raises:
        InputError: a shard is missing or not the file that was embedded; stores, groups or clusters do not fit.
    """
    store = stores[0]
    for each in stores:
        each.require_pictures()
    uris = source_uris(store, data)
    for other in stores[1:]:
        _check_same_rows(store, other)

    def join(shard: int) -> _Part:
        rows = Index.read(store, shard)
        check_source(store, shard, uris[shard], rows)
        keep = kept_rows(store, shard, rows.valid, groups)
        sides = {"has_image": rows.has_image, "has_text": rows.has_text}
        for other in stores[1:]:
            table = other.columns(shard, *sides)
            sides = {name: has & table[name].to_numpy() for name, has in sides.items()}
        keep = keep & (sides["has_image"] | sides["has_text"])
        cluster = None if clusters is None else clusters_of_rows(clusters, shard, keep)
        part = _part(rows.key, rows.offset, rows.size, keep, cluster)
        has_image, has_text = (has[keep] for has in sides.values())
        return dataclasses.replace(part, image_digest=rows.image_digest[keep], has_image=has_image, has_text=has_text)

    with ThreadPoolExecutor(16) as pool:  # each shard of a remote store takes a few requests
        return _table(uris, list(pool.map(join, range(store.num_shards))), store.csv_columns)


def source_uris(store: Store, data: Sequence[str]) -> list[str]:
    """Return where the shards of a store lie: as `data` says, or where they were embedded.

    Raises `InputError` where `data` are more or fewer files.
    """
    uris = list(data) or [shard.uri for shard in store.shards]
    if len(uris) != store.num_shards:
        raise InputError(
            f"The data are {len(uris)} files, but the store {store.path} was made from {store.num_shards}, "
            f"{store.shards[0].uri} first. Give the same files in the same order."
        )
    return uris


def _check_same_rows(store: Store, other: Store) -> None:
    """Raise `InputError` unless the shards of both stores hold the same keys in the same order."""
    if [shard.key_digest for shard in store.shards] != [shard.key_digest for shard in other.shards]:
        raise InputError(
            f"{other.path} and {store.path} were not made from the same shards in the same order. Embed the same "
            "--data with both teachers."
        )


def index_pairs(data: Sequence[str], *, policy: ErrorPolicy, columns: CsvColumns | None = None) -> PairTable:
    """List the usable samples of shards that have no store; the unusable ones are counted by `policy`.

    `columns` says of CSV files what their first lines do not tell.

    Raises:
        InputError: a shard cannot be read, or `policy` has had enough.
    """
    parts = []
    for uri in data:
        shard = open_shard(uri, columns)
        entries = shard.index()
        shard.close()
        policy.seen(len(entries))
        for entry in entries:
            if entry.error:
                policy.bad(entry.error, where=f"{uri}: {entry.key}")
        policy.check()
        offset = np.array([entry.offset for entry in entries], np.uint64)
        size = np.array([entry.size for entry in entries], np.uint32)
        usable = np.array([not entry.error for entry in entries])
        parts.append(_part(pa.array([entry.key for entry in entries]), offset, size, usable, None))
    return _table(list(data), parts, columns)


@dataclass(frozen=True)
class _Part:
    """The rows of the table that come from one shard, which has `num_rows` in all."""

    num_rows: int
    row: UInt32[np.ndarray, " n"]
    offset: UInt64[np.ndarray, " n"]
    size: UInt32[np.ndarray, " n"]
    key: pa.LargeStringArray
    cluster: Int32[np.ndarray, " n"] | None
    image_digest: UInt64[np.ndarray, " n"] | None = None
    has_image: Bool[np.ndarray, " n"] | None = None
    has_text: Bool[np.ndarray, " n"] | None = None


def _part(
    key: pa.StringArray,
    offset: UInt64[np.ndarray, " r"],
    size: UInt32[np.ndarray, " r"],
    keep: Bool[np.ndarray, " r"],
    cluster: Int32[np.ndarray, " n"] | None,
) -> _Part:
    row = np.flatnonzero(keep).astype(np.uint32)
    return _Part(len(keep), row, offset[keep], size[keep], key.filter(pa.array(keep)).cast(pa.large_string()), cluster)


def _table(uris: list[str], parts: list[_Part], columns: CsvColumns | None) -> PairTable:
    joined: dict[str, Any] = {}
    for name in ("cluster", "image_digest", "has_image", "has_text"):
        found = [getattr(part, name) for part in parts if getattr(part, name) is not None]
        joined[name] = np.concatenate(found) if found else None
    if joined["has_image"] is not None and (joined["has_image"] & joined["has_text"]).all():
        joined["has_image"] = joined["has_text"] = None
    return PairTable(
        uris=uris,
        num_rows=np.array([part.num_rows for part in parts]),
        shard=np.repeat(np.arange(len(uris), dtype=np.uint32), [len(part.row) for part in parts]),
        row=np.concatenate([part.row for part in parts]),
        offset=np.concatenate([part.offset for part in parts]),
        size=np.concatenate([part.size for part in parts]),
        key=pa.concat_arrays([part.key for part in parts]),
        columns=columns,
        **joined,
    )


def clusters_of_rows(clusters: str, shard: int, keep: Bool[np.ndarray, " r"]) -> Int32[np.ndarray, " n"]:
    """Return the clusters of the n kept rows of a shard, -1 where a row has none."""
    labels = read_labels(clusters, shard)
    cluster = np.full(max(len(keep), int(labels.row.max(initial=0)) + 1), -1, np.int32)
    cluster[labels.row] = labels.cluster
    return cluster[: len(keep)][keep]


@dataclass(frozen=True, kw_only=True)
class GroupRows:
    """The rows that the n rows of a table stand for, each itself included: row i for `first[i]` to `first[i + 1]`."""

    table: PairTable
    first: Int64[np.ndarray, " n1"]


def join_groups(table: PairTable, stores: Sequence[Store], groups: str) -> GroupRows:
    """List the rows that those of a table stand for by `groups`, a folder of balance, and that all stores could use.

    Of rows without a caption only those of the table itself are among them.

    Raises:
        InputError: no row stands for another one.
    """
    ids = table.ids(np.arange(len(table)))

    def join(shard: int) -> tuple[_Part, Int64[np.ndarray, " m"]]:
        rows, found = Index.read(stores[0], shard), read_groups(groups, shard)
        place = np.minimum(np.searchsorted(ids, found.representative), len(ids) - 1)
        stands_for = np.full(len(rows.valid), -1)
        stands_for[found.row] = np.where(ids[place] == found.representative, place, -1)
        has_text = rows.has_text
        for other in stores[1:]:
            columns = other.columns(shard, "valid", "has_text")
            stands_for[~columns["valid"].to_numpy()] = -1
            has_text = has_text & columns["has_text"].to_numpy()
        own = np.zeros(len(rows.valid), bool)
        own[found.row] = sample_id(shard, found.row) == found.representative
        there = (stands_for >= 0) & (has_text | own)
        part = _part(rows.key, rows.offset, rows.size, there, None)
        part = dataclasses.replace(
            part,
            image_digest=rows.image_digest[there],
            has_image=rows.has_image[there],
            has_text=has_text[there],
        )
        return part, stands_for[there]

    with ThreadPoolExecutor(16) as pool:
        parts, owners = zip(*pool.map(join, range(stores[0].num_shards)), strict=True)
    owner = np.concatenate(owners)
    if len(owner) == len(table):
        raise InputError(
            f"{groups}: none of the rows that are trained on stands for another one, so --captions of-group shows what "
            "own shows. Give the folder of a `balance` that removed rows, or of a selection from one."
        )
    order = np.argsort(owner, kind="stable")
    whole = _table(table.uris, list(parts), table.columns).take(order)
    return GroupRows(table=whole, first=np.searchsorted(owner[order], np.arange(len(table) + 1)))


def check_labels(table: PairTable, clusters: str) -> None:
    """Raise `InputError` where a row of the table has a picture and no label in the folder `clusters`."""
    if table.cluster is None:
        return
    missing = table.cluster < 0 if table.has_image is None else (table.cluster < 0) & table.has_image
    if missing.any():
        at = int(np.argmax(missing))
        raise unlabelled(clusters, shard=int(table.shard[at]), row=int(table.row[at]))


def unlabelled(clusters: str, *, shard: int, row: int) -> InputError:
    """Return the error of a row with a picture that has no label in the folder `clusters`."""
    return InputError(
        f"{clusters}: row {row} of shard {shard} has no label. Give the groups that the clusters were made with, or "
        "run `distilclip cluster` again."
    )


def find_parts(parts: Sequence[DataPart]) -> tuple[list[str], list[int]]:
    """Return the shards that the parts of a mixture name, and of each shard the number of its part.

    Raises:
        InputError: a part matches nothing, or a shard belongs to two parts.
    """
    part_of: dict[str, int] = {}
    uris = []
    for number, part in enumerate(parts):
        for uri in find_shards(part.pattern):
            other = part_of.setdefault(files.absolute(uri), number)
            if other != number:
                raise InputError(
                    f"data: {uri} belongs to two parts, {parts[other].pattern} and {part.pattern}. Give patterns that "
                    "share no file."
                )
            uris.append(uri)
    return uris, [part_of[files.absolute(uri)] for uri in uris]


def follow_store(uris: Sequence[str], part: Sequence[int], store: Store) -> tuple[list[str], list[int]]:
    """Return shards and their parts in the store's order, if they are the very files that it was made from.

    Files that have moved keep the order that they are given in.
    """
    place = {files.absolute(uri): number for number, uri in enumerate(uris)}
    own = [files.absolute(shard.uri) for shard in store.shards]
    order = [place[uri] for uri in own] if sorted(place) == sorted(own) else range(len(uris))
    return [uris[number] for number in order], [part[number] for number in order]


@dataclass(frozen=True, kw_only=True)
class WeighedPairs:
    """The rows that are drawn, and the weight of each; None where all are drawn alike.

    `parts` describe a mixture's: `data`, their `share` of all draws, and `num_rows`, the rows that are drawn of each.
    """

    table: PairTable
    weights: Float64[np.ndarray, " n"] | None = None
    parts: Sequence[dict[str, Any]] = ()


def weigh(table: PairTable, weighting: Weighting, parts: Sequence[DataPart], part: Sequence[int]) -> WeighedPairs:
    """Weigh the rows of a table by their own weights and so that each part has its share; rows of weight 0 go.

    `part` is the number of each shard's part, where there are `parts`. A part's share is divided among its rows in
    the ratio of their own weights.

    Raises:
        InputError: a part of positive weight has no row that could be drawn, or as `read_row_weights` does.
    """
    if not len(table) or not (parts or weighting.row_weights):
        return WeighedPairs(table=table)
    weights = np.ones(len(table))
    if weighting.row_weights:
        places = RowPlaces(shard=table.shard, row=table.row, key=table.key, num_rows=table.num_rows)
        weights = read_row_weights(weighting.row_weights, places, column=weighting.row_weights_column)
        weights /= weights.max()
    if not parts:
        return WeighedPairs(table=table.keep(weights > 0), weights=weights[weights > 0])
    weights, described = share_among_parts(weights, np.array(part, np.int32)[table.shard], parts)
    return WeighedPairs(table=table.keep(weights > 0), weights=weights[weights > 0], parts=described)


def share_among_parts(
    weights: Float64[np.ndarray, " n"], part_of_row: Int32[np.ndarray, " n"], parts: Sequence[DataPart]
) -> tuple[Float64[np.ndarray, " n"], list[dict[str, Any]]]:
    """Scale the weights so that each part of a mixture has its share of their sum; also describe the parts.

    Raises:
        InputError: a part of positive weight has no row that could be drawn.
    """
    sums = np.bincount(part_of_row, weights, len(parts))  # adds one row after the other: the same everywhere
    for number, one in enumerate(parts):
        if one.weight and not sums[number]:
            raise InputError(
                f"data: the part {one.pattern} has the weight {one.weight:g} and no row to train on: none of its rows "
                "is usable, kept, and of positive weight. Give it the weight 0, or look at --groups and --row-weights."
            )
    asked = np.array([one.weight for one in parts])
    shared = weights * np.divide(asked, sums, out=np.zeros(len(parts)), where=sums > 0)[part_of_row]
    num_rows = np.bincount(part_of_row[shared > 0], minlength=len(parts)).tolist()
    total = math.fsum(asked)
    return shared, [
        {"data": one.pattern, "share": one.weight / total, "num_rows": count}
        for one, count in zip(parts, num_rows, strict=True)
    ]


def check_source(store: Store, shard: int, uri: str, rows: Rows | Index) -> None:
    """Check that the shard exists, has the size that was embedded, and holds its first valid row where the index says.

    A file that was written again since is compared with its SHA-256. All other keys are compared as they are read.
    """
    try:
        num_bytes = source_size(uri)
    except FileNotFoundError as error:
        raise InputError(
            f"{uri} is missing; {store.path} was made from it. Say where the data lies now (--data)."
        ) from error
    if num_bytes != store.shards[shard].num_bytes:
        raise InputError(
            f"{uri} has {num_bytes} bytes, {store.shards[shard].num_bytes} when {store.path} was made from it: "
            "not the same file. Embed it again, or give the files that were embedded."
        )
    check_unchanged(store.path, store.shards[shard], uri)
    if not rows.valid.any():
        return
    if uri.lower().endswith(EMBEDDING_SUFFIXES):
        return  # it has no keys to compare
    row = int(np.argmax(rows.valid))
    source = open_shard(uri, store.csv_columns)
    try:
        found = source.read(int(rows.offset[row]), int(rows.size[row])).key
    except BadSample as error:
        found = str(error)
    source.close()
    assert_key(found, str(rows.key[row]), uri=uri, row=row)
