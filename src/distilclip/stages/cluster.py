"""Cluster the kept images by spherical k-means: unit centers for the cluster term, and every kept image's label."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Int

from distilclip import digests, files, stage_folder
from distilclip.clustering.fit_parts import Rounds, choose_num_parts, shard_ranges
from distilclip.clustering.kmeans import REPAIRS, fit_centers, gini, size_histogram, start_fit
from distilclip.clustering.label_parts import Labelling
from distilclip.clustering.sums import Tally
from distilclip.configs.cluster import Config
from distilclip.data.images import ImageMatrix
from distilclip.data.side_files import CENTERS_FILE, kept_images, labels_name
from distilclip.data.store import Store
from distilclip.devices import resolve_device
from distilclip.engine import Workers, connected
from distilclip.messages import say
from distilclip.progress import progress
from distilclip.vectors.points import Points

ROUNDS = "rounds"  # the folder of what a fit needs between its rounds; gone when the stage is finished


def main(config: Config) -> dict[str, Any]:
    """Cluster the images of a store; return the folder's result."""
    folder = stage_folder.open_folder(config.out, stage="cluster", config=config, inputs=config.inputs())
    if folder.finished:
        with contextlib.suppress(OSError):  # of a run that was killed when it had written its result
            files.remove_folder(folder.child(ROUNDS))
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
    with connected(config.execution, device=config.device) as workers:
        if not files.exists(folder.child(CENTERS_FILE)):
            _fit(config, folder, images, workers)
        _map(labelling.prepare, shards, workers, f"label {folder.path}")
    described = _describe_labels(labelling, shards, config.fit.num_centers)
    fit = stage_folder.read_json(folder.child("fit.json"))
    found = digests.digest_files(folder.path, [CENTERS_FILE, "fit.json", *map(labels_name, shards)])
    result = folder.finish({"num_centers": config.fit.num_centers, **fit, **described, "digests": found})
    files.remove_folder(folder.child(ROUNDS))  # last: without it, a run that goes on would label all rows again
    return result


def _fit(config: Config, folder: stage_folder.Folder, images: ImageMatrix, workers: Workers) -> None:
    """Write centers.safetensors, and before it fit.json; each round is a checkpoint."""
    rounds = Rounds(
        store=config.store,
        folder=folder.child(ROUNDS),
        device=config.device,
        num_centers=config.fit.num_centers,
        dim=images.store.dim,
    )
    number = rounds.resume(config.fit.num_iterations + REPAIRS)
    if number is None:
        _start(config, rounds, images)
    objectives = rounds.objectives(number or 0)
    rows = rounds.rows()
    num_parts = choose_num_parts(len(rows), num_centers=rounds.num_centers, num_workers=workers.num_workers)
    parts = shard_ranges(np.diff(np.searchsorted(rows, images.starts)).tolist(), num_parts=num_parts)

    def assign() -> Tally:
        number = len(objectives)
        _map(partial(rounds.prepare_sums, number), parts, workers, f"round {number} of {folder.path}")
        _map(partial(rounds.prepare_move, number, parts), rounds.ranges, workers, f"its centers, {folder.path}")
        return rounds.tally(number)

    def move(tally: Tally) -> bool:
        return rounds.begin_next(len(objectives) - 1, tally, objectives)

    def report(objective: float, num_empty: int) -> None:
        say(f"cluster: round {len(objectives) - 1}: objective {objective:.6f}, {num_empty} empty clusters")

    fit_centers(objectives, assign, move, config.fit, report=report)
    stage_folder.write_json(folder.child("fit.json"), {"num_fitted": len(rows), "objectives": objectives})
    last = partial(rounds.prepare_centers, len(objectives) - 1)
    _map(last, [folder.path], workers, f"write the centers of {folder.path}")


def _start(config: Config, rounds: Rounds, images: ImageMatrix) -> None:
    """Choose the rows to fit to and first centers, and begin the first round with them."""
    images.count_pictureless(stage="cluster")
    kept = _kept_rows(images, config.groups)

    def read(rows: Int[np.ndarray, " m"]) -> tuple[Points, Int[np.ndarray, " m"]]:
        return Points.of(images.take(kept[rows]), metric="cosine"), np.arange(len(rows))

    start = start_fit(len(kept), read, config.fit, device=resolve_device(config.device))
    rounds.start(kept[start.rows], start.projection, start.centers)


def _kept_rows(images: ImageMatrix, groups: str | None) -> Int[np.ndarray, " n"]:
    """Return the kept rows of all shards that have a picture, counted through them."""
    kept = [np.empty(0, np.int64)]
    for shard, start in enumerate(images.starts[:-1]):
        kept.append(start + np.flatnonzero(kept_images(images.store, shard, groups)))
    return np.concatenate(kept)


def _map(prepare: Callable[[], Callable[[Any], Any]], parts: Any, workers: Workers, description: str) -> None:
    with progress(description, len(parts)) as advance:
        for _ in workers.map_parts(prepare, parts):
            advance(1, 0)


def _describe_labels(labelling: Labelling, shards: range, num_centers: int) -> dict[str, Any]:
    """Return sizes and objective, from the labels of all shards."""
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
