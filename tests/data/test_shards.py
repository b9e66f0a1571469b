from __future__ import annotations

import json
from pathlib import Path

import pytest

from distilclip.data.reader import Reader
from distilclip.data.samples import BadSample
from distilclip.data.shards import TextReader, open_shard
from distilclip.data.tars import CutError
from tests.conftest import encoded, picture, write_tar


def test_a_sample_is_read_without_its_picture(tmp_path: Path) -> None:
    meta = json.dumps({"uid": "7", "captions": ["a hound"]}).encode()
    words = [("a/0.txt", b" a dog "), ("a/0.json", meta), ("a/0.cls", b"3")]
    tar = write_tar(tmp_path / "0.tar", [("a/0.jpg", bytes(1 << 20)), *words, ("a/1.jpg", bytes(9))])
    first, second = open_shard(tar).index()
    texts = TextReader(tar)
    sample = texts.read(first.offset, first.size)
    assert (sample.key, sample.image, sample.caption, sample.label) == ("a/0", None, "a dog", "3")
    assert (sample.meta["uid"], sample.captions) == ("7", ["a dog", "a hound"])
    assert texts.read(second.offset, second.size).key == "a/1"
    texts.close()


def test_members_that_are_no_text_stay_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    members = [("0.jpg", bytes(1 << 20)), ("0.mask.npy", bytes(1 << 20)), ("0.txt", b"a dog")]
    tar = write_tar(tmp_path / "0.tar", members)
    (entry,) = open_shard(tar).index()
    lengths: list[int] = []
    read = Reader.read
    monkeypatch.setattr(Reader, "read", lambda self, at, length: lengths.append(length) or read(self, at, length))
    assert TextReader(tar).read(entry.offset, entry.size).caption == "a dog"
    assert sum(lengths) == 3 * 512 + len("a dog")


def test_a_row_of_a_table_has_its_texts(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(encoded(picture(1)))
    (tmp_path / "pairs.csv").write_text("filepath,caption,label\na.jpg,a dog,3\n")
    texts = TextReader(str(tmp_path / "pairs.csv"))
    sample = texts.read(0, 0)
    assert (sample.key, sample.image, sample.caption, sample.label) == ("a.jpg", None, "a dog", "3")
    texts.close()


def test_texts_that_make_no_sense_and_a_tar_cut_since_are_told(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "0.tar", [("0.jpg", bytes(9)), ("0.json", b"{"), ("1.jpg", bytes(9)), ("1.txt", b"b")])
    first, second = open_shard(tar).index()
    with pytest.raises(BadSample, match=r"0\.tar: 0: json does not parse"):
        TextReader(tar).read(first.offset, first.size)
    Path(tar).write_bytes(Path(tar).read_bytes()[: second.offset + 100])
    with pytest.raises(CutError):
        TextReader(tar).read(second.offset, second.size)
