from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from distilclip.report.load import load
from distilclip.report.page import Page, build
from distilclip.report.sections import GallerySize
from tests.report.made_run import NASTY, digest, write_balance, write_evaluate, write_run, write_stage


def page_of(folder: Path) -> Page:
    size = GallerySize(num_groups=2, num_clusters=2, num_pictures=3, thumbnail=48)
    return build(load([str(folder)]), heading="A <b>report</b>", size=size)


class Elements(HTMLParser):
    """Every start tag with its attributes, and the text of each element by tag."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    return page_of(write_run(tmp_path_factory.mktemp("page")))


def test_captions_and_titles_are_text_never_markup(page: Page) -> None:
    elements = Elements(page.html)
    assert not elements.named("script")
    assert not elements.named("b")
    assert any(image["alt"] == NASTY for image in elements.named("img"))
    assert not any(name.startswith("on") for _, attributes in elements.tags for name in attributes)


def test_the_page_refers_to_nothing_outside_itself(page: Page) -> None:
    elements = Elements(page.html)
    assert not elements.named("link")
    for _, attributes in elements.tags:
        for name in ("src", "href", "srcset", "action", "data"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:image/jpeg;base64,", "#"))
    style = page.html[page.html.index("<style>") : page.html.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    policy = next(meta for meta in elements.named("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    assert str(policy["content"]).startswith("default-src 'none'")


def test_every_anchor_leads_to_a_section(page: Page) -> None:
    elements = Elements(page.html)
    ids = {attributes["id"] for _, attributes in elements.tags if "id" in attributes}
    assert {str(link["href"])[1:] for link in elements.named("a")} <= ids


def test_every_picture_has_a_text_and_a_size(page: Page) -> None:
    images = Elements(page.html).named("img")
    assert len(images) > 20
    assert all(image["alt"] and image["width"] and image["height"] for image in images)


def test_the_page_tells_the_whole_story(page: Page) -> None:
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", page.html))
    for words in (
        "clip-cid is the best of 3 students: 45.5 % mean zero-shot of 2 sets, +16.5 points against plain, which had no "
        "teacher, and 81 % of its teacher&#39;s score.",
        "Semantic balance kept 14 of 22 pictures (36.4 % removed).",
        "task + relational + 2000 feature + interactive",
        "sketch, linear probe: no top-1 score, the set has no training images.",
        "0.07 sqeuclidean = 0.265 euclidean = 0.035 cosine",
        "truncated image",
        "Gini",
    ):
        assert words in text
    assert page.absent == []
    assert {"standings.svg", "threshold.svg", "cluster-sizes.svg", "training-loss.svg"} <= set(page.figures)


def test_pairs_on_either_side_of_the_threshold_are_shown_with_their_distance(tmp_path: Path) -> None:
    html = page_of(write_run(tmp_path)).html
    under = html.index("Just under the threshold")
    over = html.index("Just over it")
    assert "0.0699" in html[under:over]
    assert "0.0701" in html[over : html.index("The representatives that stand for most others")]
    assert html[under:over].count("<img") == 2
    assert "of the removed lie over the threshold from the kept one" in html


def test_what_is_missing_is_named_with_the_stage_that_would_fill_it(tmp_path: Path) -> None:
    write_evaluate(tmp_path / "evaluate")
    write_stage(tmp_path / "cluster", "cluster", None)
    page = page_of(tmp_path)
    assert [stage for _, stage in page.absent] == ["train", "balance", "cluster", "embed"]
    assert 'id="balance"' not in page.html
    assert "The threshold curve and the gallery of groups: <code>distilclip balance</code> would fill it." in page.html
    assert f"<code>{tmp_path}/cluster</code> is unfinished" in page.html


def test_a_gallery_without_its_store_or_tars_says_so(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    for tar in (run / "pairs").iterdir():
        tar.unlink()
    page = page_of(run)
    assert "No gallery: " in page.html
    assert "00000.tar" in page.html
    write_balance(tmp_path / "alone", tmp_path / "no-store")
    page = page_of(tmp_path / "alone")
    assert "No gallery: " in page.html
    assert "no-store is no finished store" in page.html
    assert "threshold.svg" in page.figures


def test_a_moved_run_finds_its_store_again(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    (tmp_path / "run" / "embed").rename(tmp_path / "run" / "store")
    assert "No gallery" not in page_of(tmp_path / "run").html


def test_scores_alone_make_a_page_without_students(tmp_path: Path) -> None:
    row = {"model": "ViT-B-32", "model_digest": digest("x"), "set": "cars", "task": "zero-shot", "metric": "top1"}
    write_stage(tmp_path, "evaluate", {"rows": [{**row, "value": 0.594}], "models": []})
    page = page_of(tmp_path)
    assert "59.4" in page.html
    assert "Results of 1 stage folder." in page.html


def test_one_model_under_several_names_is_pointed_out(tmp_path: Path) -> None:
    row = {"set": "shape", "task": "zero-shot", "metric": "top1", "value": 0.5}
    names = {"centers-400": "a", "all-terms": "a", "centers-40": "b"}
    rows = [{**row, "model": name, "model_digest": digest(weights)} for name, weights in names.items()]
    write_stage(tmp_path, "evaluate", {"rows": rows, "models": []})
    html = page_of(tmp_path).html
    assert html.count("the same weights") == 1
    assert "centers-400 = all-terms: the same weights." in html


def test_chaining_is_pointed_out(tmp_path: Path) -> None:
    write_run(tmp_path)
    assert "chained together" not in page_of(tmp_path).html
    result = json.loads((tmp_path / "balance" / "result.json").read_text())
    result |= {"num_valid": 1000, "largest_group": 920}
    (tmp_path / "balance" / "result.json").write_text(json.dumps(result))
    assert "The largest group holds 92.0 % of all pictures" in page_of(tmp_path).html
