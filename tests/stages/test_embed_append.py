"""`embed --append`: what comes behind a finished store, and that the store stays whole until all of it is there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distilclip import cli, stage_folder
from distilclip.data.store import Store
from distilclip.errors import InputError
from distilclip.stages import embed as stage
from distilclip.stages.embed import Config, main
from tests.conftest import encoded, picture, write_tar
from tests.stages.conftest import contents

PairTars = Callable[..., list[str]]


def options(**others: Any) -> dict[str, Any]:
    return {"num_workers": 0, "batch_size": 3, "max_bad_ratio": 0.5, "views": 1, **others}


@pytest.fixture
def tars(tmp_path: Path, pair_tars: PairTars) -> list[str]:
    """Two tars of good pairs, and two that come later, of which the first has a bad sample."""
    bad = [("x.jpg", b"no image"), ("x.txt", b"words"), ("y.jpg", encoded(picture(70))), ("y.txt", b"more words")]
    return [*pair_tars(shards=2, rows=5), write_tar(tmp_path / "later" / "a.tar", bad), *later(tmp_path)]


def later(folder: Path) -> list[str]:
    members = [m for i in range(80, 84) for m in ((f"{i}.jpg", encoded(picture(i))), (f"{i}.txt", b"a later one"))]
    return [write_tar(folder / "later" / "b.tar", members)]


def embed(out: Path, data: list[str], model: str, **others: Any) -> dict[str, Any]:
    return main(Config(out=str(out), data=tuple(data), model=model, **options(**others)))


def store_bytes(folder: Path) -> dict[str, bytes]:
    """Every file but extended.json, which says that the store has grown, and the lock of an error's process."""
    return {name: content for name, content in contents(folder).items() if name not in ("extended.json", "lock.json")}


def test_a_store_that_has_grown_equals_one_embedded_at_once(
    tmp_path: Path, tars: list[str], tiny_clip_folder: str
) -> None:
    whole = embed(tmp_path / "whole", tars, tiny_clip_folder)
    embed(tmp_path / "store", tars[:2], tiny_clip_folder)
    before = contents(tmp_path / "store")
    first = stage_folder.result_digest(str(tmp_path / "store"))
    # 1. One tar by its own name, and then a folder of which that one is known.
    embed(tmp_path / "store", [tars[2]], tiny_clip_folder, append=True)
    assert Store.open(str(tmp_path / "store")).num_shards == 3
    grown = embed(tmp_path / "store", [str(tmp_path / "later")], tiny_clip_folder, append=True)
    # 2. The same bytes, of which those of the first shards were left alone.
    assert grown == whole
    assert grown["num_invalid"] == 1
    after = store_bytes(tmp_path / "store")
    assert after == store_bytes(tmp_path / "whole")
    kept = [name for name in before if name not in ("manifest.parquet", "result.json")]
    assert all(after[name] == before[name] for name in kept)
    assert len(kept) == 2 * 3  # rows, embeddings and views
    # 3. It says what it was, and is found done.
    said = json.loads((tmp_path / "store" / "extended.json").read_text())["former"]
    assert [entry["num_shards"] for entry in said] == [2, 3]
    assert said[0]["result"] == first
    assert stage_folder.growth(str(tmp_path / "store"), first) == said[0]
    assert embed(tmp_path / "store", [tars[3]], tiny_clip_folder, append=True) == whole
    assert json.loads((tmp_path / "store" / "config.json").read_text())["data"] == [
        *tars[:3],
        str(tmp_path / "later"),
    ]
    assert store_bytes(tmp_path / "store") == after


def test_new_files_that_sort_before_the_old_ones_come_behind_them(
    tmp_path: Path, tars: list[str], tiny_clip_folder: str
) -> None:
    """The same pattern as before, which now matches more; and a repair that has to find the order again."""
    pattern = str(tmp_path / "pairs" / "*.tar")
    embed(tmp_path / "store", [pattern], tiny_clip_folder)
    shutil.copy(tars[3], tmp_path / "pairs" / "00000-new.tar")
    with pytest.raises(InputError, match=r"has 1 more: .*00000-new\.tar first\. Add them to it with --append"):
        embed(tmp_path / "store", [pattern], tiny_clip_folder)
    embed(tmp_path / "store", [pattern], tiny_clip_folder, append=True)
    expected = contents(tmp_path / "store")
    assert [line.uri.rpartition("/")[2] for line in Store.open(str(tmp_path / "store")).shards] == [
        "00000.tar",
        "00001.tar",
        "00000-new.tar",
    ]
    for name in ("manifest.parquet", "result.json", "000001.rows.parquet"):
        (tmp_path / "store" / name).unlink()
    embed(tmp_path / "store", [pattern], tiny_clip_folder)
    assert contents(tmp_path / "store") == expected


