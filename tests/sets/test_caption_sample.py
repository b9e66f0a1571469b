from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from distilclip import stage_calls
from distilclip.errors import InputError
from distilclip.sets import caption_sample
from distilclip.sets.caption_sample import captions_digest, read_captions
from distilclip.stages.embed import Config, main
from tests.conftest import write_tar


@pytest.fixture
def store(tmp_path: Path, pair_tars: Callable[..., list[str]], tiny_clip_folder: str) -> str:
    pair_tars(shards=2, rows=3)
    values = {"data": [str(tmp_path / "pairs")], "out": str(tmp_path / "store"), "model": tiny_clip_folder}
    main(stage_calls.build_config(Config, {**values, "num_workers": 0, "device": "cpu"}, stage="embed"))
    return str(tmp_path / "store")


def test_a_store_and_its_pairs_have_the_same_captions(tmp_path: Path, store: str) -> None:
    expected = [f"picture number {i}" for i in range(6)]
    assert read_captions([store]) == expected
    assert read_captions([str(tmp_path / "pairs")]) == expected
    assert read_captions([str(tmp_path / "pairs" / "00001.tar"), store]) == expected[3:] + expected


def test_a_sample_takes_the_first_of_shards_that_lie_evenly(
    tmp_path: Path, pair_tars: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    pair_tars(shards=6, rows=4)
    monkeypatch.setattr(caption_sample, "MOST_SHARDS", 3)
    monkeypatch.setattr(caption_sample, "MOST_CAPTIONS", 5)
    assert read_captions([str(tmp_path / "pairs")]) == [f"picture number {i}" for i in (0, 1, 8, 9, 16, 17)]


def test_samples_that_cannot_be_read_have_no_caption(tmp_path: Path) -> None:
    members = [("a.txt", b"\xff"), ("b.jpg", b"x"), ("b.txt", b"good"), ("c.jpg", b"x"), ("d.txt", b"no picture")]
    path = write_tar(tmp_path / "some.tar", members)
    assert "good" in read_captions([path])


def test_captions_that_are_not_there_are_an_error(tmp_path: Path, store: str) -> None:
    without = write_tar(tmp_path / "none.tar", [("a.jpg", b"x")])
    with pytest.raises(InputError, match=r"No sample of .*none\.tar has a caption: --training-captions needs some"):
        read_captions([without])
    shutil.move(tmp_path / "pairs", tmp_path / "elsewhere")
    with pytest.raises(InputError, match=r"00000\.tar .*store"):
        read_captions([store])
    assert len(read_captions([str(tmp_path / "elsewhere")])) == 6


def test_the_digest_is_of_names_and_sizes(tmp_path: Path) -> None:
    paths = [write_tar(tmp_path / name, [("a.txt", b"x" * count)]) for name, count in (("a.tar", 1), ("b.tar", 20_000))]
    assert captions_digest(paths) == captions_digest(paths)
    assert captions_digest(paths[:1]) != captions_digest(paths)
    before = captions_digest(paths[:1])
    write_tar(tmp_path / "a.tar", [("a.txt", b"x" * 20_000)])
    assert captions_digest(paths[:1]) != before
