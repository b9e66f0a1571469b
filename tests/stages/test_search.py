from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from distilclip import cli
from distilclip.config import parse
from distilclip.data.samples import decode_image
from distilclip.errors import InputError
from distilclip.models.clip import load_clip
from distilclip.stages.search import Config, contact_sheet, main
from tests.conftest import encoded, picture, write_tar

pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def model(tiny_clip_folder: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny CLIP as ONNX, in the folder of an export."""
    from distilclip.export.onnx_files import write_onnx

    folder = tmp_path_factory.mktemp("export")
    write_onnx(load_clip(tiny_clip_folder), str(folder / "model"))
    return str(folder)


@pytest.fixture
def pictures(tmp_path: Path) -> str:
    """Nine pictures, two of them in a folder below, one broken, and a file of another kind."""
    folder = tmp_path / "pictures"
    (folder / "more").mkdir(parents=True)
    for seed in range(9):
        (folder / ("more" if seed > 6 else "") / f"{seed}.JPG").write_bytes(encoded(picture(seed, (40, 32))))
    (folder / "broken.png").write_bytes(b"none")
    (folder / "notes.txt").write_text("no picture")
    return str(folder)


def test_matches_are_those_of_the_torch_model(model: str, pictures: str, tiny_clip_folder: str) -> None:
    result = main(Config(model=model, pictures=pictures, query="a red thing", num_matches=4, batch_size=2))
    clip = load_clip(tiny_clip_folder)
    names = [f"{'more/' if seed > 6 else ''}{seed}.JPG" for seed in range(9)]
    pixels = torch.stack([clip.preprocess(decode_image((Path(pictures) / name).read_bytes())) for name in names])
    with torch.no_grad():
        similarity = (clip.encode_image(pixels) @ clip.encode_text(clip.tokenizer(["a red thing"])).T)[:, 0].numpy()
    best = np.argsort(-similarity)[:4]
    assert [match["picture"] for match in result["matches"]] == [names[i] for i in best]
    np.testing.assert_allclose([match["similarity"] for match in result["matches"]], similarity[best], atol=1e-4)
    assert result["num_pictures"] == 9
    assert result["unreadable"] == [{"picture": "broken.png", "reason": "not an image"}]


def test_the_sheet_shows_the_matches(model: str, pictures: str, tmp_path: Path) -> None:
    flags: dict[str, Any] = {"num_matches": 3, "columns": 2, "thumbnail_size": 32}
    config = Config(model=model, pictures=pictures, query="a red thing", out=str(tmp_path / "out"), **flags)
    result = main(config)
    sheet = Image.open(io.BytesIO((tmp_path / "out/matches.png").read_bytes()))
    assert sheet.size == (8 + 2 * 40, 32 + 2 * 56)
    best = decode_image((Path(pictures) / result["matches"][0]["picture"]).read_bytes())
    best.thumbnail((32, 32))
    shown = np.asarray(sheet.crop((8, 32 + 3, 8 + best.width, 32 + 3 + best.height)), float)
    assert np.abs(shown - np.asarray(best, float)).mean() < 1
    assert main(config) == result  # finished: read back


def test_tars_are_searched_too(model: str, tmp_path: Path) -> None:
    members = [("a.jpg", encoded(picture(1))), ("a.txt", b"x"), ("b.txt", b"no picture"), ("c.png", b"broken")]
    write_tar(tmp_path / "0.tar", members)
    result = main(Config(model=model, pictures=str(tmp_path / "*.tar"), query="anything"))
    assert main(Config(model=model, pictures=str(tmp_path), query="anything")) == result  # their folder
    assert [match["picture"] for match in result["matches"]] == ["0.tar/a"]
    assert {line["picture"]: line["reason"] for line in result["unreadable"]} == {
        "0.tar/b": "no image",
        "0.tar/c": "not an image",
    }


def test_the_command_takes_its_three_words_and_loads_no_torch(model: str, pictures: str, tmp_path: Path) -> None:
    code = (
        "import sys\nfrom distilclip.cli import main\n"
        f"code = main(['search', {model!r}, {pictures!r}, 'a red thing', '--out', {str(tmp_path / 'out')!r}])\n"
        "heavy = {'torch', 'open_clip', 'transformers', 'onnx'} & set(sys.modules)\n"
        "assert not heavy, heavy\nraise SystemExit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "a red thing in 9 pictures" in done.stdout
    assert "1 pictures could not be read" in done.stdout
    assert (tmp_path / "out/matches.png").exists()


def test_names_are_listed_letter_by_letter(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    names = [":cat: [red]a.jpg", "“it’s” 日本.jpg"]  # noqa: RUF001
    for seed, name in enumerate(names):
        (folder / name).write_bytes(encoded(picture(seed)))
    (Path(os.fsdecode(os.fsencode(folder) + b"/\xff.jpg"))).write_bytes(encoded(picture(2)))
    result = main(Config(model=model, pictures=str(folder), query='[b]:dog: "“né”', out=str(tmp_path / "out")))
    assert {match["picture"] for match in result["matches"]} == {*names, "\\xff.jpg"}
    printed = capsys.readouterr().out
    assert '[b]:dog: "“né” in 3 pictures' in printed
    assert all(name in printed for name in (*names, "\\xff.jpg"))
    assert (tmp_path / "out/matches.png").exists()


def test_words_and_flags_mix_and_a_finished_folder_repeats(model: str, pictures: str, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    words = parse(Config, [model, pictures, "a cat", "--num-matches", "2", "--out", out], stage="search")
    flags = parse(
        Config,
        ["--query", "a cat", "--model", model, "--pictures", pictures, "--out", out, "--num-matches", "2"],
        stage="search",
    )
    assert words == flags
    main(words)
    assert parse(Config, [f"{out}/config.json"], stage="search") == words


def test_nothing_to_find_is_an_error(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    assert cli.main(["search", model, str(tmp_path / "empty"), "a cat"]) == 2
    assert "no CSV and no picture" in capsys.readouterr().err
    with pytest.raises(InputError, match="query is empty"):
        Config(model=model, pictures="p", query=" ")
    with pytest.raises(InputError, match="No file matches"):
        main(Config(model=model, pictures=str(tmp_path / "no/*.tar"), query="a"))
    with pytest.raises(InputError, match="holds no ONNX model"):
        main(Config(model=str(tmp_path), pictures=str(tmp_path), query="a"))
    for flag, value in (("num_matches", 0), ("columns", 0), ("thumbnail_size", 8)):
        with pytest.raises(InputError, match=flag):
            Config(model=model, pictures="p", query="a", **{flag: value})  # type: ignore[arg-type]


def test_a_sheet_shows_every_picture_in_its_cell() -> None:
    colours = [(255, 0, 0), (0, 128, 0), (0, 0, 255), (255, 128, 0), (128, 0, 128)]
    pictures = [Image.new("RGB", (200, 100), colour) for colour in colours]
    png = contact_sheet(pictures, [f"line {i}" for i in range(5)], heading="q" * 500, size=40, columns=3)
    sheet = Image.open(io.BytesIO(png))
    assert sheet.size == (8 + 3 * 48, 16 + 16 + 2 * 64)
    for i, colour in enumerate(colours):
        left, top = 8 + i % 3 * 48, 32 + i // 3 * 64
        cell = np.asarray(sheet.crop((left, top, left + 40, top + 40)))
        assert (cell == colour).all(axis=2).sum() == 40 * 20  # reduced to 40 x 20, nothing drawn over it


def test_any_line_fits_its_cell() -> None:
    lines = ["a\nb", "日本 🙂.jpg", "“it’s” [red]x[/red]", "bad\udcff.jpg"]  # noqa: RUF001
    pictures = [Image.new("RGB", (40, 40), (1, 2, 3))] * 4
    sheet = np.asarray(Image.open(io.BytesIO(contact_sheet(pictures, lines, heading="c\nd", size=40, columns=1))))
    for i in range(4):
        top = 32 + i * 64
        assert (sheet[top : top + 40, 8:48] == (1, 2, 3)).all()  # no line runs into the next picture
        assert (sheet[top + 40 : top + 58, 8:] < 128).any()


def test_small_pictures_are_not_enlarged() -> None:
    png = contact_sheet([Image.new("RGB", (10, 10), (1, 2, 3))], ["x"], heading="h", size=40, columns=4)
    assert (np.asarray(Image.open(io.BytesIO(png))) == (1, 2, 3)).all(axis=2).sum() == 100
