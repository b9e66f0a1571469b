"""Make the sections about balance, selections and clusters from the stages' folders: charts and picture strips."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from distilclip import files
from distilclip.data.side_files import kept_rows, read_groups, read_labels
from distilclip.data.store import Store, sample_id
from distilclip.errors import InputError
from distilclip.report.charts import Chart, cluster_chart, score_chart, threshold_chart
from distilclip.report.embedding_map import EmbeddingMap, MapSize, make_map
from distilclip.report.figures import CurvePoint
from distilclip.report.gallery import (
    KINDS,
    SIDES,
    Strip,
    choose_borderline,
    choose_clusters,
    choose_pairs,
    choose_removals,
    read_strips,
)
from distilclip.report.load import Results
from distilclip.report.thresholds import NUM_PLACES, outcomes_of, read_near_pairs, slider_data
from distilclip.report.truth import Truth, read_truth
from distilclip.stage_folder import StageRecord


@dataclass(frozen=True, kw_only=True)
class GallerySize:
    """How many pictures to show: `num_groups` and `num_clusters` of each kind, `num_pictures` removed ones in each.

    A gallery has up to `num_pages` pages of as many groups or clusters; all folders of a stage share them. `thumbnail`
    is a picture's longer side in pixels; `seed` draws the random groups.
    """

    num_groups: int
    num_clusters: int
    num_pictures: int
    thumbnail: int
    num_pages: int = 1
    seed: int = 0

    def share(self, num_folders: int) -> GallerySize:
        """Return the size of each of some galleries, at least one page: the whole must stay small enough to open."""
        return replace(self, num_pages=max(1, self.num_pages // max(num_folders, 1)))


@dataclass(frozen=True, kw_only=True)
class Section:
    """What the page shows of one folder of balance, select or cluster. `problem` says why there are no pictures.

    `page_size` is the number of strips on a page of a gallery, by its heading; one without has all on one page.
    Of balance, `curve` holds a few points of the chart for the table, `chosen` the one nearest to the threshold, and
    `truth` what the made-up corpus knows of the choice. `slider` is what the page's script shows of other thresholds,
    and `slider_problem` why there is none.
    """

    record: StageRecord
    chart: Chart | None
    strips: dict[str, list[Strip]]
    """by the heading over them"""
    problem: str
    page_size: dict[str, int] = field(default_factory=dict)
    curve: tuple[CurvePoint, ...] = ()
    chosen: CurvePoint | None = None
    truth: Truth | None = None
    slider: dict[str, Any] | None = None
    slider_problem: str = ""


def balance_sections(results: Results, size: GallerySize) -> list[Section]:
    """Return a section for every finished balance folder."""
    found, records = [], results.finished("balance")
    size = size.share(len(records))
    for number, record in enumerate(records):
        result = record.result
        metric, threshold = result["metric"], result["threshold"]
        curve = [
            CurvePoint(**{name: point[name] for name in CurvePoint.__dataclass_fields__}) for point in result["curve"]
        ]
        nearest = min(range(len(curve)), key=lambda i: abs(curve[i].threshold - threshold), default=0)
        strips, problem = read_or_explain(_balance_strips, record, results, size)
        slider, slider_problem = _slider(record, results, num_places=max(1, NUM_PLACES // len(records)))
        found.append(
            Section(
                record=record,
                chart=threshold_chart(curve, metric, threshold, number) if len(curve) > 1 else None,
                strips=strips,
                problem=problem,
                page_size=dict.fromkeys(SIDES.values(), 2 * size.num_groups)
                | dict.fromkeys(KINDS.values(), size.num_groups),
                curve=tuple(curve[place] for place in _few_places(len(curve), nearest)),
                chosen=curve[nearest] if curve else None,
                truth=_truth(record, results) if not problem else None,
                slider=slider,
                slider_problem=slider_problem,
            )
        )
    return found


def cluster_sections(results: Results, size: GallerySize) -> list[Section]:
    """Return a section for every finished cluster folder."""
    found, records = [], results.finished("cluster")
    size = size.share(len(records))
    for number, record in enumerate(records):
        strips, problem = read_or_explain(_cluster_strips, record, results, size)
        chart = cluster_chart(record.result, number)
        pages = dict.fromkeys(strips, size.num_clusters)
        found.append(Section(record=record, chart=chart, strips=strips, problem=problem, page_size=pages))
    return found


def selection_sections(results: Results, size: GallerySize) -> list[Section]:
    """Return a section for every finished folder of `select`."""
    found, number = [], 0
    for record in results.finished("select"):
        section = Section(record=record, chart=None, strips={}, problem="")
        if "histogram" in record.result:  # a folder that only combines others has no scores
            strips, problem = read_or_explain(_selection_strips, record, results, size)
            score = record.config["column"] if record.result["score"] == "column" else record.result["score"]
            chart = score_chart(record.result, score, number)
            section, number = Section(record=record, chart=chart, strips=strips, problem=problem), number + 1
        found.append(section)
    return found


def _slider(record: StageRecord, results: Results, *, num_places: int) -> tuple[dict[str, Any] | None, str]:
    """Return the data of a balance folder's slider, or why there is none; pictures that cannot be had are left out."""
    try:
        outcomes = outcomes_of(record)
    except InputError as error:
        return None, str(error)
    if outcomes is None:
        return None, ""
    try:
        pairs = read_near_pairs(record, open_store(record, results), outcomes, num_places=num_places)
    except InputError:
        pairs = []  # the gallery says why
    num_valid, metric = record.result["num_valid"], record.result["metric"]
    return slider_data(outcomes, pairs, num_valid=num_valid, metric=metric), ""


