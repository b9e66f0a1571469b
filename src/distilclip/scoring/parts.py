"""Divide the rows of a store into parts, of each of which `select` keeps a share: folders of shards, or clusters."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int64, Integer

from distilclip.data.side_files import read_labels
from distilclip.data.store import Store
from distilclip.errors import InputError


def list_folders(store: Store) -> tuple[list[str], Int64[np.ndarray, " shards"]]:
    """Return the folders that the shards lie in, sorted, and the number of each shard's folder."""
    found = [shard.uri.rpartition("/")[0] for shard in store.shards]
    names = sorted(set(found))
    number = {name: at for at, name in enumerate(names)}
    return names, np.array([number[name] for name in found], np.int64)


def split_by_shard(values: np.ndarray, rows: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Return the values of the rows of each shard, from those of all rows one after the other."""
    return np.split(values, np.cumsum([len(own) for own in rows])[:-1])


def number_parts(
    store: Store, rows: Sequence[np.ndarray], *, within: str, clusters: str | None
) -> Int64[np.ndarray, " n"] | None:
    """Return the part of each row, all shards' one after the other; None where all rows are one part.

    Args:
        store: with the shards.
        rows: of every shard, some of its rows.
        within: `all`, `folder` or `cluster`: what a part is.
        clusters: folder of `cluster`, where a part is a cluster.

    Raises:
        InputError: a row has no label.
    """
    if within == "all":
        return None
    if within == "folder":
        return np.repeat(list_folders(store)[1], [len(own) for own in rows])
    assert clusters is not None
    return np.concatenate([_labels(clusters, shard, own) for shard, own in enumerate(rows)])


def _labels(clusters: str, shard: int, rows: Integer[np.ndarray, " m"]) -> Int64[np.ndarray, " m"]:
    labels = read_labels(clusters, shard)
    lacking = rows[~np.isin(rows, labels.row)]
    if len(lacking):
        raise InputError(
            f"{clusters}: row {lacking[0]} of shard {shard} has no label. Cluster with the --groups given here, or "
            "with none."
        )
    return labels.cluster[np.searchsorted(labels.row, rows)].astype(np.int64)
