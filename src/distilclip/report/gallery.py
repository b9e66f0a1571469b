"""Which groups and clusters are worth looking at: choices by number, then their pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Integer, UInt64

from distilclip.report.pictures import Picture, PictureReader

SIDES = {
    "under": "Just under the threshold: these were joined",
    "over": "Just over it: these were not",
}
KINDS = {
    "largest": "The representatives that stand for most others",
    "random": "Drawn at random from the other groups",
    "borderline": "The removed pictures whose distance lies nearest to the threshold",
}


@dataclass(frozen=True, kw_only=True)
class Removal:
    """One kept sample, and some of the samples that were removed because of it. Samples are ids."""

    kept: int
    removed: list[int]
    distance: list[float]
    num_removed: int


@dataclass(frozen=True, kw_only=True)
class Strip:
    """One cluster: its size, and some of its samples from the nearest to the center to the farthest."""

    cluster: int
    num_samples: int
    samples: list[int]
    distance: list[float]


@dataclass(frozen=True, kw_only=True)
class Shown:
    """A picture and its distance to the representative or center; None for a representative itself."""

    picture: Picture
    distance: float | None = None


@dataclass(frozen=True, kw_only=True)
class Group:
    """A removal with its pictures, the kept one first."""

    kept: Shown
    removed: list[Shown]
    num_removed: int


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two pictures next to the threshold; the second carries their distance."""

    left: Shown
    right: Shown


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """A strip with its pictures."""

    cluster: int
    num_samples: int
    members: list[Shown]


def choose_removals(
    samples: UInt64[np.ndarray, " n"],
    representative: UInt64[np.ndarray, " n"],
    distance: Float[np.ndarray, " n"],
    *,
    threshold: float,
    num_groups: int,
    num_pictures: int,
    seed: int,
) -> dict[str, list[Removal]]:
    """Removed samples by what they were removed for: up to `num_groups` of each of `KINDS`, none twice.

    The arrays hold the removed samples only. Ties fall to the smaller id, so equal input gives equal choices. Of the
    borderline groups those removals are shown whose distances lie nearest to `threshold`; of the others, removals
    spread evenly over the distances, the farthest included.
    """
    if not len(samples):
        return {kind: [] for kind in KINDS}
    kept, place, counts = np.unique(representative, return_inverse=True, return_counts=True)
    order = np.argsort(place, kind="stable")
    members = np.split(order, np.cumsum(counts)[:-1])
    gap = np.abs(distance.astype(np.float64) - threshold)
    free = np.ones(len(kept), bool)

    def take(candidates: Sequence[int] | Int[np.ndarray, " c"]) -> list[int]:
        chosen = list(dict.fromkeys(int(c) for c in candidates if free[c]))[:num_groups]
        free[chosen] = False
        return sorted(chosen, key=lambda c: (-counts[c], c))

    largest = take(np.lexsort((kept, -counts)))
    borderline = take(place[np.lexsort((samples, gap))])
    drawn = take(np.random.default_rng(seed).permutation(len(kept)))

    def removal(group: int, key: Float[np.ndarray, " n"], spread: bool) -> Removal:
        rows = members[group]
        rows = rows[np.lexsort((samples[rows], key[rows]))]
        rows = rows[_evenly(len(rows), num_pictures)] if spread else rows[:num_pictures]
        rows = rows[np.lexsort((samples[rows], distance[rows]))]
        return Removal(
            kept=int(kept[group]),
            removed=[int(s) for s in samples[rows]],
            distance=[float(d) for d in distance[rows]],
            num_removed=int(counts[group]),
        )

    return {
        "largest": [removal(g, distance, True) for g in largest],
        "random": [removal(g, distance, True) for g in drawn],
        "borderline": [removal(g, gap, False) for g in borderline],
    }


def choose_strips(
    samples: UInt64[np.ndarray, " n"],
    cluster: Integer[np.ndarray, " n"],
    distance: Float[np.ndarray, " n"],
    *,
    num_clusters: int,
    num_pictures: int,
) -> dict[str, list[Strip]]:
    """The `num_clusters` largest and smallest clusters that have any member, none twice; ties by cluster number."""
    found, place, counts = np.unique(cluster, return_inverse=True, return_counts=True)
    by_size = np.lexsort((found, -counts))
    largest = by_size[:num_clusters].tolist()
    smallest = by_size[num_clusters:][::-1][:num_clusters].tolist()

    def strip(index: int) -> Strip:
        rows = np.flatnonzero(place == index)
        rows = rows[np.lexsort((samples[rows], distance[rows]))]
        rows = rows[_evenly(len(rows), num_pictures)]
        return Strip(
            cluster=int(found[index]),
            num_samples=int(counts[index]),
            samples=[int(s) for s in samples[rows]],
            distance=[float(d) for d in distance[rows]],
        )

    return {"largest": [strip(i) for i in largest], "smallest": [strip(i) for i in smallest]}


def picture_group(removal: Removal, reader: PictureReader) -> Group:
    """The pictures of one removal."""
    return Group(
        kept=Shown(picture=reader.picture(removal.kept)),
        removed=_shown(removal.removed, removal.distance, reader),
        num_removed=removal.num_removed,
    )


def picture_pairs(pairs: Sequence[Mapping[str, Any]], reader: PictureReader, *, number: int) -> list[Pair]:
    """The pictures of the first few of the pairs that `balance` lists: sample ids and their distance."""
    return [
        Pair(
            left=Shown(picture=reader.picture(pair["left"])),
            right=Shown(picture=reader.picture(pair["right"]), distance=pair["distance"]),
        )
        for pair in pairs[:number]
    ]


def picture_cluster(strip: Strip, reader: PictureReader) -> Cluster:
    """The pictures of one cluster."""
    return Cluster(
        cluster=strip.cluster,
        num_samples=strip.num_samples,
        members=_shown(strip.samples, strip.distance, reader),
    )


def _shown(samples: Sequence[int], distance: Sequence[float], reader: PictureReader) -> list[Shown]:
    return [Shown(picture=reader.picture(s), distance=d) for s, d in zip(samples, distance, strict=True)]


def _evenly(length: int, number: int) -> Int[np.ndarray, " m"]:
    """At most `number` places of `length`, evenly spaced, first and last included."""
    if length <= number:
        return np.arange(length)
    return np.unique(np.linspace(0, length - 1, number).round().astype(int))
