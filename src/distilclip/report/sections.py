"""The sections of the page: what each shows, taken from the stage folders. A section without its folders is empty."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from distilclip import files
from distilclip.data.side_files import read_groups, read_labels
from distilclip.data.store import Store, sample_id
from distilclip.errors import InputError
from distilclip.report.charts import Chart, cluster_chart, threshold_chart
from distilclip.report.gallery import (
    SIDES,
    Cluster,
    Group,
    Pair,
    choose_removals,
    choose_strips,
    picture_cluster,
    picture_group,
    picture_pairs,
)
from distilclip.report.load import Results
from distilclip.report.pictures import PictureReader
from distilclip.stage_folder import StageRecord
from distilclip.vectors.metric import equivalents


@dataclass(frozen=True, kw_only=True)
class Embedding:
    """What one embed folder holds, the rows it could not use, by reason, and the shards that end too early."""

    path: str
    teacher: str
    num_rows: int
    num_shards: int
    bad: list[tuple[str, int]]
    truncated: list[str]

    @property
    def num_bad(self) -> int:
        """Rows that no later stage uses."""
        return sum(number for _, number in self.bad)


@dataclass(frozen=True, kw_only=True)
class Gallery:
    """Pictures by kind. `problem` says why there are none."""

    groups: dict[str, list[Group]]
    pairs: dict[str, list[Pair]]  # next to the threshold, by side
    problem: str = ""


@dataclass(frozen=True, kw_only=True)
class CurvePoint:
    """A line of the threshold curve's table; `thresholds` is the same one in every metric, the folder's own first."""

    thresholds: dict[str, float]
    removed_ratio: float
    num_groups: int
    largest_group: int
    chosen: bool


@dataclass(frozen=True, kw_only=True)
class Balance:
    """One balance folder. `curve` has a few of the chart's points; `threshold` is in `metric`."""

    path: str
    metric: str
    threshold: float
    result: dict[str, Any]
    chart: Chart | None
    curve: list[CurvePoint]
    gallery: Gallery

    @property
    def largest_share(self) -> float:
        """The share of the valid images that the largest group holds: a large one is a sign of chaining."""
        return self.result["largest_group"] / max(self.result["num_valid"], 1)

    @property
    def chained_share(self) -> float:
        """The share of the removed images that lie over the threshold from the image kept for them."""
        return self.result["chained"] / max(self.result["num_valid"] - self.result["num_kept"], 1)

    @property
    def thresholds(self) -> dict[str, float]:
        """The threshold in every metric, the folder's own first."""
        return _equivalents(self.threshold, self.metric)


@dataclass(frozen=True, kw_only=True)
class Clustering:
    """One cluster folder: sizes over all labelled rows, and picture strips by kind."""

    path: str
    result: dict[str, Any]
    chart: Chart
    strips: dict[str, list[Cluster]]
    problem: str = ""


def embeddings(results: Results) -> list[Embedding]:
    """Every embed folder: its size and its bad rows."""
    found = []
    for folder in results.finished("embed"):
        result = folder.result
        reasons: dict[str, int] = result["reasons"]
        found.append(
            Embedding(
                path=folder.path,
                teacher=result["teacher"]["name"],
                num_rows=result["num_rows"],
                num_shards=result["num_shards"],
                bad=sorted(reasons.items(), key=lambda item: (-item[1], item[0])),
                truncated=result["truncated"],
            )
        )
    return found


def balances(results: Results, *, num_groups: int, num_pictures: int, thumbnail_size: int, seed: int) -> list[Balance]:
    """Every balance folder with its curve and gallery; `num_groups` of each kind, `num_pictures` removed ones each."""
    found = []
    for number, folder in enumerate(results.finished("balance")):
        result = folder.result
        metric, threshold, curve = result["metric"], result["threshold"], result["curve"]
        try:
            store = _store_of(folder, results)
            removals = choose_removals(
                *_removed_rows(folder.path, store),
                threshold=threshold,
                num_groups=num_groups,
                num_pictures=num_pictures,
                seed=seed,
            )
            reader = PictureReader(store, size=thumbnail_size)
            groups = {kind: [picture_group(r, reader) for r in chosen] for kind, chosen in removals.items()}
            borderline = result["borderline"]
            pairs = {side: picture_pairs(borderline[side], reader, number=2 * num_groups) for side in SIDES}
            reader.close()
            every = [shown for kind in groups.values() for g in kind for shown in (g.kept, *g.removed)]
            gallery = Gallery(
                groups=groups, pairs=pairs, problem=_shared_problem([shown.picture.problem for shown in every])
            )
        except InputError as error:
            gallery = Gallery(groups={}, pairs={}, problem=str(error))
        found.append(
            Balance(
                path=folder.path,
                metric=metric,
                threshold=threshold,
                result=result,
                chart=threshold_chart(curve, metric, threshold, number) if len(curve) > 1 else None,
                curve=_few_points(curve, metric, threshold),
                gallery=gallery,
            )
        )
    return found


