"""Choose groups and clusters that are worth a look, and read their pictures as thumbnails.

Pictures are read from the shards through the store's offsets and stand in the page as JPEG data URIs.
"""

from __future__ import annotations

import base64
import dataclasses
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Integer, UInt64
from PIL import Image

from distilclip import files
from distilclip.data.samples import BadSample, decode_image
from distilclip.data.shards import Shard, open_shard
from distilclip.data.store import Rows, Store, split_id
from distilclip.errors import InputError
from distilclip.report.phrases import count

SIDES = {
    "under": "Just under the threshold: near enough to be joined",
    "over": "Just over it: too far",
}
KINDS = {
    "largest": "The representatives that stand for most others",
    "random": "Drawn at random from the other groups",
    "borderline": "The removed pictures whose distance lies nearest to the threshold",
}


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One sample as the page shows it. `image` is a data URI, empty where the picture cannot be had: see `problem`."""

    key: str
    place: str
    caption: str
    image: str = ""
    width: int = 0
    height: int = 0
    problem: str = ""


@dataclass(frozen=True, kw_only=True)
class Strip:
    """Some samples of a group, pair or cluster, by their ids, and what stands over them.

    `distance` is that of each sample to the kept one, to the other of its pair, or to its center; None for a sample
    that the others are compared with. In a selection it is the sample's score. `pictures` are filled in by
    `read_strips`.
    """

    title: str = ""
    detail: str = ""
    samples: list[int]
    distance: list[float | None]
    kept: bool = False
    """whether the first sample is the one that was kept"""
    pictures: tuple[Picture, ...] = ()


def choose_removals(
    samples: UInt64[np.ndarray, " n"],
    representative: UInt64[np.ndarray, " n"],
    distance: Float[np.ndarray, " n"],
    *,
    threshold: float,
    num_groups: int,
    num_pictures: int,
    seed: int,
    num_pages: int = 1,
) -> dict[str, list[Strip]]:
    """Choose up to `num_groups` groups of each of `KINDS` for a page, none twice: the kept sample, then some removed.

    The arrays hold the removed samples only. Ties fall to the smaller id, so equal input gives equal choices. Of the
    borderline groups, the removed samples are those whose distances lie nearest to `threshold`. Of the others, they
    are spread evenly over the distances, the farthest included. A page is chosen when those before it are full.
    """
    if not len(samples):
        return {kind: [] for kind in KINDS}
    kept, place, counts = np.unique(representative, return_inverse=True, return_counts=True)
    order = np.argsort(place, kind="stable")
    members = np.split(order, np.cumsum(counts)[:-1])
    gap = np.abs(distance.astype(np.float64) - threshold)
    free = np.ones(len(kept), bool)
    order_of: dict[str, Int[np.ndarray, " c"]] = {
        "largest": np.lexsort((kept, -counts)),
        "borderline": place[np.lexsort((samples, gap))],
        "random": np.random.default_rng(seed).permutation(len(kept)),
    }
    taken: dict[str, list[int]] = {kind: [] for kind in KINDS}
    for _ in range(num_pages):
        for kind, candidates in order_of.items():
            chosen = _first_different(candidates[free[candidates]], num_groups)
            free[chosen] = False
            taken[kind] += sorted(chosen, key=lambda c: (-counts[c], c))

    def removal(group: int, key: Float[np.ndarray, " n"], spread: bool) -> Strip:
        rows = members[group]
        rows = rows[np.lexsort((samples[rows], key[rows]))]
        rows = rows[spread_evenly(len(rows), num_pictures)] if spread else rows[:num_pictures]
        rows = rows[np.lexsort((samples[rows], distance[rows]))]
        return Strip(
            title=f"{count(int(counts[group]))} removed",
            detail=f"{len(rows)} shown" if len(rows) < counts[group] else "",
            samples=[int(kept[group]), *(int(s) for s in samples[rows])],
            distance=[None, *(float(d) for d in distance[rows])],
            kept=True,
        )

    return {
        kind: [removal(g, gap, False) if kind == "borderline" else removal(g, distance, True) for g in groups]
        for kind, groups in taken.items()
    }


def _first_different(candidates: Int[np.ndarray, " c"], number: int) -> list[int]:
    found: dict[int, None] = {}
    for candidate in map(int, candidates):
        found[candidate] = None
        if len(found) == number:
            break
    return list(found)


def choose_pairs(pairs: Sequence[Mapping[str, Any]], *, num_pairs: int) -> list[Strip]:
    """Take the first few of the pairs next to the threshold that `balance` lists: two sample ids and a distance."""
    return [Strip(samples=[p["left"], p["right"]], distance=[None, p["distance"]]) for p in pairs[:num_pairs]]


def choose_borderline(borderline: Mapping[str, Sequence[Mapping[str, Any]]], *, num_pairs: int) -> list[Strip]:
    """Put the pairs just kept beside those just removed, nearest to the cut first: two sample ids and their scores."""
    kept, removed = ([*borderline[side][:num_pairs]] for side in ("kept", "removed"))
    shown = [[*kept[at : at + 1], *removed[at : at + 1]] for at in range(max(len(kept), len(removed)))]
    return [
        Strip(samples=[p["id"] for p in both], distance=[p["score"] for p in both], kept=at < len(kept))
        for at, both in enumerate(shown)
    ]


def choose_clusters(
    samples: UInt64[np.ndarray, " n"],
    cluster: Integer[np.ndarray, " n"],
    distance: Float[np.ndarray, " n"],
    *,
    num_clusters: int,
    num_pictures: int,
    num_pages: int = 1,
) -> dict[str, list[Strip]]:
    """Choose for a page the `num_clusters` largest and smallest clusters that have any member, none twice.

    Each strip runs from the sample nearest to the center to the farthest. Ties fall to the smaller cluster number.
    """
    found, place, counts = np.unique(cluster, return_inverse=True, return_counts=True)
    by_size = np.lexsort((found, -counts))
    largest: list[int] = []
    smallest: list[int] = []
    for _ in range(num_pages):
        largest += by_size[:num_clusters].tolist()
        by_size = by_size[num_clusters:]
        smallest += by_size[::-1][:num_clusters].tolist()
        by_size = by_size[: max(len(by_size) - num_clusters, 0)]

    def strip(index: int) -> Strip:
        rows = np.flatnonzero(place == index)
        rows = rows[np.lexsort((samples[rows], distance[rows]))]
        rows = rows[spread_evenly(len(rows), num_pictures)]
        return Strip(
            title=f"Cluster {found[index]}",
            detail=f"{count(int(counts[index]))} picture" + ("" if counts[index] == 1 else "s"),
            samples=[int(s) for s in samples[rows]],
            distance=[float(d) for d in distance[rows]],
        )

    return {"largest": [strip(i) for i in largest], "smallest": [strip(i) for i in smallest]}


def read_strips(strips: Mapping[str, Sequence[Strip]], store: Store, *, size: int) -> dict[str, list[Strip]]:
    """Return the strips with their pictures, at most `size` pixels on their longer side.

    Raises:
        InputError: no picture at all can be read; the first one's reason.
    """
    reader = PictureReader(store, size=size)
    found = {
        kind: [dataclasses.replace(s, pictures=tuple(map(reader.picture, s.samples))) for s in chosen]
        for kind, chosen in strips.items()
    }
    reader.close()
    problems = [p.problem for kind in found.values() for strip in kind for p in strip.pictures]
    if problems and all(problems):
        raise InputError(problems[0])
    return found


class PictureReader:
    """Thumbnails by sample id; shards and row tables stay open between reads."""

    def __init__(self, store: Store, *, size: int) -> None:
        self.store = store
        self.size = size
        self._shards: dict[str, Shard] = {}
        self._rows: dict[int, Rows] = {}

    def picture(self, sample: int) -> Picture:
        """Return the thumbnail of a sample id (`shard << 32 | row`).

        A picture that cannot be read any more (the tar was moved, say) is a `Picture` with a `problem`, no error: the
        page is worth having without it.
        """
        shard, row = (int(part) for part in split_id(sample))
        if shard not in self._rows:
            self._rows[shard] = self.store.rows(shard)
        rows, uri = self._rows[shard], self.store.shards[shard].uri
        key, place = rows.key[row], f"{uri}, row {row}"
        try:
            self.store.require_pictures()
        except InputError as error:
            return Picture(key=key, place=place, caption="", problem=str(error))
        return self.picture_at(uri, key=key, offset=int(rows.offset[row]), size=int(rows.size[row]), place=place)

    def picture_at(self, uri: str, *, key: str, offset: int, size: int, place: str) -> Picture:
        """Return the thumbnail of a picture in a shard, or of a file where there is no `key`."""
        try:
            caption = ""
            if key:
                if uri not in self._shards:
                    self._shards[uri] = open_shard(uri, self.store.csv_columns)
                stored = self._shards[uri].read(offset, size)
                content, caption = stored.image, stored.caption or ""
            else:
                content = files.read_bytes(uri)
            if content is None:
                raise BadSample("no image", where=place)
            image = decode_image(content, draft=(self.size, self.size), where=place)
        except (BadSample, InputError, OSError) as error:
            return Picture(key=key, place=place, caption="", problem=str(error))
        address, (width, height) = thumbnail(image, self.size)
        return Picture(key=key, place=place, caption=caption, image=address, width=width, height=height)

    def close(self) -> None:
        """Close the shards."""
        for shard in self._shards.values():
            shard.close()


def thumbnail(image: Image.Image, size: int) -> tuple[str, tuple[int, int]]:
    """Return `image` as a JPEG data URI, its longer side at most `size` pixels and never enlarged; width and height."""
    small = image.copy()
    small.thumbnail((size, size), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=82, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode(), small.size


def spread_evenly(length: int, number: int) -> Int[np.ndarray, " m"]:
    """Return at most `number` places of `length`, evenly spaced, first and last included."""
    if length <= number:
        return np.arange(length)
    return np.unique(np.linspace(0, length - 1, number).round().astype(int))
