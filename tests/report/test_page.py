from __future__ import annotations

import json
import re
import shutil
import tarfile
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

import distilclip as dc
from distilclip.report.load import load
from distilclip.report.page import Page, build, script, sha256
from distilclip.report.sections import GallerySize
from distilclip.sets.published import PublishedRow, published_rows
from tests.conftest import write_tar
from tests.report.made_run import (
    NASTY,
    NUM_ROWS,
    digest,
    write_balance,
    write_embed,
    write_evaluate,
    write_run,
    write_stage,
)


def page_of(folder: Path, published: Sequence[PublishedRow] = ()) -> Page:
    size = GallerySize(num_groups=2, num_clusters=2, num_pictures=3, thumbnail=48)
    return build(load([str(folder)]), heading="A <b>report</b>", size=size, published=published)


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
    assert elements.named("script") == [{"type": "application/json", "id": "page-data"}, {}]
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


def test_the_only_script_is_the_pages_own_and_no_caption_can_end_it(page: Page) -> None:
    found = re.findall(r"<script[^>]*>(.*?)</script>", page.html, flags=re.DOTALL)
    values, code = found
    assert code == script()
    assert f"script-src 'sha256-{sha256(code)}'" in page.html
    assert not set("<>&") & set(values)
    captions = [picture[3] for picture in json.loads(values)["sliders"][0]["pictures"]]
    assert NASTY in captions


def test_classes_and_confusions_stand_on_the_page_where_evaluate_tells_them(page: Page) -> None:
    text = page.html[page.html.index("shape, class by class") : page.html.index('id="training"')]
    names = re.findall(r'<tr><th scope="row">([^<]*)</th>', text)
    assert names[0] == "ring", "the hardest class is first"
    assert names[1].startswith("&lt;script&gt;")
    assert text.count('style="--share: 25.0%"') == 4, "each model's bar of the ring"
    assert "sketch, class by class" not in page.html
    assert re.search(r'<td class="text">ring</td><td class="text">&lt;script&gt;.*?</td><td>30</td>', text)


def test_no_script_writes_markup(page: Page) -> None:
    for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "DOMParser", "</script"):
        assert word not in script()


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
        "clip-cid scores highest of 3 students: 45.5 % mean zero-shot of 2 sets (95 % interval 42.7 to 48.3), 81 % of "
        "its teacher&#39;s score.",
        "That is +16.5 points against plain, which had no teacher (+12.5 to +20.5 from the intervals of the two "
        "scores): more than the choice of test pictures explains. Each student was trained with one seed only: another "
        "seed can change the order.",
        "Semantic balance kept 14 of 22 pictures (36.4 % removed).",
        "task + relational + 2000 feature + interactive",
        "Linear probe: no top-1 score on sketch, the set has no training images.",
        "0.07 sqeuclidean = 0.265 euclidean = 0.035 cosine",
        "truncated image",
        "Gini",
    ):
        assert words in text
    assert page.absent == []
    assert {"standings.svg", "threshold.svg", "cluster-sizes.svg", "training-loss.svg"} <= set(page.figures)
    assert {"training-validate-sketch-top1.svg", "training-validate-held-out-loss.svg"} <= set(page.figures)


def test_pairs_on_either_side_of_the_threshold_are_shown_with_their_distance(tmp_path: Path) -> None:
    html = page_of(write_run(tmp_path)).html
    under = html.index("Just under the threshold")
    over = html.index("Just over it")
    assert "0.0699" in html[under:over]
    assert "0.0701" in html[over : html.index("The representatives that stand for most others")]
    assert html[under:over].count("<img") == 2
    assert "of the removed lie over the threshold from the kept one" in html


