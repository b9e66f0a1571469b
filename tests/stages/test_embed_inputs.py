"""`distilclip embed --data ...` with pairs as people have them, and training from the stores that come out."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from distilclip import cli, files
from distilclip.data.bad_samples import ErrorPolicy
from distilclip.data.samples import decode_image
from distilclip.data.store import Store
from distilclip.data.stream import PairSource, Presentation, open_stream
from distilclip.errors import InputError
from distilclip.models.clip import load_clip
from tests.conftest import encoded, picture, write_tar

PICTURES = [encoded(picture(seed)) for seed in range(4)]


def embed(out: Path, model: str, *flags: str) -> tuple[Store, dict[str, Any]]:
    base = ["embed", "--out", str(out), "--model", model, "--batch-size", "4", "--num-workers", "1"]
    assert cli.main([*base, *flags]) == 0
    store = Store.open(str(out))
    store.verify()
    return store, json.loads((out / "result.json").read_text())


def trained_captions(store: Store, model: str) -> list[str]:
    opened = open_stream(
        PairSource(stores=[store.path]),
        Presentation(sizes=[32], tokenize=load_clip(model).tokenizer, seed=0),
        batch_size=2,
        policy=ErrorPolicy("raise"),
    )
    return sorted(caption for batch in opened.batches(stop=2) for caption in batch.captions)


def test_a_folder_of_pictures_alone_is_balanced_and_shown_without_captions(
    tmp_path: Path, tiny_clip_folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine" / "trip").mkdir(parents=True)
    for seed, name in enumerate(["a.jpg", "b.jpg", "trip/copy.jpg", "trip/d.jpg"]):
        (tmp_path / "mine" / name).write_bytes(PICTURES[0 if "copy" in name else seed])
    store, result = embed(tmp_path / "store", tiny_clip_folder, "--data", str(tmp_path / "mine"))
    assert "4 pictures have no caption" in capsys.readouterr().err
    assert (result["num_shards"], result["num_valid"]) == (2, 4)
    clip = load_clip(tiny_clip_folder)
    with torch.no_grad():
        image = clip.encode_image(clip.preprocess(decode_image(PICTURES[0]))[None])[0].numpy()
    assert not store.text(1).any()
    assert (store.rows(1).has_image.all(), store.rows(1).has_text.any()) == (True, False)
    assert np.abs(store.image(1)[0] - image).max() < 1e-3
    flags = [
        "--store",
        store.path,
        "--out",
        str(tmp_path / "groups"),
        "--metric",
        "sqeuclidean",
        "--threshold",
        "0.001",
    ]
    assert cli.main(["balance", *flags]) == 0
    assert json.loads((tmp_path / "groups" / "result.json").read_text())["num_kept"] == 3
    assert trained_captions(store, tiny_clip_folder) == [""] * 4


def test_pictures_with_texts_embed_like_a_tar_and_are_trained_on(tmp_path: Path, tiny_clip_folder: str) -> None:
    (tmp_path / "mine").mkdir()
    members = []
    for row, content in enumerate(PICTURES):
        members += [(f"{row}.jpg", content), (f"{row}.txt", f"number {row}".encode())]
    for name, content in members:
        (tmp_path / "mine" / name).write_bytes(content)
    data = [write_tar(tmp_path / "0.tar", members), str(tmp_path / "mine")]
    store, _ = embed(tmp_path / "store", tiny_clip_folder, "--data", *data)
    assert store.image(1).tobytes() == store.image(0).tobytes()
    assert store.text(1).tobytes() == store.text(0).tobytes()
    store, _ = embed(tmp_path / "alone", tiny_clip_folder, "--data", data[1])
    assert trained_captions(store, tiny_clip_folder) == [f"number {row}" for row in range(4)]
    (tmp_path / "mine" / "0.txt").write_text("another size")
    with pytest.raises(InputError, match=r"mine/ has \d+ bytes, \d+ when"):
        trained_captions(store, tiny_clip_folder)


@pytest.mark.slow
def test_the_columns_of_a_csv_reach_workers_store_and_training(tmp_path: Path, tiny_clip_folder: str) -> None:
    rows = []
    for row, content in enumerate(PICTURES):
        (tmp_path / f"{row}.jpg").write_bytes(content)
        rows.append(f"wrong {row}#{row}.jpg#right {row}\n")
    (tmp_path / "pairs.csv").write_text("title#photo#alt\n" + "".join(rows))
    flags = ["--csv-img-key", "photo", "--csv-caption-key", "alt", "--csv-separator", "#"]
    store, _ = embed(tmp_path / "store", tiny_clip_folder, "--data", str(tmp_path / "pairs.csv"), *flags)
    assert trained_captions(store, tiny_clip_folder) == [f"right {row}" for row in range(4)]
    store, _ = embed(
        tmp_path / "ranks", tiny_clip_folder, "--data", store.shards[0].uri, *flags, "--engine", "processes"
    )
    assert store.csv_columns is not None
    assert store.csv_columns.csv_img_key == "photo"


def test_a_csv_of_open_clip_is_read_without_flags(tmp_path: Path, tiny_clip_folder: str) -> None:
    for row, content in enumerate(PICTURES):
        (tmp_path / f"{row}.jpg").write_bytes(content)
    lines = ["filepath\ttitle", *(f"{tmp_path}/{row}.jpg\ta title {row}" for row in range(4))]
    (tmp_path / "train.csv").write_text("\n".join(lines))
    store, _ = embed(tmp_path / "store", tiny_clip_folder, "--data", str(tmp_path / "train.csv"))
    assert trained_captions(store, tiny_clip_folder) == [f"a title {row}" for row in range(4)]


@pytest.mark.parametrize("remote", [False, True])
def test_parquet_that_names_files_is_embedded(tmp_path: Path, tiny_clip_folder: str, remote: bool) -> None:
    folder = "memory://named" if remote else str(tmp_path)
    for row, content in enumerate(PICTURES):
        files.write_bytes(files.join(folder, f"images/{row}.jpg"), content)
    images = [{"bytes": None, "path": f"images/{row}.jpg"} for row in range(4)]
    with files.atomic_write(files.join(folder, "a.parquet")) as file:
        pq.write_table(pa.table({"image": images, "captions": [[f"first {row}", "second"] for row in range(4)]}), file)
    flags = ["--data", files.join(folder, "a.parquet"), "--views", "1"]
    if remote:
        flags += ["--num-workers", "0"]
    store, result = embed(tmp_path / "store", tiny_clip_folder, *flags)
    assert result["reasons"] == {}
    assert len(store.view_embeddings(0).text) == 4  # the second captions
    assert trained_captions(store, tiny_clip_folder) == [f"first {row}" for row in range(4)]


def test_thin_pictures_and_endless_captions_cost_nothing(tmp_path: Path, tiny_clip_folder: str) -> None:
    thin = encoded(Image.new("P", (1, 20_000)), "GIF")
    members = [("0.gif", thin), ("0.txt", b"thin"), ("1.jpg", PICTURES[1]), ("1.txt", b"&amp;" * 20_000)]
    tar = write_tar(tmp_path / "0.tar", members)
    store, result = embed(tmp_path / "store", tiny_clip_folder, "--data", tar, "--max-bad-ratio", "0.5")
    assert result["reasons"] == {"too elongated": 1}
    assert store.rows(0).valid.tolist() == [False, True]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("pipe:cat 0.tar", "is a command for webdataset"),
        ("no/where/*.tar", "there is no folder no/where"),
        ("gs://bucket/0.tar", "pip install 'distilclip[gcs]'"),
    ],
)
def test_what_cannot_be_read_is_refused_in_one_line(
    tmp_path: Path, tiny_clip_folder: str, capsys: pytest.CaptureFixture[str], data: str, message: str
) -> None:
    if data.startswith("gs") and importlib.util.find_spec("gcsfs"):
        pytest.skip("gcsfs is installed")
    assert cli.main(["embed", "--data", data, "--out", str(tmp_path / "store"), "--model", tiny_clip_folder]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said
