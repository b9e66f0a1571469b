"""Copies of evaluation pictures in the training data: `select` finds and removes them, `evaluate` counts them."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import distilclip as dc
from distilclip import cli
from distilclip.data.side_files import read_groups
from distilclip.data.store import split_id
from distilclip.errors import InputError
from distilclip.models.clip import create_clip
from distilclip.scoring.near_tables import read_near
from tests.conftest import TINY_CLIP, encoded, picture, write_tar
from tests.stages.conftest import contents

THRESHOLD = 0.95
PLANTED = {2: 0, 7: 1, 9: 2, 14: 3, 17: 4, 18: 0}  # rows of the training data and the test picture that each shows


def copy_of(number: int) -> bytes:
    """What happens to a picture on the web: nothing, another quality, another size, both, or another format."""
    shown = picture(100 + number, (96, 64))
    smaller = shown.resize((72, 48), Image.Resampling.BICUBIC)
    return [encoded(shown), jpeg(shown, 50), encoded(smaller, "PNG"), jpeg(smaller, 70), encoded(shown, "WEBP")][number]


def jpeg(shown: Image.Image, quality: int) -> bytes:
    buffer = io.BytesIO()
    shown.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A perceptual store of 20 pictures, of which six are copies, and two evaluation sets: labelled ones, and pairs."""
    folder = tmp_path_factory.mktemp("copies")
    members: list[tuple[str, bytes]] = []
    for row in range(20):
        content = copy_of(PLANTED[row]) if row in PLANTED else encoded(picture(row, (96, 64)))
        members += [(f"{row:05d}.jpg", content), (f"{row:05d}.txt", f"picture {row}".encode())]
    tars = [write_tar(folder / "train" / f"{n}.tar", members[20 * n : 20 * n + 20]) for n in range(2)]
    labelled = [(0, 0), (1, 1), (2, 0), (50, 1), (51, 0)]  # pictures and classes
    test = [m for n, label in labelled for m in ((f"{n}.jpg", shown_in_test(n)), (f"{n}.cls", str(label).encode()))]
    write_tar(folder / "shape" / "test-0.tar", test)
    (folder / "shape" / "classnames.txt").write_text("circle\nsquare\n")
    pairs = [m for n in (3, 4, 60) for m in ((f"{n}.jpg", shown_in_test(n)), (f"{n}.txt", b"words"))]
    write_tar(folder / "pairs" / "test-0.tar", [*pairs, ("x.jpg", b"no image"), ("x.txt", b"words")])
    store = str(folder / "store")
    dc.stages.embed(data=tars, out=store, model="perceptual", num_workers=0)
    return {
        "store": store,
        "shape": f"tar:{folder}/shape",
        "pairs": f"texts=pairs:{folder}/pairs",
        "folder": str(folder),
    }


def shown_in_test(number: int) -> bytes:
    """The file of a test picture."""
    return encoded(picture(100 + number, (96, 64)))


def select(data: dict[str, str], out: Path, **options: Any) -> dict[str, Any]:
    values = {
        "targets": [data["shape"], data["pairs"]],
        "below": THRESHOLD,
        "num_workers": 0,
        "device": "cpu",
        **options,
    }
    return dc.stages.select(store=data["store"], out=out, score="norm-sim", **values)


def removed_rows(folder: Path) -> list[int]:
    groups = [read_groups(str(folder), shard) for shard in range(2)]
    return [10 * shard + row for shard, table in enumerate(groups) for row in table.row[~table.keep].tolist()]