def test_a_selection_is_shown_with_its_cut_and_the_pairs_on_either_side(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    np.save(tmp_path / "values.npy", np.arange(24) / 10)
    options = {"store": str(run / "embed"), "score": "column", "values": str(tmp_path / "values.npy"), "top": 0.5}
    for out in ("one", "two"):
        dc.stages.select(out=str(run / out), device="cpu", **options)
    dc.stages.select(store=options["store"], out=str(run / "both"), groups=[str(run / "one"), str(run / "two")])
    page = page_of(run)
    text = page.html[page.html.index('id="selection"') : page.html.index('id="clusters"')]
    assert {"scores.svg", "scores-2.svg"} <= set(page.figures)
    assert text.count("<h3><code>") == 3
    assert "A selection kept 11 of 22 pairs: those with a score of at least 1.2." in page.html
    first = text[text.index("Pairs on either side of the cut") : text.index(f"{run}/two")]
    shown = re.findall(r'class="measure">([^<]*)<', first)
    assert shown[:4] == ["kept: 1.2", "1.1", "kept: 1.3", "1"]
    assert first.count("<img") == 12
    assert "No gallery" not in text


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


def test_what_balance_warns_of_stands_on_the_page(tmp_path: Path) -> None:
    write_run(tmp_path)
    page = page_of(tmp_path)
    assert "doubtful" not in page.html
    result = json.loads((tmp_path / "balance" / "result.json").read_text())
    result["warnings"] = ["99.3% of the images are removed <b>", "One group holds 920 of 1,000 images"]
    (tmp_path / "balance" / "result.json").write_text(json.dumps(result))
    html = page_of(tmp_path).html
    assert '<p class="problem">99.3% of the images are removed &lt;b&gt;</p>' in html
    assert '<p class="problem">One group holds 920 of 1,000 images</p>' in html
    assert "(36.4 % removed, which is doubtful, see below)" in html


def test_what_holds_for_several_sets_is_said_once(tmp_path: Path) -> None:
    row = {"model": "a", "model_digest": digest("a"), "task": "linear-probe", "metric": "top1", "value": None}
    rows = [{**row, "set": name, "reason": "no training images"} for name in ("shape", "sketch", "colour")]
    rows += [
        {**row, "set": "shape", "task": "zero-shot", "metric": metric, "value": 0.5, "num_unreadable": 2}
        for metric in ("top1", "top5")
    ]
    write_stage(tmp_path, "evaluate", {"rows": rows, "models": []})
    html = page_of(tmp_path).html
    assert html.count("no training images") == 1
    assert "Linear probe: no top-1 score on shape, sketch, colour, no training images." in html
    assert html.count("shape: 2 pictures could not be read") == 1


def test_a_table_shows_intervals_and_a_broad_chart_has_a_narrow_twin(page: Page) -> None:
    assert '<small class="interval">47.5\N{EN DASH}55.5</small>' in page.html
    broad = page.html.count('<figure class="broad">')
    assert broad == page.html.count('<div class="narrow">') == 3
    labels = [attributes["aria-label"] for attributes in Elements(page.html).named("svg")]
    assert all(labels)


def test_the_corpus_own_truth_stands_on_the_page(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    assert "The corpus knows" not in page_of(run).html
    (run / "pairs").rename(run / "made")
    for tar in (run / "made").iterdir():
        with tarfile.open(tar) as source:
            members = [(m.name, source.extractfile(m).read()) for m in source.getmembers()]  # type: ignore[union-attr]
        with_truth = []
        for row in range(NUM_ROWS):
            truth = {"group": {1: 0, 2: 0, 4: 4, 6: 6, 5: 6}.get(row, row)}
            with_truth += [m for m in members if m[0].startswith(f"{row:05d}.")]
            with_truth.append((f"{row:05d}.json", json.dumps(truth).encode()))
        tar.unlink()
        write_tar(run / "corpus" / "train" / tar.name, with_truth)
    write_stage(run / "corpus", "corpus", {})
    shutil.rmtree(run / "embed")
    write_embed(run / "embed", sorted(map(str, (run / "corpus" / "train").iterdir())), teacher="teacher")
    text = re.sub(r"\s+", " ", page_of(run).html)
    # Of each shard: 1 and 2 go for 0, rightly; 4 for 0, wrongly: its scene is lost; 6 for 5, rightly.
    assert "75.0 % of the removed pictures (6 of 8) were removed for a picture of the same scene" in text
    assert "% of the scenes (1 of 8) lost every picture" in text


def test_published_rows_stand_below_the_models_and_change_nothing_else(tmp_path: Path) -> None:
    write_evaluate(tmp_path / "evaluate")
    result = tmp_path / "evaluate/result.json"
    result.write_text(result.read_text().replace('"shape"', '"imagenet"'))
    own = page_of(tmp_path).html
    shown = page_of(tmp_path, published_rows(["clip-kd-vit-b-16"])).html
    rows = re.findall(r'<tr class="published">.*?</tr>', shown, flags=re.DOTALL)
    assert len(rows) == 13
    assert "ViT-T/16, CLIP-KD by ViT-B/16 (published)" in rows[2]
    assert re.findall(r">([\d.]+)</td>", rows[2]) == ["34.90"]
    note = (
        '<p class="note">(published): copied from CLIP-KD (Yang et al., CVPR 2024; README of github.com/winycg/CLIP-KD)'
    )
    assert note in shown
    lines = {line for line in own.splitlines() if line.strip()}
    rest = re.sub(r'<tr class="published">.*?</tr>', "", shown, flags=re.DOTALL)
    assert [line for line in rest.splitlines() if line.strip() and line not in lines] == [
        line for line in rest.splitlines() if line.startswith(note)
    ]


def test_a_page_without_a_place_for_published_rows_says_so(tmp_path: Path) -> None:
    write_evaluate(tmp_path / "evaluate")
    html = page_of(tmp_path, published_rows(["clip-cid"])).html
    assert "No published number is for these sets and tasks." in html
    assert '<tr class="published">' not in html
