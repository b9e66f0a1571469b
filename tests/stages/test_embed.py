from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from distilclip.data.samples import decode_image
from distilclip.data.store import Store
from distilclip.engine import Engine
from distilclip.errors import InputError
from distilclip.models.clip import load_clip
from distilclip.stages.embed import Config, main
from tests.conftest import encoded, picture, write_tar
from tests.stages.conftest import contents

PairTars = Callable[..., list[str]]


def embed(out: Path | str, data: list[str], model: str, **options: Any) -> dict[str, Any]:
    return main(Config(out=str(out), data=tuple(data), model=model, **{"num_workers": 0, "batch_size": 3, **options}))


def bad_members() -> list[tuple[str, bytes]]:
    """Twelve samples, of which every second cannot be used, each for another reason."""
    good, big = encoded(picture(1)), encoded(picture(2, (320, 320)))
    return [
        ("00.jpg", good),
        ("00.txt", "солнце ".encode() * 200),  # longer than any context
        ("01.jpg", encoded(picture(1, (160, 120)))[:600]),
        ("01.txt", b"cut in the middle"),
        ("02.png", encoded(picture(3).convert("RGBA"), "PNG")),
        ("02.txt", b"a picture"),
        ("03.jpg", big),
        ("03.txt", b"too large"),
        ("04.webp", encoded(picture(4), "WEBP")),
        ("04.json", b'{"caption": "from json"}'),
        ("05.jpg", good),
        ("06.jpg", encoded(picture(6).convert("CMYK"))),
        ("06.txt", "日本語のキャプション".encode()),
        ("07.jpg", b"<html>404</html>"),
        ("07.txt", b"no image at all"),
        ("08.jpg", encoded(picture(8).convert("L"))),
        ("08.txt", b"grey"),
        ("../09.jpg", good),
        ("../09.txt", b"outside"),
        ("10.jpg", good),
        ("10.txt", b"fine"),
        ("00.jpg", good),
        ("00.txt", b"again"),
    ]


REASONS = {
    "duplicate key": 1,
    "no caption": 1,
    "not an image": 1,
    "too many pixels": 1,
    "truncated image": 1,
    "unsafe member name": 1,
}


def test_embeddings_are_the_models_own(tmp_path: Path, pair_tars: PairTars, tiny_clip_folder: str) -> None:
    data = pair_tars(shards=2, rows=5)
    result = embed(tmp_path / "store", data, tiny_clip_folder)
    clip = load_clip(tiny_clip_folder)
    store = Store.open(str(tmp_path / "store"))
    store.verify()
    for shard in range(2):
        assert store.rows(shard).key == [f"{shard * 5 + row:05d}" for row in range(5)]
        for row in range(5):
            number = shard * 5 + row
            image = decode_image(encoded(picture(number)))
            with torch.no_grad():
                expected_image = clip.encode_image(clip.preprocess(image)[None])[0].numpy()
                expected_text = clip.encode_text(clip.tokenizer([f"picture number {number}"]))[0].numpy()
            assert np.abs(store.image(shard)[row] - expected_image).max() < 1e-3
            assert np.abs(store.text(shard)[row] - expected_text).max() < 1e-3
            assert store.rows(shard).image_sha256[row].tobytes() == hashlib.sha256(encoded(picture(number))).digest()
    assert result["num_valid"] == result["num_rows"] == 10
    assert result["teacher"] == store.teacher
    assert store.teacher["digest"] == clip.digest
    assert json.loads(store.teacher["preprocessing"])["size"] == [32, 32]
    assert [shard.uri for shard in store.shards] == data


def test_every_bad_sample_gets_its_row_and_reason(tmp_path: Path, tiny_clip_folder: str) -> None:
    path = write_tar(tmp_path / "bad.tar", bad_members())
    options = {"max_bad_ratio": 0.6, "max_pixels": 100_000}
    result = embed(tmp_path / "store", [path], tiny_clip_folder, **options)
    assert result["reasons"] == REASONS
    assert (result["num_rows"], result["num_valid"], result["num_invalid"]) == (12, 6, 6)
    store = Store.open(str(tmp_path / "store"))
    store.verify()
    rows = store.rows(0)
    assert rows.valid.tolist() == [True, False] * 5 + [True, False]
    assert rows.error[3] == "too many pixels: 320 x 320"
    assert rows.key[9] == "../09"
    assert not store.image(0)[~rows.valid].any()
    assert not store.text(0)[~rows.valid].any()


