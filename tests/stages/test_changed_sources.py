"""Tars, patterns and teachers that change after they were used: every stage that meets them says so."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distilclip import digests
from distilclip.config import parse
from distilclip.errors import InputError
from distilclip.models.clip import create_clip
from distilclip.stages import embed, export, train
from tests.conftest import encoded, picture, write_tar
from tests.stages.conftest import contents
from tests.stages.made_training import Prepared, config

PairTars = Callable[..., list[str]]


@pytest.fixture(scope="module")
def made_once(tmp_path_factory: pytest.TempPathFactory, tiny_clip_folder: str) -> tuple[Path, Path]:
    """A folder with pairs and a store, and a copy of it."""
    folder = tmp_path_factory.mktemp("changed")
    for shard in range(2):
        members = [
            member
            for number in range(shard * 12, shard * 12 + 12)
            for member in (
                (f"{number:05d}.jpg", encoded(picture(number))),
                (f"{number:05d}.txt", b"picture number %d" % number),
            )
        ]
        write_tar(folder / "here" / "pairs" / f"{shard:05d}.tar", members)
    tars, store = sorted(map(str, (folder / "here" / "pairs").iterdir())), str(folder / "here" / "store")
    embed.main(embed.Config(data=tuple(tars), out=store, model=tiny_clip_folder, num_workers=0))
    shutil.copytree(folder / "here", folder / "copy")
    return folder / "here", folder / "copy"


@pytest.fixture
def prepared(made_once: tuple[Path, Path]) -> Prepared:
    """Pairs and their store, as they were made, whatever the test before did to them."""
    here, copy = made_once
    shutil.rmtree(here)
    shutil.copytree(copy, here)
    digests.forget()
    tars = sorted(map(str, (here / "pairs").iterdir()))
    return Prepared(tars=tars, store=str(here / "store"), groups="", clusters="")


def embed_again(prepared: Prepared, model: str, **options: Any) -> dict[str, Any]:
    """Embed into the same folder, with another model or other tars if so asked."""
    values = {"data": tuple(prepared.tars), "out": prepared.store, "model": model, "num_workers": 0, **options}
    return embed.main(embed.Config(**values))


def interrupt(prepared: Prepared) -> None:
    """Leave of the store what a kill after its first shard leaves."""
    for name in ("result.json", "manifest.parquet", "000001.rows.parquet"):
        (Path(prepared.store) / name).unlink()


def use(stage: str, prepared: Prepared, folder: Path, architecture: str, model: str) -> None:
    """Let a stage meet the tars of a store."""
    if stage == "train":
        train.main(config(folder / "student", architecture, store=prepared.store, objective="clip-kd"))
    elif stage == "export":
        argv = ["--what", "subset", "--uid", "md5", "--store", prepared.store, "--out", str(folder / "subset")]
        export.main(parse(export.Config, argv, stage="export", description=""))
    else:
        if stage == "embed the rest":
            interrupt(prepared)
        embed_again(prepared, model)


def change(path: str, old: bytes, new: bytes, *, keep_time: bool = False) -> None:
    """Write other bytes, as many, into a file."""
    file = Path(path)
    content, status = file.read_bytes(), file.stat()
    assert old in content
    assert len(old) == len(new)
    file.write_bytes(content.replace(old, new))
    if keep_time:
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_embed_does_not_go_on_with_another_teacher_of_the_same_name(
    prepared: Prepared, tiny_clip_json: str, tiny_clip_folder: str, tmp_path: Path
) -> None:
    model = str(tmp_path / "teacher")
    shutil.copytree(tiny_clip_folder, model)
    store = str(tmp_path / "own")
    embed_again(prepared, model, out=store)
    mine = Prepared(tars=prepared.tars, store=store, groups="", clusters="")
    interrupt(mine)
    create_clip(tiny_clip_json, seed=8).save(model)
    before = contents(Path(store)).keys() | {"lock.json"}
    with pytest.raises(InputError, match=r"own: shard 0 was embedded by another teacher.*digest.*Choose another --out"):
        embed_again(mine, model)
    assert contents(Path(store)).keys() <= before
    (Path(store) / "000001.rows.parquet").write_bytes((Path(prepared.store) / "000001.rows.parquet").read_bytes())
    with pytest.raises(InputError, match="embedded by another teacher"):  # where only the manifest is missing, too
        embed_again(mine, model)


@pytest.mark.parametrize("keep_time", [True, False])
def test_training_refuses_a_picture_that_is_not_the_one_embedded(
    prepared: Prepared, tiny_clip_json: str, tmp_path: Path, keep_time: bool
) -> None:
    where = Path(prepared.tars[1]).read_bytes().index(b"\xff\xd9")  # the end mark of a JPEG; before it, pixels
    old = Path(prepared.tars[1]).read_bytes()[where - 6 : where + 2]
    change(prepared.tars[1], old, bytes([old[0] ^ 1]) + old[1:], keep_time=keep_time)
    options = {"store": prepared.store, "objective": "clip-kd"}
    with pytest.raises(InputError, match=r"00001\.tar.*(picture is not|written again).*SHA-256 differs.*mbed"):
        train.main(config(tmp_path / "student", tiny_clip_json, **options))


@pytest.mark.parametrize("stage", ["train", "export", "embed", "embed the rest"])
def test_a_caption_that_was_changed_after_embedding_is_refused(
    prepared: Prepared, tiny_clip_json: str, tiny_clip_folder: str, tmp_path: Path, stage: str
) -> None:
    change(prepared.tars[0], b"picture number 3", b"picture number 8")
    with pytest.raises(InputError, match=r"00000\.tar .*was written again after .*SHA-256 differs.*mbed"):
        use(stage, prepared, tmp_path, tiny_clip_json, tiny_clip_folder)


def test_a_file_that_was_only_copied_again_is_the_same(
    prepared: Prepared, tiny_clip_json: str, tiny_clip_folder: str, tmp_path: Path
) -> None:
    for path in prepared.tars:
        Path(path).touch()
    assert embed_again(prepared, tiny_clip_folder)["num_rows"] == 24
    train.main(config(tmp_path / "student", tiny_clip_json, store=prepared.store, objective="clip-kd", num_steps=1))


@pytest.mark.parametrize("stage", ["train", "export", "embed", "embed the rest"])
def test_a_tar_of_another_size_is_refused(
    prepared: Prepared, tiny_clip_json: str, tiny_clip_folder: str, tmp_path: Path, stage: str
) -> None:
    with open(prepared.tars[0], "ab") as file:
        file.write(bytes(10240))
    with pytest.raises(InputError, match=r"00000\.tar .*bytes"):
        use(stage, prepared, tmp_path, tiny_clip_json, tiny_clip_folder)


def test_a_finished_store_says_what_its_pattern_matches_now(
    pair_tars: PairTars, tiny_clip_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tars = pair_tars(shards=3, rows=4)
    pattern, store = f"{Path(tars[0]).parent}/*.tar", str(tmp_path / "store")
    made = Prepared(tars=[pattern], store=store, groups="", clusters="")
    first = embed_again(made, tiny_clip_folder)
    shutil.copy(tars[0], f"{Path(tars[0]).parent}/00003.tar")
    with pytest.raises(InputError, match=r"store is finished.* 3 .*the data now has 1 more.*00003\.tar.*other --out"):
        embed_again(made, tiny_clip_folder)
    Path(tars[0]).with_name("00003.tar").unlink()
    Path(tars[2]).unlink()
    assert embed_again(made, tiny_clip_folder) == first  # data may go once it is embedded
    assert "1 of the 3 files" in capsys.readouterr().err
    for path in tars[:2]:
        Path(path).unlink()
    assert embed_again(made, tiny_clip_folder) == first
    assert "3 of the 3 files" in capsys.readouterr().err


def test_a_training_does_not_go_on_with_another_live_teacher_of_the_same_name(
    pair_tars: PairTars, tiny_clip_json: str, tmp_path: Path
) -> None:
    tars, teacher = pair_tars(shards=1, rows=16), str(tmp_path / "teacher")
    create_clip(tiny_clip_json, seed=7).save(teacher)
    options = {"data": tuple(tars), "live_teacher": teacher, "objective": "clip-kd", "keep_checkpoints": 9}
    train.main(config(tmp_path / "student", tiny_clip_json, **options))
    (tmp_path / "student" / "result.json").unlink()
    shutil.rmtree(tmp_path / "student" / "checkpoints" / "step-000004")
    train.main(config(tmp_path / "student", tiny_clip_json, **options))  # the same teacher goes on
    (tmp_path / "student" / "result.json").unlink()
    shutil.rmtree(tmp_path / "student" / "checkpoints" / "step-000004")
    create_clip(tiny_clip_json, seed=8).save(teacher)
    with pytest.raises(InputError, match=r"made from other inputs.*live teacher"):
        train.main(config(tmp_path / "student", tiny_clip_json, **options))


def test_image_digests_are_compared_in_loader_processes_too(
    prepared: Prepared, tiny_clip_json: str, tmp_path: Path
) -> None:
    shard = Path(prepared.tars[0])
    where = shard.read_bytes().index(b"\xff\xd9")
    old = shard.read_bytes()[where - 6 : where + 2]
    change(str(shard), old, bytes([old[0] ^ 1]) + old[1:], keep_time=True)
    options = {"store": prepared.store, "objective": "clip-kd", "num_workers": 1}
    with pytest.raises(InputError, match="picture is not the one that was embedded"):
        train.main(config(tmp_path / "student", tiny_clip_json, **options))
