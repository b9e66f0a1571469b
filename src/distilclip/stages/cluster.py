"""Spherical k-means of the kept images: unit centers for the cluster term, and every kept image's label."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from distilclip import run
from distilclip.data import files
from distilclip.data.groups import Labels, labels_path, read_centers, read_groups, write_centers, write_labels
from distilclip.data.store import Store
from distilclip.devices import resolve_device
from distilclip.errors import InputError
from distilclip.ops.kmeans import assign, gini, kmeans, size_histogram
from distilclip.ops.points import Points


@dataclass(frozen=True, kw_only=True)
class Config:
    """Flags of `distilclip cluster`."""

    store: str
    """folder of `embed`"""
    out: str
    """folder to write: centers.safetensors, labels, result.json"""
    num_centers: int
    """number of clusters (the paper: 1,000,000 for 225 M images)"""
    groups: str | None = None
    """folder of `balance`: cluster kept images only (default: every valid image)"""
    num_iterations: int = 20
    """rounds of assignment and update, at most"""
    points_per_center: int | None = None
    """fit on a sample of this many images per center (default: all); every kept image gets its label"""
    seed: int = 0
    """of the sample and of the first centers"""
    device: str = run.execution("auto")
    """auto (CUDA, then MPS, then CPU), or a torch device"""

    def __post_init__(self) -> None:
        for name in ("num_centers", "num_iterations", "points_per_center"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} is {value}; it must be at least 1.")


@dataclass(frozen=True)
class _Part:
    """The rows of one shard that take part: the kept ones, and the valid ones that balance removed."""

    shard: int
    kept: np.ndarray
    removed: np.ndarray


def main(config: Config) -> dict[str, Any]:
    """Cluster the images of a store; the folder's result."""
    inputs = [(config.store, "embed")] + ([(config.groups, "balance")] if config.groups else [])
    folder = run.open_folder(config.out, stage="cluster", config=config, inputs=inputs)
    if folder.finished:
        return folder.result()
    store = Store.open(config.store)
    parts = list(_parts(store, config.groups))
    device = resolve_device(config.device)
    if not files.exists(folder.child("centers.safetensors")):
        result = kmeans(
            np.concatenate([store.image(part.shard)[part.kept] for part in parts]),
            num_centers=config.num_centers,
            num_iterations=config.num_iterations,
            points_per_center=config.points_per_center,
            seed=config.seed,
            device=device,
        )
        teacher = {f"teacher_{name}": str(store.teacher[name]) for name in ("name", "digest")}
        write_centers(folder.path, result.centers, teacher)
    centers = np.array(read_centers(folder.path))  # a copy: the file is mapped read-only
    sizes, removed_sizes = np.zeros(len(centers), np.int64), np.zeros(len(centers), np.int64)
    total = 0.0
    for part in parts:
        points = Points.of(store.image(part.shard)[np.append(part.kept, part.removed)], metric="cosine")
        labels, distance = assign(points, centers, device=device)
        kept = slice(0, len(part.kept))
        if not files.exists(labels_path(folder.path, part.shard)):
            labels_here = Labels(part.kept.astype(np.uint32), labels[kept].astype(np.uint32), distance[kept])
            write_labels(folder.path, part.shard, labels_here)
        sizes += np.bincount(labels[kept], minlength=len(centers))
        removed_sizes += np.bincount(labels[len(part.kept) :], minlength=len(centers))
        total += float(distance[kept].astype(np.float64).sum())
    return folder.finish(
        {
            "num_centers": config.num_centers,
            "num_labelled": int(sizes.sum()),
            "objective": total / int(sizes.sum()),
            "sizes": _describe(sizes),
            "sizes_before_balance": _describe(sizes + removed_sizes) if config.groups else None,
        }
    )


def _parts(store: Store, groups: str | None) -> Iterator[_Part]:
    """The rows of every shard; `InputError` where the groups belong to another store."""
    for shard in store.shards:
        valid = np.flatnonzero(store.rows(shard.index).valid)
        if groups is None:
            yield _Part(shard.index, valid, valid[:0])
            continue
        part = read_groups(groups, shard.index)
        if not np.array_equal(part.row, valid):
            raise InputError(
                f"{groups} was not made from {store.path}: in shard {shard.index} it has other rows. "
                "Give the store that `balance` read."
            )
        yield _Part(shard.index, valid[part.keep], valid[~part.keep])


def _describe(sizes: np.ndarray) -> dict[str, Any]:
    return {
        "largest": int(sizes.max()),
        "smallest": int(sizes.min()),
        "gini": gini(sizes),
        "histogram": size_histogram(sizes).tolist(),  # clusters of 0, 1, 2 to 3, 4 to 7, ... images
    }
