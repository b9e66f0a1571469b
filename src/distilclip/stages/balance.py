"""Image semantic balance: group images closer than a threshold, exactly, and keep the central one of each group."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Int

from distilclip import files, stage_folder
from distilclip.data import side_files as tables
from distilclip.data.images import ImageMatrix
from distilclip.data.store import Store
from distilclip.devices import resolve_device
from distilclip.engine import Engine, map_parts
from distilclip.errors import InputError
from distilclip.grouping.balance import Balance, cut, largest_threshold, nearest_forest, representatives_in_batches
from distilclip.grouping.forecast import BYTES_PER_EDGE, calibrate
from distilclip.grouping.forest import Forest, ForestBuilder, threshold_for
from distilclip.grouping.search_parts import ROW_BYTES, Part, Search, parts_of, remove_parts, rows_of_budget
from distilclip.progress import duration, progress, say
from distilclip.vectors.metric import Metric, equivalents
from distilclip.vectors.points import Points

FORECAST_FROM = 100_000  # rows; fewer are searched in about the time that a forecast takes
NUM_BLOCKS_SHARED = 8  # blocks at least, where parts are shared among workers: 36 parts
NUM_EXAMPLES = 12  # pairs on either side of the threshold, and largest groups, in the result


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
    memory_gb: float = stage_folder.execution(1.0)
    """working memory of each worker's search, beyond the embeddings it reads in half precision"""
    block_rows: int | None = stage_folder.execution(None)
    """rows of a block; a part of the search compares two blocks (default: what --memory-gb allows)"""
    device: str = stage_folder.execution("auto")
    """auto (CUDA, then MPS, then CPU), or a torch device; on Ray, cuda gives each worker a GPU of its own"""
    execution: Engine = field(default_factory=Engine)

    def __post_init__(self) -> None:
        _search_distance(self)
        if self.target_removed is not None and not 0 < self.target_removed < 1:
            raise InputError(f"target_removed is {self.target_removed}; it must lie between 0 and 1.")
        if self.block_rows is not None and self.block_rows < 1:
            raise InputError(f"block_rows is {self.block_rows}; it must be at least 1.")
        if self.top_k is not None and self.execution.engine != "local":
            raise InputError("topk mode compares every list with all rows: --engine local only.")


def main(config: Config) -> dict[str, Any]:
    """Group the images of a store; the folder's result."""
    folder = stage_folder.open_folder(config.out, stage="balance", config=config, inputs=[(config.store, "embed")])
    if folder.finished:
        return folder.result()
    images = ImageMatrix(Store.open(config.store))
    valid = images.valid()
    if not files.exists(folder.child("forest.parquet")):
        _search(config, folder.path, images, valid)
    remove_parts(folder.path)
    forest = _read_forest(folder.path, images)
    threshold = config.threshold
    if threshold is None:
        assert config.target_removed is not None  # Config asked for one of the two
        threshold = threshold_for(forest, removed_ratio=config.target_removed, num_valid=int(valid.sum()))
    balance = cut(
        forest,
        represent=partial(
            representatives_in_batches,
            images.take,
            metric=config.metric,
            max_radius=config.max_radius,
            batch_rows=int(config.memory_gb * 2**30) // (4 * images.store.dim) + 1,
        ),
        valid=valid,
        threshold=threshold,
        max_threshold=_search_distance(config),
        metric=config.metric,
        max_radius=config.max_radius,
        saturated=stage_folder.read_json(folder.child("search.json"))["saturated"],
    )
    _write_groups(folder.path, images, balance)
    return folder.finish({**_result(balance), **_examples(balance, images)})


def _search(config: Config, path: str, images: ImageMatrix, valid: Bool[np.ndarray, " n"]) -> None:
    """Write the forest, and before it what else the search has to say."""
    search = Search(
        store=config.store,
        folder=path,
        threshold=_search_distance(config),
        metric=config.metric,
        memory_gb=config.memory_gb,
        device=config.device,
    )
    search.write_copies(images)
    copies = search.copies()
    forest = ForestBuilder(len(images))
    forest.add(images.rows(copies.left), images.rows(copies.right), copies.distance)
    saturated = None
    if config.top_k is not None:
        saturated = _search_lists(config, search, images, valid, forest)
    else:
        parts = parts_of(len(images), block_rows=_block_rows(config, len(images)))
        if len(images) >= FORECAST_FROM:
            say(_forecast(config, images, np.flatnonzero(valid), parts))
        with progress(f"search {path}", len(parts)) as advance:
            for part, _ in map_parts(search.prepare, parts, engine=config.execution, device=config.device):
                found = search.forest(part)
                forest.add(images.rows(found.left), images.rows(found.right), found.distance)
                advance(1, 0)
    stage_folder.write_json(files.join(path, "search.json"), {"saturated": saturated})
    whole = forest.forest()
    tables.write_forest(path, tables.ForestEdges(images.ids(whole.left), images.ids(whole.right), whole.distance))


