"""Draw the figures as SVG text; the same numbers give the same bytes.

Colours are drawn as the values of `PALETTE`. `inline` replaces each by the CSS variable of its name, so that inside the
page a figure follows its light or dark colours, and a saved file looks as on the light page.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
from jaxtyping import Float
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from distilclip.report.load import Series
from distilclip.report.phrases import magnitude, significant
from distilclip.vectors.tolerance import equivalents

# CSS variable -> colour on white. The page's style sheet holds the colours on black under the same names.
PALETTE = {
    "--paper": "#ffffff",
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
MAX_POINTS = 250  # of a line: more cannot be seen at the width of a page

WIDTH = 10.9  # inches of a figure as wide as the text; one inch is 96 px on the page
NARROW = 3.7  # inches of the same figure for a phone
RIGHT = 0.12  # inches beside the panels
THRESHOLD_MARGIN = 1.03  # the threshold curve's axis is this much longer than the curve


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of a chart. `series` is its model's place in the palette; beyond the palette, lines are dashed."""

    label: str
    series: int
    data: Series


@dataclass(frozen=True, kw_only=True)
class Standing:
    """The scores of all models on one set: fractions by model name, and chance where it is known.

    `reach` holds the low and the high end of the line through a model's dot, where it has one.
    """

    label: str
    values: dict[str, float]
    chance: float | None
    reach: Mapping[str, tuple[float, float]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class CurvePoint:
    """What balance would do at one threshold; `removed_ratio` is a share of the valid images."""

    threshold: float
    removed_ratio: float
    num_groups: int
    largest_group: int


def training_curve(name: str, lines: Sequence[Line]) -> str:
    """Draw one logged quantity of every training against the step; long logs are averaged (`thin`)."""
    with _style(f"training {name}"):
        figure, (axes,) = _panels([name], width=3.6, height=2.35, left=0.5)
        for line in lines:
            data = thin(line.data)
            axes.plot(data.step, data.value, label=line.label, **_line_style(line.series))
        axes.set_xlabel("step", loc="right", labelpad=1)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: magnitude(step)))
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True, steps=[1, 2, 5, 10]))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
        axes.margins(x=0.01)
        return _svg(figure)


def thin(series: Series, num_points: int = MAX_POINTS) -> Series:
    """Return at most `num_points` points, each the mean of an equal part of the log; mere skipping would show noise."""
    if len(series.step) <= num_points:
        return series
    bounds = np.linspace(0, len(series.step), num_points + 1).astype(int)
    means = np.add.reduceat(series.value, bounds[:-1]) / np.diff(bounds)
    return Series(step=series.step[bounds[1:] - 1], value=means)


def threshold_curve(points: Sequence[CurvePoint], *, metric: str, threshold: float, width: float = WIDTH) -> str:
    """Draw removed share, number of groups and largest group against the threshold, in all three metrics.

    The dashed line is the chosen `threshold`; it and the points are in `metric`. `width` is in inches.
    """
    x = [point.threshold for point in points]
    rows: dict[str, tuple[Sequence[float], str]] = {
        "removed share": ([100 * point.removed_ratio for point in points], "--series-2"),
        "groups": ([point.num_groups for point in points], "--series-4"),
        "largest group": ([point.largest_group for point in points], "--series-3"),
    }
    with _style(f"threshold {width}"):
        figure, panels = _panels(list(rows), width=width, height=5.6, left=_threshold_left(width), bottom=0.75)
        for axes, (values, colour) in zip(panels, rows.values(), strict=True):
            axes.plot(x, values, color=PALETTE[colour], linewidth=1.7)
            axes.yaxis.set_major_locator(MaxNLocator(nbins=4))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: magnitude(value)))
            axes.set_ylim(bottom=0, top=1.08 * max(values) or 1)
            axes.axvline(threshold, color=PALETTE["--ink"], linewidth=1, linestyle=(0, (4, 3)))
        panels[0].yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))
        late = threshold > 0.8 * x[-1]
        panels[0].annotate(
            f"chosen: {significant(threshold)}",
            (threshold, 0),
            xycoords=("data", "axes fraction"),
            xytext=(-6 if late else 6, 5),
            textcoords="offset points",
            ha="right" if late else "left",
        )
        _metric_axis(panels[-1], metric, narrow=width < WIDTH)
        panels[-1].set_xlim(0, THRESHOLD_MARGIN * x[-1])
        return _svg(figure)