def test_a_row_does_not_depend_on_the_faults_of_its_neighbours(tmp_path: Path, tiny_clip_folder: str) -> None:
    """Bad rows keep their place in the batch, so the good ones go through the same arithmetic."""
    members = [m for row in range(4) for m in ((f"{row}.jpg", encoded(picture(row))), (f"{row}.txt", b"a picture"))]
    good = write_tar(tmp_path / "good.tar", members)
    members[2] = ("1.jpg", b"not an image")
    bad = write_tar(tmp_path / "bad.tar", members)
    embed(tmp_path / "a", [good], tiny_clip_folder)
    embed(tmp_path / "b", [bad], tiny_clip_folder, max_bad_ratio=0.5)
    a, b = Store.open(str(tmp_path / "a")).image(0), Store.open(str(tmp_path / "b")).image(0)
    assert a[[0, 2, 3]].tobytes() == b[[0, 2, 3]].tobytes()


def test_on_error_raise_names_file_member_reason_and_remedy(tmp_path: Path, tiny_clip_folder: str) -> None:
    path = write_tar(tmp_path / "bad.tar", bad_members())
    with pytest.raises(InputError, match=r"bad\.tar: 01: truncated image\..*--on-error skip"):
        embed(tmp_path / "store", [path], tiny_clip_folder, on_error="raise")


def test_the_budget_stops_and_a_larger_one_goes_on(tmp_path: Path, tiny_clip_folder: str) -> None:
    path = write_tar(tmp_path / "bad.tar", bad_members())
    with pytest.raises(InputError, match=r"5 of 12 samples cannot be used, over the budget of 5\.0%"):
        embed(tmp_path / "store", [path], tiny_clip_folder)
    assert embed(tmp_path / "store", [path], tiny_clip_folder, max_bad_ratio=0.5)["num_valid"] == 7


