"""Choose the lines and points of each chart of the page, and describe it in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from distilclip.report import figures
from distilclip.report.comparison import Cell, Table
from distilclip.report.load import Series
from distilclip.report.roles import Model
from distilclip.sets.score import title
from distilclip.sets.specs import HELD_OUT, VALIDATED

HELD_OUT_COLUMNS = f"{VALIDATED}{HELD_OUT}/"


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A figure: its SVG, the name of its file without suffix, and what it shows in words.

    `narrow` is the same figure for a phone, where the other would be too wide. `axes` are of both the place of 0 on the
    horizontal axis and the length of 1, in units of the SVG, where the page's script marks a place.
    """

    name: str
    svg: str
    label: str
    caption: str = ""
    narrow: str = ""
    axes: tuple[tuple[float, float], ...] = ()

    @property
    def inline(self) -> Markup:
        """Return the SVG as an element of the page."""
        return figures.inline(self.svg, label=self.label, axis=self.axes[0] if self.axes else None)

    @property
    def inline_narrow(self) -> Markup:
        """Return the narrow SVG as an element of the page; nothing where there is none."""
        if not self.narrow:
            return Markup()
        return figures.inline(self.narrow, label=self.label, axis=self.axes[1] if self.axes else None)


def training_charts(models: Sequence[Model]) -> list[Chart]:
    """Draw a chart for each logged quantity with a line for each training: loss, terms, cosines, agreements."""
    words = {name: text for model in models if model.training for name, text in model.training.words.items()}
    charts = []
    for name, lines in _curves(models).items():
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


def curve_data(models: Sequence[Model]) -> dict[str, Any]:
    """Return what the page's script needs to draw the `training_charts` anew, as JSON values, in their order.

    A chart has the lines on held-out pairs beside those of training, where both were logged.
    """
    trained = [model for model in models if model.training is not None]
    place = {model.name: number for number, model in enumerate(trained)}
    held_out = {
        (model.name, name.removeprefix(HELD_OUT_COLUMNS)): series
        for model in trained
        if model.training is not None
        for name, series in model.training.logged.items()
        if name.startswith(HELD_OUT_COLUMNS)
    }
    charts = []
    for name, lines in _curves(models).items():
        kind = "set" if name.startswith(VALIDATED) else ""
        drawn = [_line_data(place[line.label], figures.thin(line.data), kind) for line in lines]
        kept_aside = [(line.label, held_out[line.label, name]) for line in lines if (line.label, name) in held_out]
        drawn += [_line_data(place[label], figures.thin(series), "held-out") for label, series in kept_aside]
        charts.append({"title": _training_title(name), "lines": drawn})
    return {"models": [{"name": model.name, "series": model.series} for model in trained], "charts": charts}


def _line_data(model: int, series: Series, validation: str) -> dict[str, Any]:
    values = [float(f"{value:.5g}") for value in series.value.tolist()]
    return {"model": model, "validation": validation, "step": series.step.tolist(), "value": values}


def _curves(models: Sequence[Model]) -> dict[str, list[figures.Line]]:
    """Return the lines of every logged quantity that is drawn, by its column: loss, terms, diagnostics, validations."""
    trained = [(model, model.training) for model in models if model.training is not None and model.training.logged]
    loss = ["loss"] if any("loss" in training.logged for _, training in trained) else []
    terms = [name for _, training in trained for name in training.terms]
    diagnostics = [name for _, training in trained for name in training.diagnostics]
    validations = [name for _, training in trained for name in training.validations]
    return {
        name: [
            figures.Line(label=model.name, series=model.series, data=training.logged[name])
            for model, training in trained
            if name in training.logged
        ]
        for name in dict.fromkeys([*loss, *terms, *diagnostics, *validations])
    }


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
        axes=tuple(
            figures.threshold_axis(curve[-1].threshold, width=width) for width in (figures.WIDTH, figures.NARROW)
        ),
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