def threshold_axis(last: float, *, width: float = WIDTH) -> tuple[float, float]:
    """Return where the threshold 0 lies in the threshold curve up to `last`, and how long 1 is, in units of its SVG."""
    left = _threshold_left(width)
    return 72 * left, 72 * (width - left - RIGHT) / (THRESHOLD_MARGIN * last)


def _threshold_left(width: float) -> float:
    return 1.6 if width == WIDTH else 1.15


@dataclass(frozen=True, kw_only=True)
class Dot:
    """A model in a chart of scores against costs: a fraction, its interval where it has one, and a positive cost."""

    label: str
    series: int
    cost: float
    score: float
    reach: tuple[float, float] | None = None


def score_against_cost(dots: Sequence[Dot], *, measure: str, cost: str) -> str:
    """Draw a dot for each model, the teacher hollow, over a logarithmic axis of what it cost."""
    with _style(f"score against {cost}"):
        figure, (axes,) = _panels([measure], width=3.6, height=2.35, left=0.55)
        axes.set_xscale("log")
        for dot in dots:
            colour = _line_style(dot.series)["color"]
            if dot.reach is not None:
                axes.vlines(dot.cost, 100 * dot.reach[0], 100 * dot.reach[1], color=colour, linewidth=1.3)
            axes.plot(
                [dot.cost],
                [100 * dot.score],
                "o",
                color=colour,
                markerfacecolor=PALETTE["--paper"] if dot.series == 0 else colour,
                markeredgewidth=1.4,
                markersize=6,
                zorder=3 + dot.series,
            )
        costs = [dot.cost for dot in dots]
        spread = max((max(costs) / min(costs)) ** 0.12, 1.05)
        axes.set_xlim(min(costs) / spread, max(costs) * spread)
        axes.set_xlabel(cost, loc="right", labelpad=1)
        axes.xaxis.set_major_locator(FixedLocator(_round_costs(min(costs) / spread, max(costs) * spread)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: magnitude(value)))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))
        return _svg(figure)


