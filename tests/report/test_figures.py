from __future__ import annotations

import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from distilclip.report import figures
from distilclip.report.load import Series


def line(label: str = "student <1>", num: int = 20, series: int = 2) -> figures.Line:
    steps = np.arange(num)
    return figures.Line(label=label, series=series, data=Series(step=steps, value=np.exp(-steps / 10)))


@pytest.fixture(scope="module")
def drawings() -> dict[str, str]:
    return draw()


def draw() -> dict[str, str]:
    points = [
        figures.CurvePoint(threshold=0.01 * i, removed_ratio=0.05 * i, num_groups=20 - i, largest_group=1 + i)
        for i in range(8)
    ]
    reach = {"teacher": (0.55, 0.64), "student": (0.36, 0.45)}
    standing = figures.Standing(label="shape", values={"teacher": 0.6, "student": 0.4}, chance=0.1, reach=reach)
    series = {"teacher": 0, "student": 1}
    return {
        "training": figures.training_curve("loss", [line(), line("b", series=11)]),
        "threshold": figures.threshold_curve(points, metric="sqeuclidean", threshold=0.07),
        "clusters": figures.cluster_sizes([0, 2, 5, 1], [0, 1, 4, 2, 1]),
        "standings": figures.standings([standing], series),
        "narrow threshold": figures.threshold_curve(points, metric="sqeuclidean", threshold=0.07, width=figures.NARROW),
        "narrow clusters": figures.cluster_sizes([0, 2, 5, 1], [0, 1, 4, 2, 1], width=figures.NARROW),
        "narrow standings": figures.standings([standing], series, width=figures.NARROW),
    }


@pytest.mark.parametrize("name", ["_begins", "a$b$c", "日本 🙂", 'say "<b>"', "x_1^2 {y}"])
def test_names_are_shown_as_they_are(name: str) -> None:
    standing = figures.Standing(label=f"set {name}", values={name: 0.6, "other": 0.4}, chance=None)
    svg = figures.standings([standing], {name: 0, "other": 1})
    texts = ["".join(text.itertext()) for text in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]
    assert {name, f"set {name}", "other"} <= set(texts)


def test_equal_numbers_give_equal_bytes(drawings: dict[str, str]) -> None:
    assert draw() == drawings


@pytest.mark.parametrize("name", list(draw()))
def test_an_inline_figure_is_well_formed_named_themed_and_without_repeated_ids(
    drawings: dict[str, str], name: str
) -> None:
    svg = drawings[name]
    ET.fromstring(svg)
    inline = figures.inline(svg, label='what it "says"')
    root = ET.fromstring(inline)
    assert root.get("aria-label") == 'what it "says"'
    assert root.get("role") == "img"
    assert "var(--ink)" in inline or "var(--muted)" in inline
    left_over = set(re.findall(r"#[0-9a-f]{6}\b", inline)) - {"#000000", "#ffffff"}
    assert not left_over, "every colour follows the page"
    assert "DejaVu" not in inline
    assert "http" not in inline.replace("http://www.w3.org/1999/xlink", "").replace("http://www.w3.org/2000/svg", "")


def test_ids_differ_from_figure_to_figure(drawings: dict[str, str]) -> None:
    ids = [set(re.findall(r' id="([^"]*)"', figures.inline(svg, label=""))) for svg in drawings.values()]
    assert sum(map(len, ids)) == len(set.union(*ids))


def test_the_axis_tells_the_threshold_in_all_three_metrics(drawings: dict[str, str]) -> None:
    svg = drawings["threshold"]
    for words in ("sqeuclidean distance", "= euclidean", "= cosine", "chosen: 0.07", "0.245", "0.03"):
        assert f">{words}<" in svg


@pytest.mark.parametrize("name", ["threshold", "clusters", "standings"])
def test_a_narrow_figure_fits_a_phone_and_says_the_same(drawings: dict[str, str], name: str) -> None:
    root = ET.fromstring(drawings[f"narrow {name}"])
    assert float(root.get("width", "").removesuffix("pt")) * 96 / 72 <= 390 - 32
    words = [
        {"".join(text.itertext()) for text in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")}
        for svg in (drawings[name], drawings[f"narrow {name}"])
    ]
    letters = [{word for word in some if word[0].isalpha() and " distance" not in word} for some in words]
    assert {word.removesuffix(", at least") for word in letters[1]} >= letters[0]


def test_a_line_through_a_dot_shows_the_reach_of_a_score() -> None:
    values = {"teacher": 0.6, "student": 0.4}
    bare = figures.Standing(label="shape", values=values, chance=None)
    lined = figures.Standing(label="shape", values=values, chance=None, reach={"student": (0.36, 0.45)})
    drawn = [figures.standings([row], {"teacher": 0, "student": 1}) for row in (bare, lined)]
    colour = figures.PALETTE["--series-1"]
    assert drawn[1].count(f"stroke: {colour}; stroke-width: 1.3") == 1
    assert drawn[0].count(f"stroke: {colour}; stroke-width: 1.3") == 0


def test_thin_averages_and_keeps_the_end() -> None:
    series = Series(step=np.arange(1, 1001), value=np.arange(1000.0))
    thinned = figures.thin(series, 10)
    assert thinned.step.tolist() == list(range(100, 1001, 100))
    assert thinned.value.tolist() == [49.5 + 100 * i for i in range(10)]
    assert figures.thin(series, 1000) is series
