"""The page's script in a browser: slider, pages, curves and map, by keyboard; and the page without it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from distilclip.stages.report import Config, main
from tests.report.made_run import NASTY, forest_edges, naive_largest, write_run

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("page")
    run = write_run(folder / "run")
    out = folder / "report"
    main(Config(folders=(str(run),), out=str(out), num_groups=1, num_clusters=1, num_pictures=3, thumbnail_size=48))
    return (out / "index.html").as_uri()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no chromium: install Debian's package chromium to look at the page in a browser")
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: install the extra dev")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser: Any, address: str) -> Iterator[Callable[..., Any]]:
    """Open the page; at the end, nothing may have been said on the console or asked of the network."""
    said: list[str] = []
    asked: list[str] = []
    pages = []

    def visit(width: int = 1000, **settings: Any) -> Any:
        page = browser.new_page(viewport={"width": width, "height": 800}, **settings)
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(address)
        pages.append(page)
        return page

    yield visit
    for page in pages:
        page.close()
    assert said == []
    assert {url for url in asked if not url.startswith("data:")} == {address}


def facts(page: Any) -> list[str]:
    return [page.locator(f"[data-fact={name}]").inner_text() for name in ("threshold", "removed", "groups", "largest")]


def test_the_slider_moves_by_keyboard_to_what_the_forest_says(visit: Callable[..., Any]) -> None:
    page = visit()
    slider = page.get_by_label("Threshold", exact=True)
    first = facts(page)
    assert first == ["0.07 sqeuclidean = 0.265 euclidean = 0.035 cosine", "36.4 %", "14", "4"]
    cursor = page.locator(".wide .cursor")
    place = float(cursor.get_attribute("x1"))
    slider.focus()
    for _ in range(20):
        page.keyboard.press("ArrowRight")
    threshold = float(facts(page)[0].split()[0])
    assert threshold == pytest.approx(0.084)
    edges = forest_edges()
    stop = int((edges.distance < np.float32(threshold)).sum())
    largest = naive_largest(edges.left[:stop].tolist(), edges.right[:stop].tolist())
    assert facts(page)[1:] == [f"{100 * stop / 22:.1f} %", str(22 - stop), str(largest)]
    assert float(cursor.get_attribute("x1")) > place
    assert f"{threshold:g} sqeuclidean" in slider.get_attribute("aria-valuetext")
    under = page.locator("[data-pairs=under] .measure").all_inner_texts()
    over = page.locator("[data-pairs=over] .measure").all_inner_texts()
    assert [value for value in under if value] == ["0.075", "0.065", "0.055"]
    assert [value for value in over if value] == ["0.085", "0.095", "0.105"]
    assert page.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
    page.keyboard.press("Home")
    assert page.locator("[data-pairs=under]").inner_text() == "none on this page"
    page.get_by_role("button", name="Back to the chosen one").press("Enter")
    assert facts(page) == first


def test_galleries_turn_pages_by_buttons_and_arrow_keys(visit: Callable[..., Any]) -> None:
    page = visit()
    pager = page.get_by_role("group", name="Pages: Largest clusters")
    gallery = pager.locator("xpath=following-sibling::div[1]")
    assert pager.get_by_role("status").inner_text() == "Page 1 of 2"
    assert "Cluster 0" in gallery.inner_text()
    pager.get_by_role("button", name="Next").press("Enter")
    assert pager.get_by_role("status").inner_text() == "Page 2 of 2"
    assert "Cluster 1" in gallery.inner_text()
    assert "Cluster 0" not in gallery.inner_text()
    assert pager.get_by_role("button", name="Next").get_attribute("aria-disabled") == "true"
    page.keyboard.press("ArrowRight")
    assert pager.get_by_role("status").inner_text() == "Page 2 of 2", "the last page has no next"
    assert page.evaluate("[...document.images].every(i => i.naturalWidth > 0)")
    page.keyboard.press("ArrowLeft")
    assert "Cluster 0" in gallery.inner_text()


def test_curves_are_smoothed_hidden_read_and_drawn_on_a_logarithmic_scale(visit: Callable[..., Any]) -> None:
    page = visit()
    chart = page.locator("#training figure").first
    lines = chart.locator("path.line")

    def drawn() -> list[str]:
        return [line.get_attribute("d") for line in lines.all()]

    assert not chart.locator(":scope > svg").is_visible(), "the drawn chart makes way for the live one"
    before = drawn()
    assert len(before) == 8, "four trainings, and their loss on held-out pairs"
    smoothing = page.get_by_label("Smoothing")
    smoothing.focus()
    page.keyboard.press("End")
    assert len(drawn()) == 12, "the values stay, faint, behind their means"
    assert set(before) <= set(drawn())
    page.keyboard.press("Home")
    assert drawn() == before
    page.get_by_label("Logarithmic scale").press("Space")
    assert drawn() != before
    plot = chart.locator("svg.plot")
    plot.focus()
    page.keyboard.press("End")
    page.keyboard.press("ArrowLeft")
    reading = chart.locator(".reading").inner_text()
    assert reading.startswith("step 580")
    assert "clip-kd, held out: 3" in reading
    page.keyboard.press("Escape")
    assert not chart.locator(".reading").is_visible()
    page.get_by_role("button", name="clip-kd").press("Enter")
    assert len(drawn()) == 6
    assert page.locator("#training figure", has_text="relational").locator("path.line").count() == 0


def test_the_map_is_walked_zoomed_coloured_and_searched_by_keyboard(visit: Callable[..., Any]) -> None:
    page = visit()
    canvas = page.locator("[data-map] canvas[tabindex]")
    reading = page.locator("[data-map] .reading")

    def drawn() -> str:
        return canvas.evaluate("canvas => canvas.toDataURL()")

    whole = drawn()
    canvas.focus()
    page.keyboard.press("ArrowRight")
    first = reading.inner_text()
    assert "picture" in first or NASTY in first
    assert "cluster: " in first
    assert "kept or removed: " in first
    assert drawn() != whole
    painted = reading.locator("canvas").evaluate(
        "c => [...c.getContext('2d').getImageData(0, 0, 64, 64).data].filter((v, i) => i % 4 == 3 && v).length"
    )
    assert painted == 64 * 64, "the picture stands beside its dot"
    seen = {first}
    for key in ("ArrowRight", "ArrowDown", "ArrowLeft", "ArrowUp", "ArrowLeft"):
        page.keyboard.press(key)
        seen.add(reading.inner_text())
    assert len(seen) > 2
    page.keyboard.press("Escape")
    assert not reading.is_visible()
    assert drawn() == whole
    page.keyboard.press("+")
    assert drawn() != whole
    page.keyboard.press("0")
    assert drawn() == whole
    page.get_by_label("Colour by").select_option("kept or removed")
    assert page.locator("[data-map] .legend").inner_text().split() == ["kept", "14", "removed", "8"]
    coloured = drawn()
    assert coloured != whole
    page.locator("[data-map] .legend button").last.press("Enter")
    assert drawn() != coloured
    page.keyboard.press("Enter")
    assert drawn() == coloured
    page.get_by_label("Captions with").fill("ALERT")
    assert page.locator("[data-map] output").inner_text() == "2 found"


def test_without_scripts_the_page_shows_its_tables_charts_and_pictures(visit: Callable[..., Any]) -> None:
    page = visit(java_script_enabled=False)
    for selector in (
        "#comparison table",
        "#training figure > svg",
        "#balance .wide svg",
        "#clusters img",
        "#balance img",
    ):
        assert page.locator(selector).first.is_visible(), selector
    assert page.locator("img:visible").count() > 10
    assert page.locator("input:visible, button:visible").count() == 0


@pytest.mark.parametrize("width", [400, 1400])
def test_what_the_script_adds_fits_the_page(visit: Callable[..., Any], width: int) -> None:
    page = visit(width)
    page.get_by_label("Threshold", exact=True).press("End")
    page.locator("[data-map] canvas[tabindex]").press("ArrowRight")
    assert page.evaluate("document.documentElement.scrollWidth - window.innerWidth") <= 0
    ends = page.evaluate(
        "[...document.querySelectorAll('.control > *, .pager > *, [data-fact], .slider img, .plot')]"
        ".concat(document.querySelector('[data-map] .reading'))"
        ".map(e => e.getBoundingClientRect()).map(b => [b.left, b.right])"
    )
    assert len(ends) > 20
    assert all(0 <= left < right <= width for left, right in ends)
