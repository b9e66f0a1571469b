"""Spherical k-means of the kept images: unit centers for the cluster term, and every kept image's label."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Float32, Int

from distilclip import files, stage_folder
from distilclip.clustering.kmeans import (
    REPAIRS,
    check_num_centers,
    first_centers,
    gini,
    is_finished,
    sample_rows,
    size_histogram,
)
from distilclip.clustering.rounds import Labelling, Rounds, kept_and_removed, parts_of
from distilclip.clustering.sketches import choose_projection
from distilclip.data.images import ImageMatrix
from distilclip.data.side_files import write_centers
from distilclip.data.store import Store
from distilclip.devices import resolve_device
from distilclip.engine import Engine, connected, map_parts
from distilclip.errors import InputError
from distilclip.progress import progress, say
from distilclip.vectors.points import Points

ROUNDS = "rounds"  # the folder of what a fit needs between its rounds; gone when the stage is finished


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
    tolerance: float = 0.0
    """stop when a round lowers the objective by less than this share of it (default: when nothing changes)"""
    points_per_center: int | None = None
    """fit on a sample of this many images per center (default: all); every kept image gets its label"""
    seed: int = 0
    """of the sample and of the first centers"""
    device: str = stage_folder.execution("auto")
    """auto (CUDA, then MPS, then CPU), or a torch device; on Ray, cuda gives each worker a GPU of its own"""
    execution: Engine = field(default_factory=Engine)

    def __post_init__(self) -> None:
        for name in ("num_centers", "num_iterations", "points_per_center"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} is {value}; it must be at least 1.")
        if not 0 <= self.tolerance < 1:
            raise InputError(f"tolerance is {self.tolerance}; it must be at least 0 and less than 1.")


def main(config: Config) -> dict[str, Any]:
    """Cluster the images of a store; the folder's result."""
    inputs = [(config.store, "embed")] + ([(config.groups, "balance")] if config.groups else [])
    folder = stage_folder.open_folder(config.out, stage="cluster", config=config, inputs=inputs)
    if folder.finished:
        return folder.result()
    images = ImageMatrix(Store.open(config.store))
    labelling = Labelling(
        store=config.store,
        groups=config.groups,
        folder=folder.path,
        scratch=folder.child(ROUNDS),
        device=config.device,
    )
    shards = range(images.store.num_shards)
    with connected(config.execution):
        if not files.exists(folder.child("centers.safetensors")):
            _fit(config, folder, images)
        _map(labelling.prepare, shards, config, f"label {folder.path}")
    described = _describe_labels(labelling, shards, config.num_centers)
    files.remove_folder(folder.child(ROUNDS))
    return folder.finish(
        {"num_centers": config.num_centers, **stage_folder.read_json(folder.child("fit.json")), **described}
    )


def _fit(config: Config, folder: stage_folder.Folder, images: ImageMatrix) -> None:
    """Write centers.safetensors, and before it fit.json; each round is a checkpoint."""
    rounds = Rounds(store=config.store, folder=folder.child(ROUNDS), device=config.device)
    number = rounds.current(config.num_iterations + REPAIRS)
    if number is None:
        number = 0
        _begin(config, rounds, images)
    rows = rounds.rows()
    per_shard = np.diff(np.searchsorted(rows, images.starts)).tolist()
    # With as many rows as centers, the sums of a part take at most four times the bytes of its rows.
    parts = parts_of(per_shard, least=len(rows) if config.execution.engine == "local" else config.num_centers)
    while True:
        _map(partial(rounds.prepare, number), parts, config, f"round {number} of {folder.path}")
        centers, sums = np.array(rounds.centers(number)), rounds.sums(number, parts)
        objectives = [*rounds.objectives(number), sums.objective(centers)]
        say(f"cluster: round {number}: objective {objectives[-1]:.6f}, {int((sums.count == 0).sum())} empty clusters")
        finished = is_finished(objectives, config.num_iterations, sums.count, tolerance=config.tolerance)
        if finished or not sums.renew(centers):
            break
        number += 1
        rounds.begin(number, centers, objectives)
    stage_folder.write_json(folder.child("fit.json"), {"num_fitted": len(rows), "objectives": objectives})
    _write_centers(folder.path, centers, images.store)


def _begin(config: Config, rounds: Rounds, images: ImageMatrix) -> None:
    """Choose the rows to fit to, and draw the first centers from them."""
    kept = _kept_rows(images, config.groups)
    check_num_centers(config.num_centers, len(kept))
    random = np.random.default_rng(config.seed)
    rows, sample = sample_rows(
        len(kept), num_centers=config.num_centers, points_per_center=config.points_per_center, random=random
    )
    rounds.write_rows(kept[rows])
    points = Points.of(images.take(kept[sample]), metric="cosine")
    device = resolve_device(config.device)
    everyone = np.arange(len(points))
    centers = first_centers(points, everyone, num_centers=config.num_centers, random=random, device=device)
    rounds.write_projection(choose_projection(points, everyone, centers))
    rounds.begin(0, centers, [])


def _kept_rows(images: ImageMatrix, groups: str | None) -> Int[np.ndarray, " n"]:
    """Of all shards, counted through them."""
    kept = [start + kept_and_removed(images.store, groups, shard)[0] for shard, start in enumerate(images.starts[:-1])]
    return np.concatenate([np.empty(0, np.int64), *kept])


def _write_centers(path: str, centers: Float32[np.ndarray, "k dim"], store: Store) -> None:
    write_centers(path, centers, {f"teacher_{name}": str(store.teacher[name]) for name in ("name", "digest")})


def _map(prepare: Callable[[], Callable[[Any], Any]], parts: Any, config: Config, description: str) -> None:
    with progress(description, len(parts)) as advance:
        for _ in map_parts(prepare, parts, engine=config.execution, device=config.device):
            advance(1, 0)


def _describe_labels(labelling: Labelling, shards: range, num_centers: int) -> dict[str, Any]:
    """Sizes and objective, from the labels of all shards."""
    sizes, removed_sizes = np.zeros(num_centers, np.int64), np.zeros(num_centers, np.int64)
    total = 0.0
    for shard in shards:
        labels, removed = labelling.labels(shard)
        np.add.at(sizes, labels.cluster, 1)
        np.add.at(removed_sizes, removed, 1)
        total += float(labels.distance.astype(np.float64).sum())
    return {
        "num_labelled": int(sizes.sum()),
        "objective": total / int(sizes.sum()),
        "sizes": _describe(sizes),
        "sizes_before_balance": _describe(sizes + removed_sizes) if labelling.groups else None,
    }


def _describe(sizes: np.ndarray) -> dict[str, Any]:
    return {
        "largest": int(sizes.max()),
        "smallest": int(sizes.min()),
        "gini": gini(sizes),
        "histogram": size_histogram(sizes).tolist(),  # clusters of 0, 1, 2 to 3, 4 to 7, ... images
    }