def test_every_planted_copy_is_found_counted_and_left_out(data: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "clean"
    result = select(data, out)
    assert removed_rows(out) == sorted(PLANTED)
    shape, texts = result["targets"]
    assert (shape["name"], texts["name"]) == ("shape", "texts")
    assert [shape[name] for name in ("num_pictures", "num_unreadable", "num_near", "num_rows")] == [5, 0, 3, 4]
    assert [texts[name] for name in ("num_pictures", "num_unreadable", "num_near", "num_rows")] == [3, 1, 2, 2]
    # Every test picture that is hit, with its nearest row.
    near = read_near(str(out), 0)
    assert near.picture.tolist() == [0, 1, 2]
    shards, rows = split_id(near.nearest)
    assert [PLANTED[row] for row in (10 * shards + rows).tolist()] == [0, 1, 2]
    assert near.similarity[0] == 1.0  # the same bytes
    assert (near.similarity >= THRESHOLD).all()
    assert read_near(str(out), 1).key == ["3", "4"]
    assert not (out / "embedded").exists()
    assert cli.main(["verify", str(out)]) == 0


def test_a_kill_after_any_file_leaves_the_same_bytes(data: dict[str, str], tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    result = select(data, whole)
    written = sorted((p for p in whole.rglob("*.*") if p.is_file()), key=lambda p: p.stat().st_mtime_ns)
    written = [p for p in written if p.name not in ("config.json", "env.json", "inputs.json")]
    for kept in range(0, len(written), 2):
        cut = tmp_path / f"cut{kept}"
        shutil.copytree(whole, cut)
        for path in written[kept:]:
            (cut / path.relative_to(whole)).unlink()
        assert select(data, cut) == result
        assert contents(cut) == contents(whole)


def test_a_store_is_a_target_too(data: dict[str, str], tmp_path: Path) -> None:
    folder = data["folder"]
    dc.stages.embed(
        data=[f"{folder}/pairs/test-0.tar"],
        out=tmp_path / "wanted",
        model="perceptual",
        num_workers=0,
        max_bad_ratio=0.5,
    )
    result = select(data, tmp_path / "clean", targets=[str(tmp_path / "wanted")])
    [found] = result["targets"]
    assert [found[name] for name in ("name", "num_pictures", "num_near", "num_rows")] == ["wanted", 3, 2, 2]
    assert read_near(str(tmp_path / "clean"), 0).uri == [f"{folder}/pairs/test-0.tar"] * 2


def test_the_page_shows_the_pairs(data: dict[str, str], tmp_path: Path) -> None:
    select(data, tmp_path / "run" / "clean")
    dc.stages.report(folders=[tmp_path / "run"], out=tmp_path / "page")
    page = (tmp_path / "page" / "index.html").read_text()
    section = page[page.index('<section id="copies">') :]
    section = section[: section.index("</section>")]
    assert section.count("<img ") == 2 * (3 + 2)
    assert "6 of 20 rows are copies" in section
    assert '<td class="text">shape</td><td>5</td><td>3</td><td>60' in section


def test_other_weights_and_missing_sets_are_named(data: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nothing"):
        select(data, tmp_path / "a", targets=[f"folder:{tmp_path}/nothing"])
    store = tmp_path / "store"
    shutil.copytree(data["store"], store)
    config = json.loads((store / "config.json").read_text())
    (store / "config.json").write_text(json.dumps({**config, "model": None}))
    with pytest.raises(InputError, match="does not say which model embedded it"):
        select({**data, "store": str(store)}, tmp_path / "b")


def test_evaluate_counts_the_test_images_that_were_trained_on(
    data: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    create_clip(json.dumps(TINY_CLIP), seed=3).save(str(tmp_path / "student"))
    options: dict[str, Any] = {
        "models": [str(tmp_path / "student")],
        "sets": [data["shape"], data["pairs"]],
        "on_error": "skip",
        "max_bad_ratio": 0.5,
        "num_workers": 0,
        "device": "cpu",
        "near_copy": THRESHOLD,
    }
    out = tmp_path / "scores"
    result = dc.stages.evaluate(out=out, training_store=data["store"], **options)
    found = {described["name"]: described["near_copies"] for described in result["sets"]}
    assert [(name, copies["num_near"], copies["num_pictures"]) for name, copies in found.items()] == [
        ("shape", 3, 5),
        ("texts", 2, 3),
    ]
    assert found["shape"]["share"] == pytest.approx(0.6)
    table = (out / "table.md").read_text()
    assert "| shape | 5 | 3 | 60.00 |" in table
    assert "near copy" in capsys.readouterr().out
    dc.stages.report(folders=[out], out=tmp_path / "page")
    assert (
        "shape: 60.0 % of the test pictures (3 of 5) have a near copy" in (tmp_path / "page" / "index.html").read_text()
    )
    # What a selection keeps holds no copy.
    select(data, tmp_path / "clean")
    clean = dc.stages.evaluate(out=tmp_path / "clean_scores", training_store=tmp_path / "clean", **options)
    assert [described["near_copies"]["num_near"] for described in clean["sets"]] == [0, 0]
    # Resumed without the result, it computes nothing again and says the same.
    (out / "result.json").unlink()
    assert dc.stages.evaluate(out=out, training_store=data["store"], **options) == result


def test_the_options_go_together(tmp_path: Path, data: dict[str, str]) -> None:
    values: dict[str, Any] = {"out": tmp_path / "o", "models": ["x"], "sets": [data["shape"]]}
    for options, message in (
        ({"near_copy": 0.9}, "go together"),
        ({"near_copy": 3, "training_store": "s"}, "a cosine"),
    ):
        with pytest.raises(InputError, match=message):
            dc.stages.evaluate(**values, **options)
