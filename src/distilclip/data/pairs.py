"""Which pairs to train on: the valid, kept rows of all shards, with their place in the shard and their cluster."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Int64, UInt32, UInt64

from distilclip.data import files
from distilclip.data.groups import read_groups, read_labels
from distilclip.data.policy import ErrorPolicy
from distilclip.data.samples import BadSample
from distilclip.data.shards import open_shard
from distilclip.data.store import Rows, Store, sample_id
from distilclip.errors import InputError


@dataclass(frozen=True)
class PairTable:
    """The n rows to train on, in the order of (shard, row).

    `key` stays in Arrow, since forked processes would copy n Python strings one by one. `offset` and `size` are those
    of the shard's index; `cluster` is None where no clusters are joined.
    """

    uris: list[str]
    shard: UInt32[np.ndarray, " n"]
    row: UInt32[np.ndarray, " n"]
    offset: UInt64[np.ndarray, " n"]
    size: UInt32[np.ndarray, " n"]
    key: pa.LargeStringArray
    cluster: Int64[np.ndarray, " n"] | None

    def __len__(self) -> int:
        return len(self.row)

    def ids(self, rows: Int64[np.ndarray, " m"]) -> UInt64[np.ndarray, " m"]:
        """The sample ids of rows of this table."""
        return sample_id(self.shard[rows], self.row[rows])


def join_store(
    store: Store, *, data: Sequence[str] = (), groups: str | None = None, clusters: str | None = None
) -> PairTable:
    """The valid rows of a store; those that `groups` (a balance folder) keeps; with labels of `clusters`.

    `data` says where the shards lie now, in the order of the manifest, if not where they were embedded.

    Raises:
        InputError: a shard is missing or not the file that was embedded; groups or clusters do not fit the store.
    """
    uris = list(data) or [shard.uri for shard in store.shards]
    if len(uris) != store.num_shards:
        raise InputError(
            f"The data are {len(uris)} files, but the store {store.path} was made from {store.num_shards}, "
            f"{store.shards[0].uri} first. Give the same files in the same order."
        )
    tables = [store.rows(shard) for shard in range(store.num_shards)]
    _check_sources(store, uris, tables)
    kept = [_kept_rows(store, shard, rows, groups) for shard, rows in enumerate(tables)]
    cluster = None
    if clusters is not None:
        cluster = np.concatenate([_clusters(clusters, shard, keep) for shard, keep in enumerate(kept)])
    return _table(uris, tables, kept, cluster)


def index_pairs(data: Sequence[str], *, policy: ErrorPolicy) -> PairTable:
    """The usable samples of shards that no store describes; the unusable ones are counted by `policy`.

    Raises:
        InputError: a shard cannot be read, or `policy` has had enough.
    """
    tables, kept = [], []
    for uri in data:
        shard = open_shard(uri)
        entries = shard.index()
        shard.close()
        policy.seen(len(entries))
        for entry in entries:
            if entry.error:
                policy.bad(entry.error, where=f"{uri}: {entry.key}")
        policy.check()
        tables.append(
            Rows(
                key=[entry.key for entry in entries],
                offset=np.array([entry.offset for entry in entries], np.uint64),
                size=np.array([entry.size for entry in entries], np.uint32),
                valid=np.array([not entry.error for entry in entries]),
                error=[entry.error for entry in entries],
                image_sha256=np.zeros((len(entries), 32), np.uint8),
            )
        )
        kept.append(tables[-1].valid)
    return _table(list(data), tables, kept, None)


def _table(
    uris: list[str], tables: list[Rows], kept: list[Bool[np.ndarray, " r"]], cluster: Int64[np.ndarray, " n"] | None
) -> PairTable:
    numbers = [np.flatnonzero(keep) for keep in kept]
    return PairTable(
        uris=uris,
        shard=np.repeat(np.arange(len(uris), dtype=np.uint32), [len(n) for n in numbers]),
        row=np.concatenate(numbers).astype(np.uint32),
        offset=np.concatenate([table.offset[keep] for table, keep in zip(tables, kept, strict=True)]),
        size=np.concatenate([table.size[keep] for table, keep in zip(tables, kept, strict=True)]),
        key=pa.concat_arrays(
            pa.array(t.key, pa.large_string()).filter(pa.array(keep)) for t, keep in zip(tables, kept, strict=True)
        ),
        cluster=cluster,
    )


def _kept_rows(store: Store, shard: int, rows: Rows, groups: str | None) -> Bool[np.ndarray, " r"]:
    if groups is None:
        return rows.valid
    table = read_groups(groups, shard)
    keep = np.zeros(len(rows), bool)
    if len(table.row) and table.row[-1] >= len(rows):
        raise InputError(f"{groups}: shard {shard} has a row {table.row[-1]}, the store {store.path} {len(rows)} rows.")
    keep[table.row[table.keep]] = True
    if (keep & ~rows.valid).any() or len(table.row) != rows.valid.sum():
        raise InputError(
            f"{groups}: the rows of shard {shard} are not the valid rows of the store {store.path}; these groups were "
            "made for another store. Run `distilclip balance` on this one."
        )
    return keep


def _clusters(clusters: str, shard: int, keep: Bool[np.ndarray, " r"]) -> Int64[np.ndarray, " n"]:
    labels = read_labels(clusters, shard)
    cluster = np.full(max(len(keep), int(labels.row.max(initial=0)) + 1), -1, np.int64)
    cluster[labels.row] = labels.cluster
    found = cluster[: len(keep)][keep]
    if (found < 0).any():
        raise InputError(
            f"{clusters}: row {np.flatnonzero(keep)[int(np.argmin(found))]} of shard {shard} has no label. Train with "
            "the groups that the clusters were made with, or run `distilclip cluster` again."
        )
    return found


def _check_sources(store: Store, uris: list[str], tables: list[Rows]) -> None:
    """Every shard is there, of the size that was embedded, with the key of its first valid row where the index says.

    All other keys are compared as they are read. In threads, since each file of a remote store takes two requests.
    """

    def check(shard: int) -> None:
        uri, line, rows = uris[shard], store.shards[shard], tables[shard]
        if not files.exists(uri):
            raise InputError(f"{uri} is missing; {store.path} was made from it. Say where the data lies now (--data).")
        if files.size(uri) != line.num_bytes:
            raise InputError(
                f"{uri} has {files.size(uri)} bytes, {line.num_bytes} when {store.path} was made from it: "
                "not the same file. Embed it again, or give the files that were embedded."
            )
        if not rows.valid.any():
            return
        row = int(np.argmax(rows.valid))
        source = open_shard(uri)
        try:
            found = source.read(int(rows.offset[row]), int(rows.size[row])).key
        except BadSample as error:
            found = str(error)
        source.close()
        assert_key(found, rows.key[row], uri=uri, row=row)

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(check, range(len(uris))))


def assert_key(found: str, expected: str, *, uri: str, row: int) -> None:
    """Raise `InputError` where a shard holds another key than the store says."""
    if found != expected:
        raise InputError(
            f"{uri}, row {row}: the key is {found!r} where the store has {expected!r}. It is not the file that "
            "was embedded: embed it again, or give the files that were."
        )