def _round_costs(low: float, high: float) -> list[float]:
    """Return up to five round numbers of a logarithmic axis: powers of 10, with 2 and 5, or evenly spread ones."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in ((1, 2, 5), (1, 3), (1,)):
        found = [float(digit * 10**power) for power in powers for digit in digits if low <= digit * 10**power <= high]
        if 2 <= len(found) <= 5:
            return found
    if len(found) > 5:
        return found[:: -(-len(found) // 5)]
    return [float(f"{low + share * (high - low):.2g}") for share in (0.1, 0.5, 0.9)]


def score_histogram(
    bins: Sequence[Mapping[str, float]], *, name: str, threshold: float | None, width: float = WIDTH
) -> str:
    """Draw how many pairs have which score, and how many of them are kept; the dashed line is the `threshold`.

    Of each range of scores, `bins` hold `low`, `high`, `num_scored` and `num_kept`. `width` is in inches.
    """
    low = [one["low"] for one in bins]
    wide = [max(one["high"] - one["low"], 1e-6) for one in bins]
    kept = [one["num_kept"] for one in bins]
    removed = [one["num_scored"] - one["num_kept"] for one in bins]
    with _style(f"scores {width}"):
        figure, (axes,) = _panels(["number of pairs"], width=width, height=2.6, left=0.6, bottom=0.5, top=0.5)
        axes.set_title("number of pairs", loc="left", fontsize=9.5, fontweight="bold", pad=22)
        axes.bar(low, kept, width=wide, align="edge", color=PALETTE["--series-2"], label="kept")
        axes.bar(low, removed, width=wide, bottom=kept, align="edge", color=PALETTE["--muted"], label="removed")
        if threshold is not None:
            axes.axvline(threshold, color=PALETTE["--ink"], linewidth=1, linestyle=(0, (4, 3)), label="cut")
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, borderaxespad=0.2)
        axes.grid(axis="x", visible=False)
        axes.set_xlabel(name, loc="right")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=4 if width < WIDTH else 9))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: magnitude(value)))
        return _svg(figure)


def cluster_sizes(after: Sequence[int], before: Sequence[int] | None, *, width: float = WIDTH) -> str:
    """Draw how many clusters have 0, 1, 2 to 3, 4 to 7, ... images, after balance and before it.

    `width` is in inches; a narrow figure names each bar by the smallest size.
    """
    names = ["0", "1", *(f"{2**i} to {2 ** (i + 1) - 1}" for i in range(1, 64))][: max(len(after), len(before or ()))]
    if width < WIDTH:
        names = [name.split(" ")[0] for name in names]
    with _style(f"cluster sizes {width}"):
        top = 0.28 if width == WIDTH else 0.5  # of a narrow figure the legend stands below the name
        figure, (axes,) = _panels(["number of clusters"], width=width, height=2.22 + top, left=0.5, bottom=0.5, top=top)
        axes.set_title("number of clusters", loc="left", fontsize=9.5, fontweight="bold", pad=72 * (top - 0.2))
        bars = [("kept images", after, "--series-2")]
        if before is not None:
            bars.insert(0, ("before balance", before, "--muted"))
        bar = 0.8 / len(bars)
        for place, (label, heights, colour) in enumerate(bars):
            left = np.arange(len(heights)) - 0.4 + place * bar
            axes.bar(left, heights, width=0.94 * bar, align="edge", color=PALETTE[colour], label=label)
        if before is not None:
            corner = int(width == WIDTH)  # right in a broad figure, left in a narrow one
            legend = axes.legend(loc="lower left", bbox_to_anchor=(corner, 1), ncols=2, borderaxespad=0.2)
            legend.set_loc("lower right" if corner else "lower left")
        axes.grid(axis="x", visible=False)
        axes.set_xticks(range(len(names)), names)
        axes.set_xlabel("images in a cluster" + (", at least" if width < WIDTH else ""), loc="right")
        axes.yaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: magnitude(value)))
        return _svg(figure)


def standings(rows: Sequence[Standing], series: dict[str, int], *, width: float = WIDTH) -> str:
    """Draw a dot for each model and set: the teacher hollow, chance a tick, and a line for the reach of each score.

    `series` are places in the palette. Models lie one below the other in a row: no line hides another.
    A `width` (inches) of less than the page's puts the names of the sets above the rows.
    """
    narrow = width < WIDTH
    longest = max(len(row.label) for row in rows)
    columns = 6 if not narrow else 3
    row_height, top = (0.16 + 0.075 * len(series)) + 0.2 * narrow, 0.2 + 0.2 * -(-(len(series) + 1) // columns)
    heights = np.arange(len(rows))[::-1]
    with _style(f"standings {width}"):
        left = 0.12 if narrow else 0.3 + 0.075 * longest
        height = 0.35 + top + row_height * len(rows)
        figure, (axes,) = _panels([""], width=width, height=height, left=left, bottom=0.3, top=top)
        axes.grid(axis="y", visible=False)
        for place, row in zip(heights, rows, strict=True):
            if row.chance is not None:
                axes.plot([100 * row.chance], [place], "|", color=PALETTE["--muted"], markersize=9, zorder=2)
            if place:
                axes.axhline(place - 0.5, color=PALETTE["--line"], linewidth=0.7, zorder=0)
            if narrow:
                axes.text(0, place + 0.46, row.label, va="top", transform=axes.get_yaxis_transform())
        dots = _dots(axes, rows, heights - 0.2 * narrow, series, spread=0.5 if narrow else 0.66)
        if any(row.chance is not None for row in rows):
            dots += axes.plot([], [], "|", color=PALETTE["--muted"], markersize=9)
        axes.set_yticks(heights, ["" if narrow else row.label for row in rows])
        axes.tick_params(axis="y", labelcolor=PALETTE["--ink"])
        axes.set_ylim(-0.5, len(rows) - 0.5)
        axes.set_xlim(left=0)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))
        names = [*series, "chance"][: len(dots)]  # as labels, matplotlib would leave out those that begin with `_`
        axes.legend(
            dots,
            names,
            loc="lower left",
            bbox_to_anchor=(0, 1),
            ncols=columns,
            borderaxespad=0.3,
            handletextpad=0.2,
            columnspacing=1.4,
        )
        return _svg(figure)


def _dots(
    axes: Axes, rows: Sequence[Standing], heights: Float[np.ndarray, " r"], series: dict[str, int], *, spread: float
) -> list[Line2D]:
    """Draw the dots of each model with their lines, the models spread over a share of a row; return the dots."""
    dots = []
    offsets = spread * (0.5 - (np.arange(len(series)) + 0.5) / len(series))
    for (name, place), offset in zip(series.items(), offsets, strict=True):
        colour = _line_style(place)["color"]
        for row, height in zip(rows, heights, strict=True):
            if name in row.reach:
                low, high = row.reach[name]
                axes.hlines(height + offset, 100 * low, 100 * high, color=colour, linewidth=1.3, zorder=2)
        places = [
            (100 * row.values[name], height + offset)
            for row, height in zip(rows, heights, strict=True)
            if name in row.values
        ]
        dots += axes.plot(
            *zip(*places, strict=True),
            "o",
            color=colour,
            markerfacecolor=PALETTE["--paper"] if place == 0 else colour,
            markeredgewidth=1.4,
            markersize=5,
            zorder=3 + place,
        )
    return dots


def inline(svg: str, *, label: str, axis: tuple[float, float] | None = None) -> Markup:
    """Return an SVG file as an element of the page: named for screen readers, in the page's colours and font.

    `axis` tells the page's script where 0 lies and how long 1 is, so that it can mark a place.

    The ids of matplotlib's groups are left out: they would repeat from figure to figure, and nothing refers to them.
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
    if axis is not None:
        opening += f' data-axis="{axis[0]:.2f} {axis[1]:.4f}"'
    return Markup(f'{opening} xmlns:xlink="http://www.w3.org/1999/xlink">{rest.strip()}')


