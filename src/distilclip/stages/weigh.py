"""Weigh the kept rows of a store by cluster, group and data set: how often `train --row-weights` draws each.

The ways are factors: a row's weight is their product. Shares of data sets come last, so that they hold.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float32, Float64, Int32, Int64, UInt64

from distilclip import digests, stage_folder
from distilclip.configs.weigh import Config
from distilclip.data.pairs import find_parts, follow_store, share_among_parts
from distilclip.data.side_files import (
    WeightedRows,
    kept_rows,
    read_centers,
    read_groups,
    read_labels,
    write_weights,
)
from distilclip.data.store import Store, sample_id, split_id
from distilclip.draws import Draws
from distilclip.errors import InputError
from distilclip.messages import warn
from distilclip.mixture import read_parts
from distilclip.row_weights import weights_name
from distilclip.scoring.cluster_weights import (
    cluster_curve,
    complexities,
    farthest_rows,
    power_weights,
    quotas,
    round_quotas,
    softmax,
)

NUM_EXAMPLES = 12  # clusters in the result whose share rises or falls most
FEW = 0.1  # share of the rows below which an effective number of them is worth a warning


def main(config: Config) -> dict[str, Any]:
    """Compute the weights, write them shard by shard, and return the folder's result."""
    folder = stage_folder.open_folder(config.out, stage="weigh", config=config, inputs=config.inputs())
    if folder.finished:
        return folder.result()
    for path, stage in ((config.groups, "balance"), (config.clusters, "cluster")):
        if path is not None:
            stage_folder.require(path, stage=stage, store=config.store)
    store = Store.open(config.store)
    ids = _kept_ids(store, config.groups)
    if not len(ids):
        raise InputError(f"{config.store}: no row is valid and kept, so there is nothing to weigh.")
    weights = np.ones(len(ids))
    described: dict[str, Any] = {}
    labels = None if config.clusters is None else _read_labels(config.clusters, ids, store.num_shards)
    if labels is not None:
        weights = _weigh_clusters(config, labels)
    if config.group_power is not None:
        assert config.groups is not None
        sizes = _group_sizes(store, config.groups, ids)
        weights = weights * sizes.astype(np.float64) ** config.group_power
        described["largest_group"] = int(sizes.max())
    if config.data:
        weights, described["parts"] = _share_data(config, store, weights, ids)
    if labels is not None:
        described["clusters"] = _describe_clusters(labels, weights)
    for shard, (first, last) in enumerate(_shard_ranges(ids, store.num_shards)):
        write_weights(folder.path, shard, WeightedRows(split_id(ids[first:last])[1], weights[first:last]))
    draws = Draws.of_weights(weights[weights > 0])
    if draws.effective_rows < FEW * len(ids):
        warn(
            f"The weights are so uneven that training varies as with {draws.effective_rows:,.0f} of {len(ids):,} rows: "
            f"the heaviest is drawn {draws.most_often:,.1f} times in an epoch. Give powers or a --temperature that are "
            "less extreme, if that is not what you want."
        )
    return folder.finish(
        {
            "num_rows": len(ids),
            "num_drawn": int((weights > 0).sum()),
            "effective_rows": draws.effective_rows,
            "most_often": draws.most_often,
            **described,
            "digests": digests.digest_files(folder.path, [weights_name(shard) for shard in range(store.num_shards)]),
        }
    )


def _kept_ids(store: Store, groups: str | None) -> UInt64[np.ndarray, " n"]:
    """Return the sample ids of the rows that are valid and kept, ascending."""
    found = [np.empty(0, np.uint64)]
    for shard in range(store.num_shards):
        valid = store.columns(shard, "valid")["valid"].to_numpy()
        rows = np.flatnonzero(kept_rows(store, shard, valid, groups)).astype(np.uint32)
        found.append(sample_id(shard, rows))
    return np.concatenate(found)


def _shard_ranges(ids: UInt64[np.ndarray, " n"], num_shards: int) -> list[tuple[int, int]]:
    """Return where the rows of each shard begin and end among the sample ids."""
    ends = np.searchsorted(split_id(ids)[0], np.arange(num_shards + 1)).tolist()
    return list(itertools.pairwise(ends))


@dataclass(frozen=True, kw_only=True)
class _RowLabels:
    """The cluster of every kept row, its distance to the center, and the centers."""

    cluster: Int64[np.ndarray, " n"]
    distance: Float32[np.ndarray, " n"]
    centers: Float32[np.ndarray, "k dim"]

    def sums(self, weights: Float64[np.ndarray, " n"]) -> Float64[np.ndarray, " k"]:
        """Return the sum of the weights of each cluster."""
        return np.bincount(self.cluster, weights, len(self.centers))


