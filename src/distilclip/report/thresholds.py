"""Compute what balance would do at many thresholds, for the page's slider, and choose pairs to show at each.

By single linkage the forest of a balance folder answers for every threshold. By the other rules the folder's curve has
the thresholds that were computed.

>>> left, right, distance = np.array([0, 1, 3]), np.array([1, 2, 4]), np.array([0.1, 0.2, 0.3], np.float32)
>>> largest_below(left, right, np.array([0, 1, 2, 3])).tolist()
[1, 2, 3, 3]
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Integer

from distilclip import files
from distilclip.data.side_files import FOREST_FILE, ForestEdges, read_forest
from distilclip.data.store import Store
from distilclip.report.gallery import Picture, PictureReader
from distilclip.stage_folder import StageRecord

NUM_THRESHOLDS = 200
NUM_PLACES = 50  # thresholds whose nearest pairs are on the page, of all folders together
PAIRS_SHOWN = 3  # on either side of a threshold
PICTURE = 80  # pixels of the longer side


@dataclass(frozen=True, kw_only=True)
class Outcomes:
    """What balance would do at each of t thresholds, ascending; `chosen` is the place of the folder's own."""

    threshold: Float[np.ndarray, " t"]
    num_groups: Int[np.ndarray, " t"]
    largest_group: Int[np.ndarray, " t"]
    chosen: int


@dataclass(frozen=True, kw_only=True)
class NearPair:
    """Two pictures and their distance."""

    left: Picture
    right: Picture
    distance: float


def outcomes_of(record: StageRecord) -> Outcomes | None:
    """Return the groups at every threshold of a finished balance folder; None where it has no curve.

    The folder's own numbers stand at its own threshold.

    Raises:
        InputError: the forest is damaged.
    """
    result = record.result
    if not result["curve"]:
        return None
    points = {p["threshold"]: (p["num_groups"], p["largest_group"]) for p in result["curve"] if p["threshold"] > 0}
    if forest_answers(record):
        forest = read_forest(record.path)
        steps = result.get("max_threshold", max(points)) * np.arange(1, NUM_THRESHOLDS + 1) / NUM_THRESHOLDS
        below = edges_below(forest, steps)
        largest = largest_below(forest.left, forest.right, below)
        groups = result["num_valid"] - below
        points = dict(zip(steps.tolist(), zip(groups.tolist(), largest.tolist(), strict=True), strict=True))
    points[result["threshold"]] = (result["num_groups"], result["largest_group"])
    thresholds = sorted(points)
    return Outcomes(
        threshold=np.array(thresholds),
        num_groups=np.array([points[t][0] for t in thresholds]),
        largest_group=np.array([points[t][1] for t in thresholds]),
        chosen=thresholds.index(result["threshold"]),
    )


def forest_answers(record: StageRecord) -> bool:
    """Whether the edges below a threshold join the groups of it: by a rule of single linkage, with its forest there."""
    joined_by_edges = record.result.get("rule", "union-find") in ("union-find", "topk")
    return joined_by_edges and files.exists(files.join(record.path, FOREST_FILE))


def edges_below(forest: ForestEdges, thresholds: Float[np.ndarray, " t"]) -> Int[np.ndarray, " t"]:
    """Return how many edges each threshold joins; as `balance` does, distances are compared in float32."""
    return np.searchsorted(forest.distance, thresholds.astype(np.float32), side="left")


def largest_below(
    left: Integer[np.ndarray, " e"], right: Integer[np.ndarray, " e"], stops: Int[np.ndarray, " t"]
) -> Int[np.ndarray, " t"]:
    """Return the size of the largest group that the first edges of a forest join, for each number of edges, ascending.

    All edges between two stops are joined at once: hooked to smaller rows, then followed up, until nothing moves.
    """
    rows, ends = np.unique(np.concatenate([left, right]), return_inverse=True)
    parent, size = np.arange(len(rows)), np.ones(len(rows), np.int64)
    ends = ends.reshape(2, -1)

    def roots(of: Int[np.ndarray, " m"]) -> Int[np.ndarray, " m"]:
        found = parent[of]
        while (found != parent[found]).any():
            found = parent[found]
        parent[of] = found
        return found

    largest, sizes = 1, []
    for start, stop in itertools.pairwise([0, *stops.tolist()]):
        a, b = roots(ends[0, start:stop]), roots(ends[1, start:stop])
        before = np.unique(np.concatenate([a, b]))
        while (apart := a != b).any():
            a, b = a[apart], b[apart]
            np.minimum.at(parent, np.maximum(a, b), np.minimum(a, b))
            a, b = roots(a), roots(b)
        after = roots(before)
        moved = before != after
        np.add.at(size, after[moved], size[before[moved]])
        largest = max(largest, int(size[after].max(initial=1)))
        sizes.append(largest)
    return np.array(sizes, np.int64)


def choose_near_edges(
    forest: ForestEdges, thresholds: Float[np.ndarray, " t"], *, chosen: int, num_places: int
) -> Int[np.ndarray, " m"]:
    """Return the edges nearest to some thresholds, `PAIRS_SHOWN` on either side; the chosen one is among them."""
    places = np.unique(np.append(np.linspace(0, len(thresholds) - 1, num_places).round().astype(int), chosen))
    around = edges_below(forest, thresholds[places])[:, None] + np.arange(-PAIRS_SHOWN, PAIRS_SHOWN)
    return np.unique(np.clip(around, 0, len(forest.left) - 1)) if len(forest.left) else np.empty(0, np.int64)


def read_near_pairs(record: StageRecord, store: Store, outcomes: Outcomes, *, num_places: int) -> list[NearPair]:
    """Return pairs of pictures nearest to the thresholds, by ascending distance; those that can be read.

    Raises:
        InputError: the forest or the store is damaged.
    """
    if not forest_answers(record):
        return []
    forest = read_forest(record.path)
    reader = PictureReader(store, size=PICTURE)
    edges = choose_near_edges(forest, outcomes.threshold, chosen=outcomes.chosen, num_places=num_places)
    pairs = []
    for edge in edges.tolist():
        left, right = reader.picture(int(forest.left[edge])), reader.picture(int(forest.right[edge]))
        if left.image and right.image:
            pairs.append(NearPair(left=left, right=right, distance=float(forest.distance[edge])))
    reader.close()
    return pairs


def slider_data(outcomes: Outcomes, pairs: list[NearPair], *, num_valid: int, metric: str) -> dict[str, Any]:
    """Return what the page's script needs for one slider, as JSON values; a picture that recurs is there once."""
    pictures: dict[Picture, int] = {}
    for pair in pairs:
        for picture in (pair.left, pair.right):
            pictures.setdefault(picture, len(pictures))
    return {
        "metric": metric,
        "num_valid": num_valid,
        "threshold": outcomes.threshold.tolist(),
        "num_groups": outcomes.num_groups.tolist(),
        "largest_group": outcomes.largest_group.tolist(),
        "chosen": outcomes.chosen,
        "pictures": [[p.image, p.width, p.height, p.caption, p.key] for p in pictures],
        "pairs": [[pictures[p.left], pictures[p.right], p.distance] for p in pairs],
    }