def make_map_of(results: Results, size: MapSize) -> tuple[EmbeddingMap | None, str]:
    """Make the map of the first store, by its first balance (else select) and its first cluster; or say why not.

    Without a store there is no map and nothing to say.
    """
    stores = [*results.finished("embed"), *results.finished("import")]
    if not stores:
        return None, ""

    def folder_of(*stages: str) -> str | None:
        found = [record for stage in stages for record in results.finished(stage)]
        return next((r.path for r in found if len(stores) == 1 or _is_at(r.config["store"], stores[0].path)), None)

    try:
        store = Store.open(stores[0].path)
        return make_map(store, size, groups=folder_of("balance", "select"), clusters=folder_of("cluster")), ""
    except InputError as error:
        return None, str(error)


def _is_at(path: str, other: str) -> bool:
    return files.absolute(str(path)) == files.absolute(other)


def _truth(record: StageRecord, results: Results) -> Truth | None:
    try:
        return read_truth(record, open_store(record, results), results.finished("corpus"))
    except InputError:
        return None  # other tars lie there now; the gallery says what it could read


Strips = dict[str, list[Strip]]  # by the heading over them


def read_or_explain(
    read: Callable[[StageRecord, Results, GallerySize], Strips],
    record: StageRecord,
    results: Results,
    size: GallerySize,
) -> tuple[Strips, str]:
    """Return the strips, or why there are none: a page without its pictures is still worth having."""
    try:
        return read(record, results, size), ""
    except InputError as error:
        return {}, str(error)


def _balance_strips(record: StageRecord, results: Results, size: GallerySize) -> Strips:
    """Pairs next to the threshold, then groups, by their headings."""
    store = open_store(record, results)
    result = record.result
    removals = choose_removals(
        *_removed_rows(record.path, store),
        threshold=result["threshold"],
        num_groups=size.num_groups,
        num_pictures=size.num_pictures,
        num_pages=size.num_pages,
        seed=size.seed,
    )
    num_pairs = 2 * size.num_groups * size.num_pages
    chosen = {text: choose_pairs(result["borderline"][side], num_pairs=num_pairs) for side, text in SIDES.items()}
    chosen |= {text: removals[kind] for kind, text in KINDS.items()}
    return read_strips(chosen, store, size=size.thumbnail)


def _selection_strips(record: StageRecord, results: Results, size: GallerySize) -> Strips:
    """Pairs just kept beside pairs just removed."""
    chosen = choose_borderline(record.result["borderline"], num_pairs=3 * size.num_groups)
    return read_strips({"Nearest to the cut": chosen}, open_store(record, results), size=size.thumbnail)


def _cluster_strips(record: StageRecord, results: Results, size: GallerySize) -> Strips:
    """The largest and the smallest clusters, by their headings."""
    store = open_store(record, results)
    chosen = choose_clusters(
        *_labelled_rows(record.path, store),
        num_clusters=size.num_clusters,
        num_pictures=size.num_pictures + 1,
        num_pages=size.num_pages,
    )
    headings = {f"{kind.capitalize()} clusters": strips for kind, strips in chosen.items()}
    return read_strips(headings, store, size=size.thumbnail)


def _few_places(length: int, nearest: int, number: int = 11) -> list[int]:
    """Some places of a curve, evenly spaced, `nearest` among them."""
    return sorted({round(i * (length - 1) / (number - 1)) for i in range(number)} | {nearest}) if length else []


def open_store(record: StageRecord, results: Results) -> Store:
    """Open the store that a folder was made for, or the only one of this report if that has moved."""
    path = str(record.config["store"])
    found = [*results.finished("embed"), *results.finished("import")]
    return Store.open(path if files.exists(path) or len(found) != 1 else found[0].path)


def _removed_rows(path: str, store: Store) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids, representatives and distances of the valid rows that were not kept."""
    columns: list[tuple[np.ndarray, ...]] = []
    for shard in store.shards:
        valid = store.columns(shard.index, "valid").column("valid").to_numpy()
        keep = kept_rows(store, shard.index, valid, path)
        groups = read_groups(path, shard.index)
        removed = ~keep[groups.row]
        samples = sample_id(shard.index, groups.row)
        columns.append(tuple(column[removed] for column in (samples, groups.representative, groups.distance)))
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
