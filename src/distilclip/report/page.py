"""Render the page: all sections by one template into one self-contained HTML file."""

from __future__ import annotations

import base64
import hashlib
import importlib.resources
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
from markupsafe import Markup

from distilclip.progress import duration
from distilclip.report import phrases
from distilclip.report.by_class import compare_by_class
from distilclip.report.charts import Chart, curve_data, standings_chart, training_charts
from distilclip.report.comparison import Table, compare
from distilclip.report.efficiency import cost_charts, model_costs
from distilclip.report.embedding_map import EmbeddingMap, MapSize, map_data
from distilclip.report.figures import PALETTE
from distilclip.report.headline import story
from distilclip.report.leaks import copy_sections
from distilclip.report.load import Results
from distilclip.report.roles import Model, models
from distilclip.report.sections import (
    GallerySize,
    balance_sections,
    cluster_sections,
    make_map_of,
    selection_sections,
)
from distilclip.sets.published import PublishedRow, published_notes
from distilclip.sets.score import Score, title
from distilclip.vectors.tolerance import equivalents

# The order in which a run makes them; other stages follow.
STAGES = ("corpus", "embed", "import", "balance", "select", "cluster", "weigh", "pack", "train", "evaluate")

SCRIPTS = ("elements", "galleries", "thresholds", "plot", "curves", "map")


@dataclass(frozen=True, kw_only=True)
class Page:
    """The HTML, its figures by file name, and the sections without content, each with the stage that would fill it.

    `map` is the map of embeddings that the page shows, where it was asked for and can be made.
    """

    html: str
    figures: dict[str, str]
    absent: list[tuple[str, str]]
    map: EmbeddingMap | None = None


def build(
    results: Results,
    *,
    heading: str,
    size: GallerySize,
    published: Sequence[PublishedRow] = (),
    map_size: MapSize | None = None,
) -> Page:
    """Render the page of some results; `published` rows stand below the models' and are compared with nothing.

    With `map_size` it has a map of the first store.
    """
    compared = models(results)
    scores = results.scores
    table = compare([score for score in scores if score.task != "agreement"], compared)
    students = [model for model in compared if model.role != "teacher"]
    agreement = compare([score for score in scores if score.task == "agreement"], students)
    curves = training_charts(compared)
    standings = standings_chart(table)
    costs = model_costs(table, compared)
    drawn_costs = cost_charts(costs, table)
    balances = balance_sections(results, size)
    selections = selection_sections(results, size)
    clusterings = cluster_sections(results, size)
    leaks = copy_sections(results, size)
    mapped, map_problem = make_map_of(results, map_size) if map_size is not None else (None, "")
    absent = _absent(results, has_diagnostics=any(model.training and model.training.diagnostics for model in compared))
    html = _template().render(
        heading=heading,
        story=story(table, results),
        models=compared,
        table=table,
        published=published,
        published_notes=_published_notes(table, published),
        baseline=next((row.model.name for row in table.rows if row.model.role == "baseline"), ""),
        several_seeds=any(row.num_seeds > 1 for row in table.rows),
        is_paired=any(c.difference and c.difference.basis == "images" for row in table.rows for c in row.cells),
        agreement=agreement,
        all_scores=_all_scores(scores, compared),
        by_class=compare_by_class(scores),
        remarks=[*_remarks(scores), *_copy_remarks(results)],
        standings=standings,
        curves=curves,
        costs=costs,
        cost_charts=drawn_costs,
        embeddings=[*results.finished("embed"), *results.finished("import")],
        balances=balances,
        selections=selections,
        clusterings=clusterings,
        leaks=leaks,
        map=mapped,
        map_problem=map_problem,
        folders=sorted(results.folders, key=lambda f: STAGES.index(f.stage) if f.stage in STAGES else len(STAGES)),
        unfinished=results.unfinished,
        absent=absent,
        palette=PALETTE,
        data={
            "sliders": [section.slider for section in balances],
            "curves": curve_data(compared),
            "map": map_data(mapped) if mapped is not None else None,
        },
        script=Markup(script()),
    )
    sections = (*balances, *selections, *clusterings)
    charts: list[Chart | None] = [standings, *curves, *drawn_costs, *(section.chart for section in sections)]
    return Page(
        html=html,
        figures={f"{chart.name}.svg": chart.svg for chart in charts if chart is not None},
        absent=absent,
        map=mapped,
    )


def _published_notes(table: Table, published: Sequence[PublishedRow]) -> list[str]:
    """Say where the published rows that a table shows come from, or that it shows none."""
    if published and not any(table.has_place_for(row) for row in published):
        return ["No published number is for these sets and tasks."]
    sets = {column.task: [c.set for c in table.columns if c.task == column.task] for column in table.columns}
    return [note for task, names in sets.items() for note in published_notes(published, task, names)]


