from __future__ import annotations

import dataclasses
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from distilclip.errors import InputError
from distilclip.stages.report import Config, main
from tests.report.made_run import write_balance, write_run
from tests.stages.conftest import contents


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("report") / "run")


def config(run: Path, out: Path) -> Config:
    return Config(folders=(str(run),), out=str(out), num_groups=2, num_clusters=1, num_pictures=4, thumbnail_size=48)


def test_the_same_results_give_the_same_bytes(run: Path, tmp_path: Path) -> None:
    result = main(config(run, tmp_path / "one"))
    main(config(run, tmp_path / "two"))
    first = contents(tmp_path / "one")
    assert first == contents(tmp_path / "two")
    assert {"index.html", "result.json", "figures/standings.svg", "figures/threshold.svg"} <= set(first)
    assert {f"figures/{name}" for name in result["figures"]} == {n for n in first if n.startswith("figures/")}


def test_a_page_cut_short_is_made_again_and_a_finished_one_is_left(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "report"
    main(config(run, out))
    whole = contents(out)
    for name in ("result.json", "index.html", "figures/threshold.svg"):
        (out / name).unlink()
    main(config(run, out))
    assert contents(out) == whole
    made = (out / "index.html").stat().st_mtime_ns
    main(config(run, out))
    assert (out / "index.html").stat().st_mtime_ns == made


def test_the_page_may_lie_in_the_run_that_it_tells_about(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    inside = tmp_path / "run" / "report"
    first = main(config(tmp_path / "run", inside))
    assert main(config(tmp_path / "run", inside)) == first


def test_results_newer_than_the_page_are_an_error_that_names_them(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    main(config(tmp_path / "run", tmp_path / "report"))
    write_balance(tmp_path / "run" / "balance-two", run / "embed")
    with pytest.raises(InputError, match=r"balance-two came, went or changed.*another --out"):
        main(config(tmp_path / "run", tmp_path / "report"))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"folders": ()}, "--folders"),
        ({"num_groups": 0}, "num_groups is 0"),
        ({"thumbnail_size": 4}, "thumbnail_size is 4"),
    ],
)
def test_a_setting_that_makes_no_sense_is_named(run: Path, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        dataclasses.replace(config(run, run), **wrong)


def test_a_missing_package_is_named_with_the_extra(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"distilclip\[report\]"):
        config(run, run)


def test_the_report_needs_no_torch(run: Path, tmp_path: Path) -> None:
    program = (
        "import sys\n"
        "from distilclip.stages.report import Config, main\n"
        f"main(Config(folders=({str(run)!r},), out={str(tmp_path / 'report')!r}))\n"
        "assert not [name for name in sys.modules if name.split('.')[0] in ('torch', 'open_clip', 'numba')]\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
    assert json.loads((tmp_path / "report" / "result.json").read_text())["absent"] == []


IN_SIGHT = """(selector => [...document.querySelectorAll(selector)].filter(e => e.getClientRects().length)
    .map(e => e.getBoundingClientRect()).map(b => [b.left, b.right, b.width, b.height]))"""


@pytest.mark.browser
@pytest.mark.parametrize(
    ("scheme", "width"),
    [
        ("light", 1280),
        pytest.param("light", 390, marks=pytest.mark.slow),
        pytest.param("dark", 1280, marks=pytest.mark.slow),
        ("dark", 390),
    ],
)
def test_a_browser_shows_tables_and_pictures_without_errors_or_requests(
    run: Path, tmp_path: Path, width: int, scheme: str
) -> None:
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no chromium: install Debian's package chromium to look at the page in a browser")
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: install the extra dev")
    main(config(run, tmp_path / "report"))
    address = (tmp_path / "report" / "index.html").as_uri()
    errors: list[str] = []
    requests: list[str] = []
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        page.on("console", lambda message: errors.append(message.text))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(address)
        pictures = page.evaluate("[...document.images].map(i => i.complete && i.naturalWidth > 0)")
        tables = page.evaluate("[...document.querySelectorAll('section > .scroll table')].map(t => t.offsetHeight)")
        charts = page.evaluate(f"{IN_SIGHT}('figure svg')")
        words = page.evaluate(f"{IN_SIGHT}('figure svg text, caption, p, li, dd')")
        text = page.evaluate("parseFloat(getComputedStyle(document.querySelector('figure svg text')).fontSize)")
        overflow = page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
        main_width = page.evaluate("document.querySelector('main').getBoundingClientRect().right")
        wide = page.evaluate(f"{IN_SIGHT}('section > .scroll table')") if width > 1000 else []
        browser.close()
    assert errors == []
    assert [url for url in requests if not url.startswith("data:")] == [address]
    assert len(pictures) > 15
    assert all(pictures)
    assert len(tables) >= 3
    assert all(height > 50 for height in tables)
    assert len(charts) >= 10
    assert all(right - left > 200 for left, right, *_ in charts)
    assert all(0 <= left < right <= width for left, right, *_ in [*charts, *words]), "no plot and no text is cut"
    assert text >= 9, "letters of a plot can be read"
    assert overflow <= 0, "the page itself never scrolls sideways"
    assert all(right <= main_width for _, right, *_ in wide), "tables end where the text ends"
