"""Render the page: all sections by one template into one self-contained HTML file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jinja2

from distilclip.report import phrases
from distilclip.report.charts import Chart, standings_chart, training_charts
from distilclip.report.comparison import Model, Table, compare, models
from distilclip.report.figures import PALETTE
from distilclip.report.load import Results
from distilclip.report.sections import GallerySize, balance_sections, cluster_sections
from distilclip.sets.score import Score, title
from distilclip.vectors.metric import equivalents

# The order in which a run makes them; other stages follow.
STAGES = ("corpus", "embed", "balance", "cluster", "train", "evaluate")


@dataclass(frozen=True, kw_only=True)
class Page:
    """The HTML, its figures by file name, and the sections without content, each with the stage that would fill it."""

    html: str
    figures: dict[str, str]
    absent: list[tuple[str, str]]


def build(results: Results, *, heading: str, size: GallerySize) -> Page:
    """Render the page of some results."""
    compared = models(results)
    scores = results.scores
    table = compare([score for score in scores if score.task != "agreement"], compared)
    students = [model for model in compared if model.role != "teacher"]
    agreement = compare([score for score in scores if score.task == "agreement"], students)
    curves = training_charts(compared)
    standings = standings_chart(table)
    balances = balance_sections(results, size)
    clusterings = cluster_sections(results, size)
    absent = _absent(results, has_diagnostics=any(model.training and model.training.diagnostics for model in compared))
    html = _template().render(
        heading=heading,
        story=story(table, results),
        models=compared,
        table=table,
        baseline=next((row.model.name for row in table.rows if row.model.role == "baseline"), ""),
        agreement=agreement,
        all_scores=_all_scores(scores, compared),
        remarks=_remarks(scores),
        standings=standings,
        curves=curves,
        embeddings=results.finished("embed"),
        balances=balances,
        clusterings=clusterings,
        folders=sorted(results.folders, key=lambda f: STAGES.index(f.stage) if f.stage in STAGES else len(STAGES)),
        unfinished=results.unfinished,
        absent=absent,
        palette=PALETTE,
    )
    charts: list[Chart | None] = [standings, *curves, *(section.chart for section in (*balances, *clusterings))]
    return Page(
        html=html,
        figures={f"{chart.name}.svg": chart.svg for chart in charts if chart is not None},
        absent=absent,
    )


def story(table: Table, results: Results) -> str:
    """Tell the results in two sentences: the best student with its gain, and what balance removed."""
    sentences = [_best_student(table)] if table.columns else []
    for folder in results.finished("balance")[:1]:
        kept, valid = phrases.count(folder.result["num_kept"]), phrases.count(folder.result["num_valid"])
        removed = phrases.percent(folder.result["removed_ratio"])
        sentences.append(f"Semantic balance kept {kept} of {valid} pictures ({removed} % removed).")
    return " ".join(filter(None, sentences)) or f"Results of {_number(len(results.folders), 'stage folder')}."


def _best_student(table: Table) -> str:
    """Return the sentence about the best student of the first column; empty where no student has a score."""
    found = [(row.cells[0].value, row) for row in table.rows if row.model.role in ("baseline", "student")]
    scored = [(value, row) for value, row in found if value is not None]
    if not scored:
        return ""
    value, best = max(scored, key=lambda pair: pair[0])
    column, gain = table.columns[0], best.cells[0].gain
    task = title(column.task).lower()
    measure = f"mean {task} {column.set.removeprefix('mean ')}" if column.members else f"{task} on {column.set}"
    text = f"{best.model.name} is the best of {_number(len(scored), 'student')}: {phrases.percent(value)} % {measure}"
    if gain is not None:
        baseline = next(row.model.name for row in table.rows if row.model.role == "baseline")
        text += f", {phrases.gain(gain)} points against {baseline}, which had no teacher,"
    teacher = next((row.cells[0].value for row in table.rows if row.model.role == "teacher"), None)
    if teacher:
        text += f" and {100 * value / teacher:.0f} % of its teacher's score"
    return text.rstrip(",") + "."


def _number(value: int, noun: str) -> str:
    return f"{value} {noun}" + ("" if value == 1 else "s")


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
    """Return what a reader must know: one model under several names, missing scores, unreadable pictures."""
    names: dict[str, dict[str, None]] = {}
    for score in scores:
        names.setdefault(score.model_digest, {})[score.model] = None
    remarks = dict.fromkeys(f"{' = '.join(same)}: the same weights." for same in names.values() if len(same) > 1)
    for score in scores:
        if score.value is None and score.reason:
            remarks[f"{score.set}, {title(score.task).lower()}: no {title(score.metric)} score, {score.reason}."] = None
        elif score.num_unreadable:
            remarks[f"{score.set}: {_number(score.num_unreadable, 'picture')} could not be read and are left out."] = (
                None
            )
    return list(remarks)


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
    if results.finished("train") and not has_diagnostics:
        absent.append(("Cosines with the teacher", "train"))
    return absent


def in_metrics(threshold: float, metric: str) -> dict[str, float]:
    """Return a threshold in every metric, `metric` first; a curve may begin at 0, which is 0 in all of them."""
    same = equivalents(threshold, metric) if threshold > 0 else dict.fromkeys(equivalents(1.0, metric), 0.0)
    return {metric: same[metric], **same}


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
        plain=phrases.plain,
        title=title,
        in_metrics=in_metrics,
    )
    return environment.get_template("page.html.j2")
