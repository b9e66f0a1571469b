"""Choose the lines and points of each chart of the page, and describe it in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from distilclip.report import figures
from distilclip.report.comparison import Cell, Table
from distilclip.report.roles import Model
from distilclip.sets.score import title
from distilclip.sets.specs import VALIDATED


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A figure: its SVG, the name of its file without suffix, and what it shows in words.

    `narrow` is the same figure for a phone, where the other would be too wide.
    """

    name: str
    svg: str
    label: str
    caption: str = ""
    narrow: str = ""

    @property
    def inline(self) -> Markup:
        """Return the SVG as an element of the page."""
        return figures.inline(self.svg, label=self.label)

    @property
    def inline_narrow(self) -> Markup:
        """Return the narrow SVG as an element of the page; nothing where there is none."""
        return figures.inline(self.narrow, label=self.label) if self.narrow else Markup()


def training_charts(models: Sequence[Model]) -> list[Chart]:
    """Draw a chart for each logged quantity with a line for each training: loss, terms, cosines, agreements."""
    trained = [(model, model.training) for model in models if model.training is not None and model.training.logged]
    words = {name: text for _, training in trained for name, text in training.words.items()}
    terms = dict.fromkeys(name for _, training in trained for name in training.terms)
    loss = ["loss"] if any("loss" in training.logged for _, training in trained) else []
    diagnostics = dict.fromkeys(name for _, training in trained for name in training.diagnostics)
    charts = []
    validations = dict.fromkeys(name for _, training in trained for name in training.validations)
    for name in [*loss, *terms, *diagnostics, *validations]:
        lines = [
            figures.Line(label=model.name, series=model.series, data=training.logged[name])
            for model, training in trained
            if name in training.logged
        ]
        shown = _training_title(name)
        label = f"{shown} against the training step, one line each for {', '.join(line.label for line in lines)}"
        charts.append(
            Chart(
                name=f"training-{name.replace('/', '-')}",
                svg=figures.training_curve(shown, lines),
                label=label,
                caption=_training_caption(name, words),
            )
        )
    return charts


def standings_chart(table: Table) -> Chart | None:
    """Draw the scores of all models on every set of the table, or return None for a single model."""
    rows = []
    for place, column in enumerate(table.columns):
        cells = {row.model.name: row.cells[place] for row in table.rows}
        values = {name: cell.value for name, cell in cells.items() if cell.value is not None}
        if column.metric and values:
            label = f"{title(column.task)}: {column.set}"
            if column.task == "retrieval":
                label = f"{column.set}: {title(column.metric)}"
            reach = {name: reach for name, cell in cells.items() if (reach := _reach(cell)) is not None}
            rows.append(figures.Standing(label=label, values=values, chance=column.chance, reach=reach))
    if not rows or len(table.rows) < 2:
        return None
    series = {row.model.name: row.model.series for row in table.rows}
    several = any(row.num_seeds > 1 for row in table.rows)
    return Chart(
        name="standings",
        svg=figures.standings(rows, series),
        narrow=figures.standings(rows, series, width=figures.NARROW),
        label=f"One row per evaluation set with a dot for each of {', '.join(series)}; the numbers are in the table",
        caption="Lines: 95 % intervals over the test pictures"
        + ("; where a dot is a mean over seeds, one standard deviation to either side." if several else "."),
    )


def _reach(cell: Cell) -> tuple[float, float] | None:
    if cell.low is not None and cell.high is not None:
        return cell.low, cell.high
    if cell.spread is not None and cell.value is not None:
        return cell.value - cell.spread, cell.value + cell.spread
    return None


def threshold_chart(curve: Sequence[figures.CurvePoint], metric: str, threshold: float, number: int) -> Chart:
    """Draw the threshold curve of a balance folder, the `number`-th of the report."""
    return Chart(
        name="threshold" + (f"-{number + 1}" if number else ""),
        svg=figures.threshold_curve(curve, metric=metric, threshold=threshold),
        narrow=figures.threshold_curve(curve, metric=metric, threshold=threshold, width=figures.NARROW),
        label="Removed share, number of groups and largest group against the threshold; the table has the numbers",
    )


def cluster_chart(result: dict[str, Any], number: int) -> Chart:
    """Draw the cluster sizes of a cluster folder, the `number`-th of the report, before and after balance."""
    sizes, before = result["sizes"], result.get("sizes_before_balance")
    label = f"Cluster sizes, from {sizes['smallest']} to {sizes['largest']} images"
    if before:
        label += f"; before balance from {before['smallest']} to {before['largest']}"
    histograms = sizes["histogram"], before["histogram"] if before else None
    return Chart(
        name="cluster-sizes" + (f"-{number + 1}" if number else ""),
        svg=figures.cluster_sizes(*histograms),
        narrow=figures.cluster_sizes(*histograms, width=figures.NARROW),
        label=label,
    )


def score_chart(result: dict[str, Any], score: str, number: int) -> Chart:
    """Draw the scores of a folder of `select`, the `number`-th of the report, with the cut where all pairs have one."""
    bins, threshold = result["histogram"], result["threshold"]
    drawn: dict[str, Any] = {"name": score, "threshold": threshold}
    return Chart(
        name="scores" + (f"-{number + 1}" if number else ""),
        svg=figures.score_histogram(bins, **drawn),
        narrow=figures.score_histogram(bins, **drawn, width=figures.NARROW),
        label=f"Number of pairs against the {score}, kept and removed; the table has the thresholds",
    )


def _training_title(name: str) -> str:
    """The words for a column of metrics.jsonl."""
    if not name.startswith(VALIDATED):
        return title(name)
    dataset, metric = name.removeprefix(VALIDATED).rsplit("/", 1)
    return f"{dataset}: {title(metric)}"


def _training_caption(name: str, words: dict[str, str]) -> str:
    if name == "loss":
        return "weighted sum of each model's own terms: compare shapes, not heights"
    if name.startswith(VALIDATED):
        return "validation while training"
    return words.get(name, "")