def clusterings(results: Results, *, num_clusters: int, num_pictures: int, thumbnail_size: int) -> list[Clustering]:
    """Every cluster folder with its sizes and picture strips; `num_clusters` largest and as many smallest."""
    found = []
    for number, folder in enumerate(results.finished("cluster")):
        result = folder.result
        strips: dict[str, list[Cluster]] = {}
        try:
            store = _store_of(folder, results)
            chosen = choose_strips(
                *_labelled_rows(folder.path, store), num_clusters=num_clusters, num_pictures=num_pictures
            )
            reader = PictureReader(store, size=thumbnail_size)
            strips = {kind: [picture_cluster(strip, reader) for strip in many] for kind, many in chosen.items()}
            reader.close()
            every = [shown.picture.problem for many in strips.values() for c in many for shown in c.members]
            problem = _shared_problem(every)
        except InputError as error:
            problem = str(error)
        chart = cluster_chart(result, number)
        found.append(Clustering(path=folder.path, result=result, chart=chart, strips=strips, problem=problem))
    return found


def _few_points(curve: list[dict[str, Any]], metric: str, threshold: float, number: int = 11) -> list[CurvePoint]:
    """Some points of the curve, evenly spaced, and the one nearest to the chosen threshold, which is marked."""
    if not curve:
        return []
    nearest = min(range(len(curve)), key=lambda i: abs(curve[i]["threshold"] - threshold))
    places = {round(i * (len(curve) - 1) / (number - 1)) for i in range(number)} | {nearest}
    return [
        CurvePoint(
            thresholds=_equivalents(curve[place]["threshold"], metric),
            removed_ratio=curve[place]["removed_ratio"],
            num_groups=curve[place]["num_groups"],
            largest_group=curve[place]["largest_group"],
            chosen=place == nearest,
        )
        for place in sorted(places)
    ]


def _equivalents(threshold: float, metric: str) -> dict[str, float]:
    """A threshold in every metric, `metric` first; a curve may begin at 0, which is 0 in all of them."""
    same = equivalents(threshold, metric) if threshold > 0 else dict.fromkeys(equivalents(1.0, metric), 0.0)
    return {metric: same[metric], **same}


def _store_of(folder: StageRecord, results: Results) -> Store:
    """The store that a balance or cluster folder was made for, or the only one of this report if that has moved."""
    path = str(folder.config["store"])
    found = results.finished("embed")
    return Store.open(path if files.exists(path) or len(found) != 1 else found[0].path)


def _removed_rows(path: str, store: Store) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids, representatives and distances of the valid rows that were not kept."""
    columns: list[tuple[np.ndarray, ...]] = []
    for shard in store.shards:
        groups = read_groups(path, shard.index)
        samples = sample_id(shard.index, groups.row)
        columns.append(tuple(column[~groups.keep] for column in (samples, groups.representative, groups.distance)))
    return _concatenate(columns)


def _labelled_rows(path: str, store: Store) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids, clusters and distances of the rows that have a label."""
    columns: list[tuple[np.ndarray, ...]] = []
    for shard in store.shards:
        labels = read_labels(path, shard.index)
        columns.append((sample_id(shard.index, labels.row), labels.cluster.astype(np.int64), labels.distance))
    return _concatenate(columns)


def _concatenate(columns: list[tuple[np.ndarray, ...]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    first, second, third = (np.concatenate(parts) for parts in zip(*columns, strict=True))
    return first, second, third


def _shared_problem(problems: list[str]) -> str:
    """The first problem, where no picture at all could be read."""
    return problems[0] if problems and all(problems) else ""