def _read_labels(clusters: str, ids: UInt64[np.ndarray, " n"], num_shards: int) -> _RowLabels:
    """Read the labels of all kept rows. Raises `InputError` where one has none."""
    centers = read_centers(clusters)
    cluster, distance = np.empty(len(ids), np.int64), np.empty(len(ids), np.float32)
    for shard, (first, last) in enumerate(_shard_ranges(ids, num_shards)):
        labels, rows = read_labels(clusters, shard), split_id(ids[first:last])[1]
        place = np.searchsorted(labels.row, rows)
        is_there = np.append(labels.row, np.uint32(2**32 - 1))[place] == rows
        if not is_there.all():
            raise InputError(
                f"{clusters}: row {rows[np.argmin(is_there)]} of shard {shard} is kept and has no label. Give the "
                "--groups that the clusters were made with, or a selection from them, or cluster again. Rows without a "
                "picture have no cluster."
            )
        cluster[first:last], distance[first:last] = labels.cluster[place], labels.distance[place]
    return _RowLabels(cluster=cluster, distance=distance, centers=centers)


def _weigh_clusters(config: Config, labels: _RowLabels) -> Float64[np.ndarray, " n"]:
    """Return the weight of every row by its cluster."""
    cluster, num_rows = labels.cluster, len(labels.cluster)
    sizes = np.bincount(cluster, minlength=len(labels.centers))
    if config.cluster_power is not None:
        return power_weights(sizes, power=config.cluster_power)[cluster]
    assert config.quota is not None
    shares = softmax(complexities(labels.centers, cluster, labels.distance), temperature=config.temperature)
    quota = quotas(shares, sizes=sizes, num_rows=max(1, round(config.quota * num_rows)))
    if config.quota_rows == "farthest":
        return farthest_rows(cluster, labels.distance, round_quotas(quota)).astype(np.float64)
    return (quota / np.maximum(sizes, 1))[cluster]


def _group_sizes(store: Store, groups: str, ids: UInt64[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
    """Return how many rows each kept row stands for, itself included."""
    sizes = np.zeros(len(ids), np.int64)
    for shard in range(store.num_shards):
        kept_for = read_groups(groups, shard).representative
        place = np.minimum(np.searchsorted(ids, kept_for), len(ids) - 1)
        sizes += np.bincount(place[ids[place] == kept_for], minlength=len(ids))
    if sizes.max() == 1:
        raise InputError(
            f"{groups}: no kept row stands for another, so --group-power has no effect. Give the folder of a `balance` "
            "that removed rows, or of a selection from one."
        )
    return sizes


def _share_data(
    config: Config, store: Store, weights: Float64[np.ndarray, " n"], ids: UInt64[np.ndarray, " n"]
) -> tuple[Float64[np.ndarray, " n"], list[dict[str, Any]]]:
    """Scale the weights so that each part of --data has its share; also describe the parts."""
    parts = read_parts(config.data)
    uris, part = follow_store(*find_parts(parts), store)
    if len(uris) != store.num_shards:
        raise InputError(
            f"data: the parts are {len(uris)} files, but the store {store.path} was made from {store.num_shards}. Give "
            "patterns of all its files."
        )
    part_of_row: Int32[np.ndarray, " n"] = np.array(part, np.int32)[split_id(ids)[0]]
    return share_among_parts(weights, part_of_row, parts)


def _describe_clusters(labels: _RowLabels, weights: Float64[np.ndarray, " n"]) -> dict[str, Any]:
    """Return how the draws spread over the clusters, with all rows alike and with the weights."""
    before, after = labels.sums(np.ones(len(weights))), labels.sums(weights)
    before, after = before / before.sum(), after / after.sum()
    by_change = np.argsort(after - before, kind="stable")
    changed = {"lowered": by_change[:NUM_EXAMPLES], "raised": by_change[::-1][:NUM_EXAMPLES]}
    return {
        "effective_before": float(1 / np.square(before).sum()),
        "effective_after": float(1 / np.square(after).sum()),
        "curve": cluster_curve(before, after),
        **{
            name: [{"cluster": int(c), "before": float(before[c]), "after": float(after[c])} for c in clusters]
            for name, clusters in changed.items()
        },
    }
