"""Check a cluster folder: unit centers, and of every kept row a label in range and the distance to its center."""

from __future__ import annotations

from functools import partial

import numpy as np
from jaxtyping import Float32

from distilclip import files
from distilclip.data.side_files import (
    CENTERS_FILE,
    Labels,
    kept_images,
    labels_name,
    read_centers,
    read_labels,
)
from distilclip.data.store import Store
from distilclip.integrity.findings import Findings, input_of, list_parts, read_or_report

BLOCK_ROWS = 8192
NEAR = 1e-5


def check_labels(found: Findings) -> None:
    """Check the centers, and the labels of every shard against them and against the rows that are kept."""
    found.compare_digests()
    centers = _read_centers(found)
    path, groups = input_of(found, "store"), input_of(found, "groups")
    store = None if path is None else Store.open(path)
    shards = list(range(store.num_shards) if store else list_parts(found.child("labels"), ".parquet"))
    num_labels, num_whole = 0, 0
    for shard in shards:
        name = labels_name(shard)
        if name in found.changed:
            found.add_fault(found.describe_change(name), remove=[name])
            continue
        if not (found.result or files.exists(found.child(name))):
            continue  # not made yet
        labels = read_or_report(found, partial(read_labels, found.path, shard), name, remove=[name])
        if labels is None:
            continue
        num_labels += len(labels.row)
        wrong = _find_wrong(labels, centers)
        if not wrong and store is not None and (groups is None) == (found.config.get("groups") is None):
            wrong = _compare_with_store(store, shard, groups, labels, centers)
        if wrong:
            found.add_fault(f"{found.child(name)}: {wrong}", remove=[name])
        num_whole += not wrong
    counted = found.result.get("num_labelled", num_labels)
    if num_whole == len(shards) and counted != num_labels:
        text = f"{found.child('result.json')} says {counted} rows are labelled; its labels are of {num_labels}"
        found.add_fault(text, remove=["result.json"])
    found.whole.append(f"{num_whole} of {len(shards)} shards: labels of {num_labels:,} rows")


def _read_centers(found: Findings) -> Float32[np.ndarray, "k dim"] | None:
    both = [CENTERS_FILE, "fit.json"]  # the fit writes them together
    bad = [name for name in both if name in found.changed]
    for name in bad:
        found.add_fault(found.describe_change(name), remove=both)
    if bad or not (found.result or files.exists(found.child(CENTERS_FILE))):
        return None
    centers = read_or_report(found, partial(read_centers, found.path), CENTERS_FILE, remove=both)
    if centers is not None:
        found.whole.append(f"{len(centers):,} centers of unit length")
    return centers


def _find_wrong(labels: Labels, centers: Float32[np.ndarray, "k dim"] | None) -> str:
    """Say what is wrong with the labels of a shard, looked at alone; empty where nothing is."""
    if not (np.diff(labels.row.astype(np.int64)) > 0).all():
        return "its rows do not ascend"
    if not ((labels.distance >= -NEAR) & (labels.distance <= 2 + NEAR)).all():
        return "a distance is not between 0 and 2"
    if centers is not None and len(labels.cluster) and int(labels.cluster.max()) >= len(centers):
        return f"a label is {int(labels.cluster.max())}, and there are {len(centers)} centers"
    return ""


def _compare_with_store(
    store: Store, shard: int, groups: str | None, labels: Labels, centers: Float32[np.ndarray, "k dim"] | None
) -> str:
    if not np.array_equal(labels.row, np.flatnonzero(kept_images(store, shard, groups))):
        return "its rows are not the kept rows of the store's shard"
    if centers is None:
        return ""
    image = store.image(shard)
    wrong = sum(
        _count_wrong(image[labels.row[here]], centers[labels.cluster[here]], labels.distance[here])
        for here in (slice(start, start + BLOCK_ROWS) for start in range(0, len(labels.row), BLOCK_ROWS))
    )
    return f"{wrong} rows have another distance to their center than is stored" if wrong else ""


def _count_wrong(image: np.ndarray, centers: np.ndarray, distance: np.ndarray) -> int:
    points = image.astype(np.float64)
    cosine = (points * centers).sum(axis=1) / np.linalg.norm(points, axis=1)
    return int((~(np.abs(1 - cosine - distance) <= NEAR)).sum())
