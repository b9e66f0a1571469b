"""Image semantic balance: group images closer than a threshold, exactly, and keep the central one of each group."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from distilclip import run
from distilclip.data import files
from distilclip.data import groups as tables
from distilclip.data.store import Store, sample_id
from distilclip.devices import resolve_device
from distilclip.errors import InputError
from distilclip.ops.balance import Balance, cut, largest_threshold, similarity_forest
from distilclip.ops.groups import Forest, threshold_for
from distilclip.ops.metric import Metric, equivalents
from distilclip.ops.points import Points


@dataclass(frozen=True, kw_only=True)
class Config:
    """Flags of `distilclip balance`."""

    store: str
    """folder of `embed`"""
    out: str
    """folder to write: groups, the spanning forest, result.json with the threshold curve"""
    metric: Metric
    """unit of all distances here. The paper's 0.07 means three things: euclidean (cos > 0.9976), sqeuclidean
    (cos > 0.965, what faiss calls L2) or cosine distance (cos > 0.93)"""
    threshold: float | None = None
    """join images with distance < threshold (or give --target-removed)"""
    target_removed: float | None = None
    """choose the threshold that removes this share of the images; needs --max-threshold"""
    max_threshold: float | None = None
    """search this far, for the curve and for later re-thresholding (default: the threshold)"""
    mode: Literal["threshold", "topk"] = "threshold"
    """join by every pair, or only by each image's --top-k nearest as in the paper's text"""
    top_k: int | None = None
    """length of the lists in topk mode"""
    max_radius: float | None = None
    """keep further images of a group until none is farther than this from a kept one"""
    memory_gb: float = run.execution(1.0)
    """working memory of the search, beyond the embeddings in half precision"""
    device: str = run.execution("auto")
    """auto (CUDA, then MPS, then CPU), or a torch device"""

    def __post_init__(self) -> None:
        _search_distance(self)
        if self.target_removed is not None and not 0 < self.target_removed < 1:
            raise InputError(f"target_removed is {self.target_removed}; it must lie between 0 and 1.")


def main(config: Config) -> dict[str, Any]:
    """Group the images of a store; the folder's result."""
    folder = run.open_folder(config.out, stage="balance", config=config, inputs=[(config.store, "embed")])
    if folder.finished:
        return folder.result()
    store = Store.open(config.store)
    max_threshold = _search_distance(config)
    valid = np.concatenate([np.empty(0, bool), *(store.rows(shard.index).valid for shard in store.shards)])
    points = Points.of(image_rows(store), metric=config.metric, valid=valid)
    ids = np.concatenate([np.empty(0, np.uint64), *(_ids(store, shard.index) for shard in store.shards)])
    if not files.exists(folder.child("forest.parquet")):
        forest, saturated = similarity_forest(
            points,
            valid,
            threshold=max_threshold,
            metric=config.metric,
            top_k=config.top_k,
            memory_gb=config.memory_gb,
            device=resolve_device(config.device),
        )
        run.write_json(folder.child("search.json"), {"saturated": saturated})
        tables.write_forest(folder.path, tables.Forest(ids[forest.left], ids[forest.right], forest.distance))
    forest = _read_forest(folder.path, ids)
    threshold = config.threshold
    if threshold is None:
        assert config.target_removed is not None  # Config asked for one of the two
        threshold = threshold_for(forest, removed_ratio=config.target_removed, num_valid=int(valid.sum()))
    balance = cut(
        points,
        forest,
        valid=valid,
        threshold=threshold,
        max_threshold=max_threshold,
        metric=config.metric,
        max_radius=config.max_radius,
        saturated=run.read_json(folder.child("search.json"))["saturated"],
    )
    _write_groups(folder.path, store, ids, balance)
    return folder.finish(_result(balance))


def image_rows(store: Store) -> np.ndarray:
    """The image embeddings of all shards, one below the other, in half precision; one shard stays a memory map."""
    if store.num_shards == 1:
        return store.image(0)
    rows = np.empty((store.num_rows, store.dim), np.float16)
    start = 0
    for shard in store.shards:
        rows[start : start + shard.num_rows] = store.image(shard.index)
        start += shard.num_rows
    return rows


def _search_distance(config: Config) -> float:
    names = ("threshold", "metric", "mode", "top_k", "max_radius", "target_removed", "max_threshold")
    return largest_threshold(**{name: getattr(config, name) for name in names})


def _ids(store: Store, shard: int) -> np.ndarray:
    return sample_id(shard, np.arange(store.shards[shard].num_rows))


def _read_forest(path: str, ids: np.ndarray) -> Forest:
    """The forest file with rows counted through all shards: ids ascend with them."""
    found = tables.read_forest(path)
    left, right = np.searchsorted(ids, found.left), np.searchsorted(ids, found.right)
    return Forest(left=left, right=right, distance=found.distance, num_rows=len(ids))


def _write_groups(path: str, store: Store, ids: np.ndarray, balance: Balance) -> None:
    """One file per shard, of its valid rows. Finished files are left as they are: they would be the same."""
    start = 0
    for shard in store.shards:
        rows = start + np.flatnonzero(balance.group[start : start + shard.num_rows] >= 0)
        if not files.exists(tables.groups_path(path, shard.index)):
            part = tables.Groups(
                row=(rows - start).astype(np.uint32),
                group=ids[balance.group[rows]],
                representative=ids[balance.representative[rows]],
                distance=balance.distance[rows],
                keep=balance.keep[rows],
            )
            tables.write_groups(path, shard.index, part)
        start += shard.num_rows


def _result(balance: Balance) -> dict[str, Any]:
    columns = dataclasses.asdict(balance.curve)
    return {
        "threshold": balance.threshold,
        "metric": balance.metric,
        "equivalent_thresholds": equivalents(balance.threshold, balance.metric),
        "max_threshold": balance.max_threshold,
        "num_valid": balance.num_valid,
        "num_kept": int(balance.keep.sum()),
        "num_groups": balance.num_groups,
        "removed_ratio": balance.removed_ratio,
        "largest_group": balance.largest_group,
        "saturated": balance.saturated,
        "curve": [
            dict(zip(columns, values, strict=True))
            for values in zip(*(c.tolist() for c in columns.values()), strict=True)
        ],
    }
