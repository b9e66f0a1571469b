"""`embed --may-lack`: pictures alone, sentences alone, and both mixed; what a row lacks is written down."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from distilclip import cli
from distilclip.data.store import Store
from distilclip.models.clip import load_clip
from tests.conftest import encoded, picture, write_tar

SENTENCES = ["a red apple", "two dogs, asleep", "the sea"]


def embed(out: Path, model: str, *flags: str) -> tuple[Store, dict[str, Any]]:
    base = ["embed", "--out", str(out), "--model", model, "--batch-size", "2", "--num-workers", "0"]
    assert cli.main([*base, *flags]) == 0
    store = Store.open(str(out))
    store.verify()
    assert cli.main(["verify", str(out), "--sources", "keys"]) == 0
    return store, json.loads((out / "result.json").read_text())


def mixed_tar(path: Path) -> str:
    """Row 0 is a pair, 1 lacks its caption, 2 its picture, 3 has neither, and the picture of 4 is broken."""
    members = [
        ("0.jpg", encoded(picture(0))),
        ("0.txt", b"zero"),
        ("1.jpg", encoded(picture(1))),
        ("2.txt", b"two"),
        ("3.json", b"{}"),
        ("4.jpg", b"no picture"),
        ("4.txt", b"four"),
    ]
    return write_tar(path, members)


def test_a_row_may_lack_what_is_asked_for_and_no_more(tmp_path: Path, tiny_clip_folder: str) -> None:
    data = mixed_tar(tmp_path / "0.tar")
    cases = {
        (): ("10000", "10000", {"no caption": 1, "no image": 2, "not an image": 1}),
        ("caption",): ("11000", "10000", {"no image": 2, "not an image": 1}),
        ("image",): ("10000", "10100", {"no caption": 1, "no image": 1, "not an image": 1}),
        ("caption", "image"): ("11000", "10100", {"no image": 1, "not an image": 1}),
    }
    stores = {}
    for may_lack, (has_image, has_text, reasons) in cases.items():
        flags = ["--may-lack", *may_lack] if may_lack else []
        out = tmp_path / "-".join(("store", *may_lack))
        stores[may_lack], result = embed(out, tiny_clip_folder, "--data", data, *flags, "--max-bad-ratio", "1")
        rows = stores[may_lack].rows(0)
        assert "".join(str(int(has)) for has in rows.has_image) == has_image
        assert "".join(str(int(has)) for has in rows.has_text) == has_text
        assert (rows.has_image | rows.has_text).tolist() == rows.valid.tolist()
        assert result["reasons"] == reasons
        assert result.get("num_captionless", 0) == (1 if "caption" in may_lack else 0)
        assert result.get("num_pictureless", 0) == (1 if "image" in may_lack else 0)
    both, pairs = stores["caption", "image"], stores[()]
    assert np.array_equal(both.image(0)[0], pairs.image(0)[0])
    assert np.array_equal(both.text(0)[0], pairs.text(0)[0])


def test_a_crawl_whose_captions_are_missing_is_still_noticed(
    tmp_path: Path, tiny_clip_folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_tar(tmp_path / "0.tar", [(f"{row}.jpg", encoded(picture(row))) for row in range(3)])
    flags = ["embed", "--out", str(tmp_path / "out"), "--model", tiny_clip_folder, "--data", data, "--num-workers", "0"]
    assert cli.main(flags) == 2
    assert "no caption (3)" in (said := capsys.readouterr().err)
    assert "--may-lack caption" in said


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_table_of_sentences_has_text_embeddings_alone(
    tmp_path: Path, tiny_clip_folder: str, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / f"sentences.{kind}"
    if kind == "csv":
        path.write_text("caption,other\n" + "".join(f'"{text}",x{row}\n' for row, text in enumerate(SENTENCES)))
    else:
        pq.write_table(pa.table({"caption": SENTENCES, "other": ["x0", "x1", "x2"]}), path)
    store, result = embed(tmp_path / "store", tiny_clip_folder, "--data", str(path), "--may-lack", "image")
    assert result["num_pictureless"] == 3
    assert store.rows(0).key == ["000000000", "000000001", "000000002"]
    clip = load_clip(tiny_clip_folder)
    with torch.no_grad():
        expected = clip.encode_text(clip.tokenizer(SENTENCES)).numpy()
    assert np.abs(store.text(0) - expected).max() < 1e-3
    assert not store.image(0).any()
    flags = ["--model", tiny_clip_folder, "--data", str(path), "--num-workers", "0"]
    assert cli.main(["embed", "--out", str(tmp_path / "no"), *flags]) == 2
    assert ("no column filepath" if kind == "csv" else "--may-lack image") in capsys.readouterr().err
    for stage in ("balance --metric cosine --threshold 0.1", "cluster --num-centers 2"):
        name, *flags = stage.split()
        assert cli.main([name, "--store", store.path, "--out", str(tmp_path / name), *flags]) == 2
        assert f"no row has a picture, and {name} compares pictures" in capsys.readouterr().err
