"""Figures as SVG text: the same numbers give the same bytes, and inline they follow the page's light or dark colours.

Colours are drawn as the hexadecimal values of `PALETTE`; `inline` replaces each by the CSS variable of the same name,
so a figure saved as a file looks like the light page.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
from jaxtyping import Int
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from distilclip.ops.metric import equivalents
from distilclip.report.load import Series
from distilclip.report.wording import magnitude, significant

# CSS variable -> colour on white. The page's style sheet holds the colours on black under the same names.
PALETTE = {
    "--ink": "#1c2127",
    "--muted": "#5d6773",
    "--line": "#dde1e6",
    "--series-0": "#3a424c",
    "--series-1": "#8a6d1f",
    "--series-2": "#1f62b0",
    "--series-3": "#c2500c",
    "--series-4": "#1d7a50",
    "--series-5": "#7d3fa6",
    "--series-6": "#b02a4f",
    "--series-7": "#0b7680",
}
NUM_SERIES = 8
MAX_POINTS = 250  # per line: more is invisible at the width of a page and only makes it heavy

PanelSize = tuple[float, float]  # inches; one is 96 px on the page
SMALL: PanelSize = (3.6, 2.35)
WIDE: PanelSize = (7.2, 5.4)


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of a chart. `series` is its model's place in the palette; places beyond it repeat, dashed."""

    label: str
    series: int
    data: Series


@dataclass(frozen=True, kw_only=True)
class Point:
    """What the threshold curve says at one threshold. `removed` and `largest` are shares of all valid images."""

    threshold: float
    removed: float
    num_groups: int
    largest_group: int


def training_curve(name: str, lines: Sequence[Line]) -> str:
    """One logged quantity of every run against the step; long logs are averaged in buckets (`thin`)."""
    figure, axes = _panel(SMALL, name)
    for line in lines:
        data = thin(line.data)
        axes.plot(data.step, data.value, label=line.label, **_line_style(line.series))
    axes.set_xlabel("step")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: magnitude(step)))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    axes.margins(x=0.01)
    return _svg(figure, f"training {name}")


def thin(series: Series, num_points: int = MAX_POINTS) -> Series:
    """At most `num_points` points: means over equal runs of the log, so that noise does not turn into aliasing."""
    if len(series.step) <= num_points:
        return series
    bounds = np.linspace(0, len(series.step), num_points + 1).astype(int)
    means = np.add.reduceat(series.value, bounds[:-1]) / np.diff(bounds)
    return Series(step=series.step[bounds[1:] - 1], value=means)


def threshold_curve(points: Sequence[Point], *, metric: str, threshold: float | None) -> str:
    """Removed share, number of groups and largest group against the threshold, in all three metrics at once."""
    with _style("threshold"):
        figure = Figure(figsize=WIDE)
        panels = figure.subplots(3, 1, sharex=True, gridspec_kw={"hspace": 0.28})
    x = [point.threshold for point in points]
    rows: list[tuple[str, list[float], str]] = [
        ("removed share", [100 * point.removed for point in points], "--series-2"),
        ("groups", [point.num_groups for point in points], "--series-4"),
        ("largest group", [point.largest_group for point in points], "--series-3"),
    ]
    for axes, (name, values, colour) in zip(panels, rows, strict=True):
        _frame(axes, name)
        axes.step(x, values, where="post", color=PALETTE[colour], linewidth=1.6)
        axes.yaxis.set_major_locator(MaxNLocator(nbins=4))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: magnitude(value)))
        axes.set_ylim(bottom=0, top=max(values, default=0) * 1.08 or 1)
        if threshold is not None:
            axes.axvline(threshold, color=PALETTE["--ink"], linewidth=1, linestyle=(0, (4, 3)))
    panels[0].yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))
    if threshold is not None:
        chosen = f"chosen: {significant(threshold)}"
        side: Any = {"ha": "left", "xytext": (5, -2)}
        if threshold > x[0] + 0.7 * (x[-1] - x[0]):
            side = {"ha": "right", "xytext": (-5, -2)}
        panels[0].annotate(
            chosen, (threshold, 1), xycoords=("data", "axes fraction"), textcoords="offset points", va="top", **side
        )
    _metric_axis(panels[-1], metric)
    return _svg(figure, "threshold")