def test_a_kill_at_any_moment_leaves_a_store_that_the_same_command_completes(
    tmp_path: Path, tars: list[str], tiny_clip_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every write and removal after the new shards is the last of one run; until the result, the old store reads."""
    embed(tmp_path / "whole", tars, tiny_clip_folder)
    embed(tmp_path / "first", tars[:2], tiny_clip_folder)
    expected, before = store_bytes(tmp_path / "whole"), contents(tmp_path / "first")
    clip = stage.load_clip(tiny_clip_folder)
    monkeypatch.setattr(stage, "load_clip", lambda *args, **others: clip)
    places = [(stage, "write_manifest"), (stage.stage_folder, "write_json"), (stage.stage_folder.files, "remove")]
    num_calls, usable = 0, 0
    while True:
        num_calls += 1
        store = tmp_path / f"killed{num_calls}"
        shutil.copytree(tmp_path / "first", store)
        with monkeypatch.context() as patched:
            counted = [0]
            for module, name in places:
                patched.setattr(module, name, killed_at(num_calls, counted, getattr(module, name)))
            try:
                embed(store, tars, tiny_clip_folder, append=True)
                break
            except KeyboardInterrupt:
                pass
        if (store / "result.json").exists():
            usable += 1
            assert all(contents(store)[name] == content for name, content in before.items())
            assert Store.open(str(store)).num_shards == 2
            Store.open(str(store)).verify()
            assert cli.main(["verify", str(store)]) == 0
        else:
            with pytest.raises(InputError, match="is unfinished"):
                stage_folder.require(str(store), stage="embed")
        embed(store, tars, tiny_clip_folder, append=True)
        assert store_bytes(store) == expected, num_calls
    assert num_calls > 5
    assert usable >= 3


def killed_at(number: int, counted: list[int], call: Callable[..., Any]) -> Callable[..., Any]:
    """The call, unless it is the `number`-th of all that share `counted`: that one ends the run. Locks do not count."""

    def called(*args: Any, **others: Any) -> Any:
        counted[0] += not str(args[0]).endswith("lock.json")
        if counted[0] == number:
            raise KeyboardInterrupt
        return call(*args, **others)

    return called


def test_an_append_that_was_begun_is_finished_before_another(
    tmp_path: Path, tars: list[str], tiny_clip_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    embed(tmp_path / "store", tars[:2], tiny_clip_folder)
    with monkeypatch.context() as patched:
        patched.setattr(stage.stage_folder, "extend_folder", killed_at(1, [0], stage.stage_folder.extend_folder))
        with pytest.raises(KeyboardInterrupt):
            embed(tmp_path / "store", [tars[2]], tiny_clip_folder, append=True)
    with pytest.raises(InputError, match=r"begun and not finished, whose shard 2 is .*a\.tar and not .*b\.tar"):
        embed(tmp_path / "store", [tars[3]], tiny_clip_folder, append=True)
    embed(tmp_path / "store", [tars[2]], tiny_clip_folder, append=True)


def test_what_does_not_go_with_the_store_is_refused(
    tmp_path: Path, tars: list[str], tiny_clip_folder: str, tiny_clip_json: str
) -> None:
    embed(tmp_path / "store", tars[:2], tiny_clip_folder)
    before = contents(tmp_path / "store")
    for others, message in (
        ({"precision": "fp16"}, "precision was 'fp32', now 'fp16'"),
        ({"views": 0}, "views was 1, now 0"),
        ({"model": "perceptual"}, "model was .*, now 'perceptual'"),
    ):
        with pytest.raises(InputError, match=message):
            embed(tmp_path / "store", [tars[2]], **{"model": tiny_clip_folder, "append": True, **others})
    Path(tars[0]).write_bytes(Path(tars[1]).read_bytes() + bytes(1024))
    with pytest.raises(InputError, match=r"shard 0 was made from .* The data changed"):
        embed(tmp_path / "store", tars[:3], tiny_clip_folder, append=True)
    Path(tars[0]).unlink()  # a store needs its files no more
    assert store_bytes(tmp_path / "store") == before
    assert embed(tmp_path / "store", [tars[2]], tiny_clip_folder, append=True)["num_shards"] == 3


def test_other_weights_under_the_same_path_are_another_teacher(
    tmp_path: Path, tars: list[str], tiny_clip_folder: str
) -> None:
    from distilclip.models.clip import create_clip
    from tests.conftest import TINY_CLIP

    model = tmp_path / "model"
    shutil.copytree(tiny_clip_folder, model)
    embed(tmp_path / "store", tars[:2], str(model))
    shutil.rmtree(model)
    create_clip(json.dumps(TINY_CLIP), seed=8).save(str(model))
    with pytest.raises(InputError, match="was embedded by another teacher"):
        embed(tmp_path / "store", [tars[2]], str(model), append=True)


def test_append_without_a_store_begins_one(tmp_path: Path, tars: list[str], tiny_clip_folder: str) -> None:
    """So that a command that runs every night can be the same each time."""
    whole = embed(tmp_path / "whole", tars[:2], tiny_clip_folder)
    assert embed(tmp_path / "store", tars[:2], tiny_clip_folder, append=True) == whole
    assert contents(tmp_path / "store") == contents(tmp_path / "whole")
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("store", "whole")]
    assert [{**values, "out": ""} for values in configs] == [{**configs[0], "out": "", "append": False}] * 2