def _search_lists(
    config: Config, search: Search, images: ImageMatrix, valid: Bool[np.ndarray, " n"], forest: ForestBuilder
) -> float:
    """Search every row's nearest instead, all at once; the share of rows whose list is full."""
    assert config.top_k is not None
    points = Points.of(images.read(0, len(images)), metric=config.metric, valid=valid)
    searched = valid.copy()
    searched[images.rows(search.copies().right)] = False
    found, saturated = nearest_forest(
        points,
        searched,
        threshold=search.threshold,
        metric=config.metric,
        top_k=config.top_k,
        memory_gb=config.memory_gb,
        device=resolve_device(config.device),
    )
    forest.add(found.left, found.right, found.distance)
    return saturated


def _block_rows(config: Config, num_rows: int) -> int:
    if config.block_rows is not None:
        return config.block_rows
    fit = rows_of_budget(num_rows, config.memory_gb)
    return fit if config.execution.engine == "local" else min(fit, num_rows // NUM_BLOCKS_SHARED + 1)


def _forecast(config: Config, images: ImageMatrix, rows: Int[np.ndarray, " m"], parts: list[Part]) -> str:
    """What the search will need, measured on a sample of the rows."""
    growth = calibrate(
        images.take,
        rows,
        threshold=_search_distance(config),
        metric=config.metric,
        memory_gb=config.memory_gb,
        device=resolve_device(config.device),
    )
    num_workers = 1 if config.execution.engine == "local" else config.execution.engine_workers or os.cpu_count() or 1
    num_left, num_right = (parts[0].left[1] - parts[0].left[0], parts[0].right[1] - parts[0].right[0])
    seconds = sum(
        growth.within(part.left[1] - part.left[0])
        if part.left == part.right
        else growth.across(part.left[1] - part.left[0], part.right[1] - part.right[0])
        for part in parts
    )
    num_read = num_left + (0 if parts[0].left == parts[0].right else num_right)
    return (
        f"balance: {len(images):,} rows of {images.store.dim}, in {len(parts)} parts. "
        f"Time: about {duration(seconds / num_workers)} (grows as n^{growth.exponent:.2f} here). "
        f"Memory of each worker: {num_read * images.store.dim * 2 / 1e9:.2f} GB of rows and "
        f"{num_read * ROW_BYTES / 1e9:.2f} GB to search them. "
        f"Disk: at most {len(parts) * num_read * BYTES_PER_EDGE / 1e9:.2f} GB."
    )


def _search_distance(config: Config) -> float:
    names = ("threshold", "metric", "mode", "top_k", "max_radius", "target_removed", "max_threshold")
    return largest_threshold(**{name: getattr(config, name) for name in names})


def _read_forest(path: str, images: ImageMatrix) -> Forest:
    """The forest file with rows counted through all shards."""
    found = tables.read_forest(path)
    left, right = images.rows(found.left), images.rows(found.right)
    return Forest(left=left, right=right, distance=found.distance, num_rows=len(images))


def _write_groups(path: str, images: ImageMatrix, balance: Balance) -> None:
    """One file per shard, of its valid rows. Finished files are left as they are: they would be the same."""
    for shard, (start, stop) in enumerate(zip(images.starts[:-1], images.starts[1:], strict=True)):
        rows = start + np.flatnonzero(balance.group[start:stop] >= 0)
        if not files.exists(tables.groups_path(path, shard)):
            part = tables.Groups(
                row=(rows - start).astype(np.uint32),
                group=images.ids(balance.group[rows]),
                representative=images.ids(balance.representative[rows]),
                distance=balance.distance[rows],
                keep=balance.keep[rows],
            )
            tables.write_groups(path, shard, part)


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
            {**dict(zip(columns, values, strict=True)), "equivalents": equivalents(values[0], balance.metric)}
            for values in zip(*(c.tolist() for c in columns.values()), strict=True)
        ],
    }


def _examples(balance: Balance, images: ImageMatrix) -> dict[str, Any]:
    """What to look at before believing a threshold: pairs next to it, and the groups that chains made long."""

    def pairs(edges: Forest) -> list[dict[str, Any]]:
        ids = images.ids(edges.left).tolist(), images.ids(edges.right).tolist()
        return [
            {"left": left, "right": right, "distance": distance}
            for left, right, distance in zip(*ids, edges.distance.tolist(), strict=True)
        ]

    under, over = balance.borderline(NUM_EXAMPLES)
    return {
        "borderline": {"under": pairs(under), "over": pairs(over)},
        "chained": balance.num_chained,
        "largest_groups": [
            {"group": int(images.ids(np.array([group]))[0]), "num_images": size, "farthest": farthest}
            for group, size, farthest in balance.largest_groups(NUM_EXAMPLES)
        ],
    }