def _style(salt: str) -> Any:
    """Set up matplotlib for one figure; `salt` makes its ids differ from those of other figures."""
    return mpl.rc_context(
        {
            "svg.fonttype": "none",
            "text.parse_math": False,  # a dollar sign in a name is one
            "svg.hashsalt": salt,
            "font.family": "DejaVu Sans",
            "font.size": 9,
            "axes.edgecolor": PALETTE["--muted"],
            "axes.labelcolor": PALETTE["--muted"],
            "axes.titlecolor": PALETTE["--ink"],
            "text.color": PALETTE["--ink"],
            "xtick.color": PALETTE["--muted"],
            "ytick.color": PALETTE["--muted"],
            "legend.frameon": False,
            "legend.fontsize": 9,
        }
    )


def _panels(
    names: Sequence[str],
    *,
    width: float,
    height: float,
    left: float,
    bottom: float = 0.42,
    top: float = 0.28,
) -> tuple[Figure, list[Axes]]:
    """Make panels one below the other, each with its name over the left corner, a light grid and no box.

    Sizes and margins are fixed, in inches, so that figures beside each other line up whatever their labels.
    """
    figure = Figure(figsize=(width, height))
    panels = figure.subplots(len(names), 1, sharex=True, squeeze=False)[:, 0].tolist()
    figure.subplots_adjust(
        left=left / width, right=1 - RIGHT / width, bottom=bottom / height, top=1 - top / height, hspace=0.3
    )
    for axes, name in zip(panels, names, strict=True):
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.grid(color=PALETTE["--line"], linewidth=0.7)
        axes.set_axisbelow(True)
        axes.tick_params(length=0)
        axes.set_title(name, loc="left", fontsize=9.5, fontweight="bold")
    return figure, panels


def _line_style(series: int) -> dict[str, Any]:
    dashes: Literal["-", "--"] = "-" if series < NUM_SERIES else "--"
    return {"color": PALETTE[f"--series-{series % NUM_SERIES}"], "linestyle": dashes, "linewidth": 1.4}


def _metric_axis(axes: Axes, metric: str, *, narrow: bool) -> None:
    """Label the threshold's axis in three rows: the metric of balance first, then the same in the other two."""
    others = [name for name in equivalents(1.0, metric) if name != metric]

    def label(value: float, _: int | None = None) -> str:
        if value <= 0:
            return "0\n0\n0"
        same = equivalents(value, metric)
        return "\n".join(significant(same[name]) for name in (metric, *others))

    axes.xaxis.set_major_locator(MaxNLocator(nbins=3 if narrow else 7, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(label))
    axes.set_xlim(left=0)
    axes.annotate(
        "\n".join([metric if narrow else f"{metric} distance", *(f"= {name}" for name in others)]),
        (0, 0),
        xycoords="axes fraction",
        xytext=(-18, -3.5),
        textcoords="offset points",
        ha="right",
        va="top",
        color=PALETTE["--muted"],
    )


def _svg(figure: Figure) -> str:
    """Return the figure as SVG text without date and version."""
    buffer = io.StringIO()
    with warnings.catch_warnings():
        # Text is written as text: the reader's fonts have what DejaVu lacks.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return buffer.getvalue()