def test_a_cut_tar_keeps_its_good_part_and_is_reported(
    tmp_path: Path, pair_tars: PairTars, tiny_clip_folder: str
) -> None:
    data = pair_tars(shards=2, rows=6)
    content = Path(data[0]).read_bytes()
    Path(data[0]).write_bytes(content[: len(content) // 2 - 1500])
    result = embed(tmp_path / "store", data, tiny_clip_folder, max_bad_ratio=0.5)
    assert result["truncated"] == [data[0]]
    assert result["reasons"] == {"tar cut": 1}
    store = Store.open(str(tmp_path / "store"))
    assert [shard.status for shard in store.shards] == ["truncated", "complete"]
    assert store.rows(0).valid.sum() >= 2


def test_an_empty_tar_is_an_error(tmp_path: Path, tiny_clip_folder: str) -> None:
    with pytest.raises(InputError, match=r"empty\.tar holds no sample"):
        embed(tmp_path / "store", [write_tar(tmp_path / "empty.tar", [])], tiny_clip_folder)


def test_a_teacher_that_gives_nan_leaves_no_embedding(
    tmp_path: Path, pair_tars: PairTars, tiny_clip_folder: str
) -> None:
    clip = load_clip(tiny_clip_folder)
    with torch.no_grad():
        clip.model.visual.proj[0, 0] = torch.nan
    clip.save(str(tmp_path / "broken"))
    with pytest.raises(InputError, match=r"4 of 4 samples.*embedding is no finite unit vector \(4\)"):
        embed(tmp_path / "store", pair_tars(shards=1, rows=4), str(tmp_path / "broken"))


def test_tables_embed_like_tars(tmp_path: Path, pair_tars: PairTars, tiny_clip_folder: str) -> None:
    images = [encoded(picture(row)) for row in range(4)]
    captions = [f"picture number {row}" for row in range(4)]
    table = pa.table({"image": [{"bytes": image, "path": None} for image in images], "caption": captions})
    pq.write_table(table, tmp_path / "a.parquet")
    for row, image in enumerate(images):
        (tmp_path / f"{row}.jpg").write_bytes(image)
    lines = ["filepath,caption", *(f"{row}.jpg,{captions[row]}" for row in range(4))]
    (tmp_path / "a.csv").write_text("\n".join(lines))
    data = [*pair_tars(shards=1, rows=4), str(tmp_path / "a.parquet"), str(tmp_path / "a.csv")]
    embed(tmp_path / "store", data, tiny_clip_folder, batch_size=4)
    store = Store.open(str(tmp_path / "store"))
    for shard in (1, 2):
        assert store.image(shard).tobytes() == store.image(0).tobytes()
        assert store.text(shard).tobytes() == store.text(0).tobytes()


def test_remote_tars_into_a_remote_store(tmp_path: Path, pair_tars: PairTars, tiny_clip_folder: str) -> None:
    data = pair_tars(shards=2, rows=4)
    for number, path in enumerate(data):
        fsspec.filesystem("memory").put(path, f"/embed/{number}.tar")
    embed(tmp_path / "here", data, tiny_clip_folder)
    embed("memory://embed/store", ["memory://embed/{0..1}.tar"], tiny_clip_folder)
    here, there = Store.open(str(tmp_path / "here")), Store.open("memory://embed/store")
    there.verify()
    for shard in range(2):
        assert here.image(shard).tobytes() == there.image(shard).tobytes()
        assert here.shards[shard].key_digest == there.shards[shard].key_digest


@pytest.fixture
def whole(tmp_path: Path, pair_tars: PairTars, tiny_clip_folder: str) -> tuple[Path, list[str]]:
    """A store over three tars, one of them with bad samples, and the tars."""
    data = [*pair_tars(shards=2, rows=5), write_tar(tmp_path / "bad.tar", bad_members())]
    embed(tmp_path / "whole", data, tiny_clip_folder, max_bad_ratio=0.5)
    return tmp_path / "whole", data


def test_the_bytes_do_not_depend_on_workers(
    tmp_path: Path, whole: tuple[Path, list[str]], tiny_clip_folder: str
) -> None:
    embed(tmp_path / "again", whole[1], tiny_clip_folder, max_bad_ratio=0.5, num_workers=2)
    assert contents(tmp_path / "again") == contents(whole[0])


@pytest.mark.xdist_group("ray")
@pytest.mark.slow
@pytest.mark.parametrize("engine", ["processes", "ray"])
def test_the_bytes_do_not_depend_on_the_engine(
    tmp_path: Path, whole: tuple[Path, list[str]], tiny_clip_folder: str, engine: str
) -> None:
    folder, data = whole
    options = {"max_bad_ratio": 0.5, "execution": Engine(engine=engine, engine_workers=2)}
    embed(tmp_path / "shared", data, tiny_clip_folder, **options)
    assert contents(tmp_path / "shared") == contents(folder)
    with pytest.raises(InputError, match="over the budget"):
        embed(tmp_path / "strict", data, tiny_clip_folder, **{**options, "max_bad_ratio": 0.01})


@pytest.mark.parametrize(
    "lost",
    [
        ["result.json"],
        ["result.json", "manifest.parquet"],
        ["result.json", "manifest.parquet", "000001.rows.parquet"],
        ["result.json", "manifest.parquet", "000001.rows.parquet", "000001.safetensors", "000002.rows.parquet"],
    ],
)
def test_a_rerun_after_a_kill_gives_the_same_bytes_and_keeps_finished_shards(
    whole: tuple[Path, list[str]], tiny_clip_folder: str, lost: list[str]
) -> None:
    folder, data = whole
    expected = contents(folder)
    before = (folder / "000000.safetensors").stat().st_mtime_ns
    for name in lost:
        (folder / name).unlink()
    embed(folder, data, tiny_clip_folder, max_bad_ratio=0.5)
    assert contents(folder) == expected
    assert (folder / "000000.safetensors").stat().st_mtime_ns == before


KILLED_RUNS = """
import os, signal, sys, torch
from distilclip.models.clip import load_clip
from distilclip.stages import embed
from distilclip.stages.embed import Config, main

out, model, *data = sys.argv[1:]
torch.set_num_threads(1)  # threads do not survive a fork
clip = load_clip(model)
embed.load_clip = lambda *args, **options: clip  # once for all runs
replace, num_replaced = os.replace, 0

def run(folder, kill_at):
    def replace_or_die(*names):
        global num_replaced
        num_replaced += 1
        if num_replaced == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(*names)

    child = os.fork()
    if not child:
        os.replace = replace_or_die
        main(Config(out=folder, model=model, data=tuple(data), num_workers=0, batch_size=3, max_bad_ratio=0.5))
        os._exit(0)
    return os.waitpid(child, 0)[1]

kill_at = 2  # after env.json, which open_folder writes and tests; config.json is created, not replaced
while run(f"{out}/{kill_at}", kill_at) == signal.SIGKILL:
    assert not os.path.exists(f"{out}/{kill_at}/result.json")
    assert run(f"{out}/{kill_at}", None) == 0
    kill_at += 1
"""


@pytest.mark.slow
def test_killed_at_any_file_it_goes_on_to_the_same_bytes(
    tmp_path: Path, whole: tuple[Path, list[str]], tiny_clip_folder: str
) -> None:
    """SIGKILL just before each of the files appears, then an undisturbed run."""
    out = tmp_path / "killed"
    subprocess.run([sys.executable, "-c", KILLED_RUNS, str(out), tiny_clip_folder, *whole[1]], check=True, timeout=300)
    expected = contents(whole[0])
    kills = sorted(int(folder.name) for folder in out.iterdir())
    assert len(kills) == len(expected) + 1  # each file, and the run that no kill was left for
    for kill in kills:
        found = contents(out / str(kill))
        assert {name: content for name, content in found.items() if not name.endswith(".tmp")} == expected, kill


def test_other_files_under_the_same_pattern_are_noticed(
    tmp_path: Path, pair_tars: PairTars, tiny_clip_folder: str
) -> None:
    data = pair_tars(shards=2, rows=4)
    pattern = str(tmp_path / "pairs" / "*.tar")
    embed(tmp_path / "store", [pattern], tiny_clip_folder)
    (tmp_path / "store" / "result.json").unlink()
    (tmp_path / "store" / "manifest.parquet").unlink()
    Path(data[1]).rename(tmp_path / "pairs" / "00000-new.tar")
    with pytest.raises(InputError, match=r"shard 0 was made from .*00000\.tar .*now .*00000-new\.tar"):
        embed(tmp_path / "store", [pattern], tiny_clip_folder)


def test_a_finished_folder_is_a_no_op(whole: tuple[Path, list[str]], tiny_clip_folder: str) -> None:
    folder, data = whole
    for path in data:
        os.remove(path)
    assert embed(folder, data, tiny_clip_folder, max_bad_ratio=0.5)["num_shards"] == 3


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_towers_stay_close(
    tmp_path: Path, pair_tars: PairTars, tiny_clip_folder: str, precision: str
) -> None:
    data = pair_tars(shards=1, rows=4)
    embed(tmp_path / "full", data, tiny_clip_folder)
    embed(tmp_path / "half", data, tiny_clip_folder, precision=precision)
    full, half = Store.open(str(tmp_path / "full")).image(0), Store.open(str(tmp_path / "half")).image(0)
    assert np.abs(full.astype(np.float32) - half).max() < 0.03
    assert Store.open(str(tmp_path / "half")).teacher["precision"] == precision


def test_values_that_cannot_be_are_refused() -> None:
    for options, message in (
        ({"data": ()}, "needs --data"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"num_workers": -1}, "num_workers is -1"),
        ({"max_bad_ratio": 2.0}, "max_bad_ratio is a share"),
    ):
        with pytest.raises(InputError, match=message):
            Config(**{"out": "o", "model": "m", "data": ("a.tar",), **options})