def cluster_sizes(sizes: Int[np.ndarray, " k"]) -> str:
    """How many clusters have how many images; bins grow with the size where sizes span more than a factor of 30."""
    figure, axes = _panel(WIDE_LOW, "clusters by size")
    smallest, largest = int(sizes.min()), int(sizes.max())
    if largest > 30 * max(1, smallest):
        edges = np.unique(np.geomspace(max(1, smallest), largest + 1, 30).round())
        edges = np.concatenate([[0], edges]) if smallest == 0 else edges
        axes.set_xscale("symlog", linthresh=1)
        axes.xaxis.set_major_locator(mpl.ticker.SymmetricalLogLocator(base=10, linthresh=1))
    else:
        edges = np.arange(smallest, largest + 2, max(1, -(-(largest - smallest + 1) // 30)))
        edges = np.append(edges, edges[-1] + (edges[1] - edges[0])) if edges[-1] <= largest else edges
    heights, _ = np.histogram(sizes, bins=edges)
    axes.bar(edges[:-1], heights, width=np.diff(edges), align="edge", color=PALETTE["--series-2"], linewidth=0.5)
    axes.set_xlabel("images in the cluster")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: magnitude(value)))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
    return _svg(figure, "cluster sizes")


WIDE_LOW: PanelSize = (7.2, 2.5)


@dataclass(frozen=True, kw_only=True)
class Standing:
    """Where every model stands on one set: values as fractions by model name, chance where known."""

    label: str
    values: dict[str, float]
    chance: float | None


def standings(rows: Sequence[Standing], series: dict[str, int]) -> str:
    """A dot per model and set, the teacher hollow, chance as a tick; `series` gives each model's place in the palette."""
    with _style("standings"):
        figure = Figure(figsize=(7.2, 0.75 + 0.32 * len(rows)))
        axes = figure.subplots()
    _frame(axes, "")
    axes.grid(axis="y", visible=False)
    heights = np.arange(len(rows))[::-1]
    for height, row in zip(heights, rows, strict=True):
        values = [100 * value for value in row.values.values()]
        axes.hlines(height, min(values), max(values), color=PALETTE["--line"], linewidth=3, zorder=1)
        if row.chance is not None:
            axes.plot([100 * row.chance], [height], "|", color=PALETTE["--muted"], markersize=9, zorder=2)
    for name, place in series.items():
        pairs = [(100 * row.values[name], height) for row, height in zip(rows, heights, strict=True) if name in row.values]
        style = _line_style(place)
        fill = "none" if place == 0 else style["color"]
        axes.plot(
            [value for value, _ in pairs],
            [height for _, height in pairs],
            "o",
            color=style["color"],
            markerfacecolor=fill,
            markersize=6.5,
            zorder=3 + place,
            label=name,
        )
    if any(row.chance is not None for row in rows):
        axes.plot([], [], "|", color=PALETTE["--muted"], markersize=9, label="chance")
    axes.set_yticks(heights, [row.label for row in rows])
    axes.tick_params(axis="y", labelcolor=PALETTE["--ink"])
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=6, handletextpad=0.2, columnspacing=1.4, borderaxespad=0.2)
    return _svg(figure, "standings")


def inline(svg: str, *, label: str) -> Markup:
    """An SVG file as an element of the page: named for screen readers, in the page's colours and font, without ids.

    The ids of matplotlib's groups would repeat from figure to figure; nothing refers to them.
    """
    body = svg[svg.index("<svg") :]
    body = re.sub(r"\s*<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r'<g id="[^"]*"', "<g", body)
    body = re.sub(r"\n\s*", "\n", body)
    for variable, colour in PALETTE.items():
        body = body.replace(colour, f"var({variable})")
    body = body.replace("'DejaVu Sans', ", "").replace("'DejaVu Sans'", "var(--font)")
    head, rest = body.split(">", 1)
    box = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', head)
    assert box is not None, "matplotlib always writes a viewBox"
    width = float(box.group(1)) * 96 / 72
    opening = f'<svg viewBox="{box.group(0)[9:-1]}" style="width:{width:.0f}px" role="img" aria-label="{escape(label)}"'
    return Markup(f'{opening} xmlns:xlink="http://www.w3.org/1999/xlink">{rest.strip()}')


def _style(salt: str) -> Any:
    """matplotlib's settings for one figure; `salt` makes the ids inside it differ from those of other figures."""
    return mpl.rc_context(
        {
            "svg.fonttype": "none",
            "svg.hashsalt": salt,
            "font.family": "DejaVu Sans",
            "font.size": 8,
            "axes.edgecolor": PALETTE["--muted"],
            "axes.labelcolor": PALETTE["--muted"],
            "axes.titlecolor": PALETTE["--ink"],
            "text.color": PALETTE["--ink"],
            "xtick.color": PALETTE["--muted"],
            "ytick.color": PALETTE["--muted"],
            "legend.frameon": False,
            "legend.fontsize": 7.5,
        }
    )


def _panel(size: PanelSize, name: str) -> tuple[Figure, Axes]:
    with _style(name):
        figure = Figure(figsize=size)
        axes = figure.subplots()
    _frame(axes, name)
    return figure, axes


def _frame(axes: Axes, name: str) -> None:
    """No box, a light grid, the name over the left corner."""
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.grid(color=PALETTE["--line"], linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    axes.set_title(name, loc="left", fontsize=8.5, fontweight="bold")


def _line_style(series: int) -> dict[str, Any]:
    dashes: Literal["-", "--"] = "-" if series < NUM_SERIES else "--"
    return {"color": PALETTE[f"--series-{series % NUM_SERIES}"], "linestyle": dashes, "linewidth": 1.4}


def _metric_axis(axes: Axes, metric: str) -> None:
    """Tick labels in three rows: the balance's own metric first, then what it says in the other two."""
    others = [name for name in equivalents(1.0, metric) if name != metric]

    def label(value: float, _: int | None = None) -> str:
        if value <= 0:
            return "0\n0\n0"
        same = equivalents(value, metric)
        return "\n".join(significant(same[name]) for name in (metric, *others))

    axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
    axes.xaxis.set_major_formatter(FuncFormatter(label))
    axes.set_xlim(left=0)
    axes.annotate(
        "\n".join([f"{metric} distance", *(f"= {name}" for name in others)]),
        (0, 0),
        xycoords="axes fraction",
        xytext=(-18, -3.5),
        textcoords="offset points",
        ha="right",
        va="top",
        color=PALETTE["--muted"],
    )


def _svg(figure: Figure, salt: str) -> str:
    """The figure as SVG text without date and version."""
    buffer = io.StringIO()
    with _style(salt):
        figure.savefig(
            buffer,
            format="svg",
            transparent=True,
            bbox_inches="tight",
            pad_inches=0.05,
            metadata={"Date": None, "Creator": None},
        )
    return buffer.getvalue()