def _all_scores(scores: Sequence[Score], compared: Sequence[Model]) -> list[dict[str, Any]]:
    """Return a row for every metric of every set, with each model's score or None."""
    found = {(s.model, s.task, s.set, s.metric): s for s in scores}
    rows = {(s.task, s.set, s.metric): s.num_test for s in scores}
    names = [model.name for model in compared if any(s.model == model.name for s in scores)]
    return [
        {
            "task": title(task),
            "set": dataset,
            "metric": title(metric),
            "is_share": metric != "kl",
            "num_test": num_test,
            "scores": [(name, found.get((name, task, dataset, metric))) for name in names],
        }
        for (task, dataset, metric), num_test in rows.items()
    ]


def _remarks(scores: Sequence[Score]) -> list[str]:
    """Return what a reader must know: one model under several names, missing scores, unreadable pictures.

    What holds for several sets is said once.
    """
    names: dict[str, dict[str, None]] = {}
    for score in scores:
        names.setdefault(score.model_digest, {})[score.model] = None
    remarks = [f"{' = '.join(same)}: the same weights." for same in names.values() if len(same) > 1]
    missing: dict[tuple[str, str, str], dict[str, None]] = {}
    unreadable: dict[str, int] = {}
    for score in scores:
        if score.value is None and score.reason:
            missing.setdefault((score.task, score.metric, score.reason), {})[score.set] = None
        elif score.num_unreadable:
            unreadable[score.set] = max(score.num_unreadable, unreadable.get(score.set, 0))
    for (task, metric, reason), sets in missing.items():
        remarks.append(f"{title(task)}: no {title(metric)} score on {', '.join(sets)}, {reason}.")
    if any(score.task == "retrieval" and score.value is not None for score in scores):
        remarks.append(
            "Retrieval: no examples, since evaluate does not write down which pictures were found for which words."
        )
    for name, pictures in unreadable.items():
        remarks.append(f"{name}: {phrases.number(pictures, 'picture')} could not be read and are left out.")
    return remarks


def _copy_remarks(results: Results) -> list[str]:
    """Return of every evaluated set which share of its test pictures has a near copy in the training data, if known."""
    found = {
        (described["name"], copies["training_store"]): copies
        for record in results.finished("evaluate")
        for described in record.result.get("sets", ())
        if "share" in (copies := described.get("near_copies", {}))
    }
    return [
        f"{name}: {phrases.percent(copies['share'])} % of the test pictures ({phrases.count(copies['num_near'])} of "
        f"{phrases.count(copies['num_pictures'])}) have a near copy in the training data, {store} (cosine of "
        f"{copies['threshold']:g} or more by {copies['teacher']})."
        for (name, store), copies in found.items()
    ]


def _absent(results: Results, *, has_diagnostics: bool) -> list[tuple[str, str]]:
    """Return the sections that have nothing to show, each with the stage that would fill it."""
    sections = [
        ("The comparison table", "evaluate"),
        ("Training curves and speed", "train"),
        ("The threshold curve and the gallery of groups", "balance"),
        ("Cluster sizes and picture strips", "cluster"),
        ("Unusable rows", "embed"),
    ]
    absent = [(section, stage) for section, stage in sections if not results.finished(stage)]
    if results.finished("import"):
        absent = [line for line in absent if line[1] != "embed"]
    if results.finished("train") and not has_diagnostics:
        absent.append(("Cosines with the teacher", "train"))
    return absent


def in_metrics(threshold: float, metric: str) -> dict[str, float]:
    """Return a threshold in every metric, `metric` first; a curve may begin at 0, which is 0 in all of them."""
    same = equivalents(threshold, metric) if threshold > 0 else dict.fromkeys(equivalents(1.0, metric), 0.0)
    return {metric: same[metric], **same}


def script() -> str:
    """Return the page's script: the files of `scripts/`, one after the other, in a scope of their own."""
    folder = importlib.resources.files("distilclip.report").joinpath("scripts")
    parts = [folder.joinpath(f"{name}.js").read_text(encoding="utf-8") for name in SCRIPTS]
    return "\n".join(['"use strict";', "{", *parts, "}", ""])


def island(value: Any) -> Markup:
    """Return a value as JSON that can stand in a script element: no text in it can end the element or begin another.

    >>> print(island({"caption": "</script>"}))
    {"caption":"\\u003c/script\\u003e"}
    """
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))


def sha256(text: str) -> str:
    """Return the digest of a script as a content security policy names it."""
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("distilclip.report", package_path=""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        count=phrases.count,
        magnitude=phrases.magnitude,
        significant=phrases.significant,
        percent=phrases.percent,
        gain=phrases.gain,
        shorten=phrases.shorten,
        breakable=phrases.breakable,
        duration=duration,
        plain=phrases.plain,
        title=title,
        in_metrics=in_metrics,
        island=island,
        sha256=sha256,
    )
    return environment.get_template("page.html.j2")
