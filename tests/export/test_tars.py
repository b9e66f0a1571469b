from __future__ import annotations

import os
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distilclip.data.columns import read_columns
from distilclip.data.shards import read_texts
from distilclip.data.store import split_id
from distilclip.data.tars import TarShard
from distilclip.errors import InputError
from distilclip.export.curated_tars import (
    INDEX_SCHEMA,
    FinishedTar,
    Piece,
    TarPart,
    TarWriter,
    index_path,
    plan_tars,
    tar_path,
)
from distilclip.export.selection import Selection, open_selection
from tests.export.conftest import Made, write_balance, write_store, write_tar


def members(path: str) -> dict[str, tuple[bytes, Any]]:
    """Content and header of every member, by name, as Python's own reader sees them."""
    with tarfile.open(path) as tar:
        return {
            m.name: (tar.extractfile(m).read(), (m.mtime, m.mode, m.uname))  # type: ignore[union-attr]
            for m in tar.getmembers()
        }


def write_all(selection: Selection, folder: str, *, samples_per_tar: int | None = None) -> list[FinishedTar]:
    writer = TarWriter(selection, folder)
    return [writer(part) for part in plan_tars(selection, samples_per_tar=samples_per_tar)]


def test_kept_samples_are_copied_with_all_their_members_and_headers(made: Made, tmp_path: Path) -> None:
    written = write_all(open_selection(made.store, groups=made.groups), str(tmp_path / "out"))
    assert [tar.num_samples for tar in written] == [4, 4, 4]
    for shard, source in enumerate(made.tars):
        original = members(source)
        kept = [row for s, row in made.kept if s == shard]
        expected = [name for i, name in enumerate(dict.fromkeys(n.split(".")[0] for n in original)) if i in kept]
        copied = members(tar_path(str(tmp_path / "out"), shard))
        assert list(copied) == [name for name in original if name.split(".")[0] in expected]
        assert all(original[name] == found for name, found in copied.items())
        assert len(copied) == 4 * 4


def test_spans_are_the_same_bytes_as_in_the_source(made: Made, tmp_path: Path) -> None:
    selection = open_selection(made.store, groups=made.groups)
    write_all(selection, str(tmp_path))
    for shard in range(3):
        rows = selection.rows(shard)
        content = Path(tar_path(str(tmp_path), shard)).read_bytes()
        source = Path(made.tars[shard]).read_bytes()
        spans = [source[o : o + s] for o, s in zip(rows.offset.tolist(), rows.size.tolist(), strict=True)]
        assert content == b"".join(spans) + bytes(1024)


def test_the_index_says_what_went_where(made: Made, tmp_path: Path) -> None:
    write_all(open_selection(made.store, groups=made.groups), str(tmp_path))
    for number in range(3):
        index = read_columns(index_path(str(tmp_path), number), INDEX_SCHEMA).to_pydict()
        found = TarShard(tar_path(str(tmp_path), number)).index()
        assert [(e.key, e.offset, e.size, e.error) for e in found] == [
            (*values, "") for values in zip(index["key"], index["offset"], index["size"], strict=True)
        ]
        shards, rows = split_id(np.array(index["sample"], np.uint64))
        assert list(zip(shards.tolist(), rows.tolist(), strict=True)) == [k for k in made.kept if k[0] == number]


@pytest.mark.parametrize("samples_per_tar", [1, 3, 4, 5, 12, 50])
def test_resharding_keeps_order_and_count(made: Made, tmp_path: Path, samples_per_tar: int) -> None:
    written = write_all(open_selection(made.store, groups=made.groups), str(tmp_path), samples_per_tar=samples_per_tar)
    counts = [tar.num_samples for tar in written]
    assert sum(counts) == 12
    assert all(count == samples_per_tar for count in counts[:-1])
    samples = [
        sample
        for number in range(len(counts))
        for sample in read_columns(index_path(str(tmp_path), number), INDEX_SCHEMA).column("sample").to_pylist()
    ]
    assert [(sample >> 32, sample & 0xFFFFFFFF) for sample in samples] == made.kept


def test_a_key_that_is_in_the_tar_already_gets_a_new_one(made: Made, tmp_path: Path) -> None:
    """The first two tars have the same keys: in one tar no reader could tell their samples apart."""
    (written,) = write_all(open_selection(made.store, groups=made.groups), str(tmp_path), samples_per_tar=50)
    assert written.num_renamed == 4
    found = TarShard(tar_path(str(tmp_path), 0)).index()
    assert not any(entry.error for entry in found)
    assert found[4].key == "00001-000001-000001"
    copied, original = members(tar_path(str(tmp_path), 0)), members(made.tars[1])
    for extension in ("jpg", "json", "txt", "depth.npy"):
        assert copied[f"00001-000001-000001.{extension}"] == original[f"00001.{extension}"]


def test_long_names_keep_their_extended_headers_when_renamed(tmp_path: Path) -> None:
    names = ["folder/" * 20 + f"{row:05d}" for row in range(4)]
    tars = [
        write_tar(tmp_path / f"{f}.tar", names, first=10 * f, format=f)
        for f in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT)
    ]
    store = write_store(str(tmp_path / "store"), tars)
    (written,) = write_all(open_selection(store.path), str(tmp_path / "out"), samples_per_tar=50)
    assert (written.num_samples, written.num_renamed) == (6, 3)
    path = tar_path(str(tmp_path / "out"), 0)
    assert not any(entry.error for entry in TarShard(path).index())
    copied = members(path)
    assert copied[f"{names[0]}-000001-000000.jpg"] == members(tars[1])[f"{names[0]}.jpg"]
    assert copied[f"{names[0]}.jpg"] == members(tars[0])[f"{names[0]}.jpg"]


def test_a_kill_after_any_file_leaves_the_same_bytes(made: Made, tmp_path: Path) -> None:
    selection = open_selection(made.store, groups=made.groups)
    whole = tmp_path / "whole"
    expected = write_all(selection, str(whole), samples_per_tar=5)
    order = sorted((p for p in whole.rglob("*") if p.is_file()), key=lambda p: p.stat().st_mtime_ns)
    assert len(order) == 6
    for kept in range(len(order)):
        cut = tmp_path / f"cut{kept}"
        shutil.copytree(whole, cut)
        for path in order[kept:]:
            (cut / path.relative_to(whole)).unlink()
        assert write_all(selection, str(cut), samples_per_tar=5) == expected
        assert {p.relative_to(cut): p.read_bytes() for p in cut.rglob("*") if p.is_file()} == {
            p.relative_to(whole): p.read_bytes() for p in order
        }


def test_finished_tars_are_not_written_again(made: Made, tmp_path: Path) -> None:
    selection = open_selection(made.store, groups=made.groups)
    write_all(selection, str(tmp_path / "out"))
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*")}
    write_all(selection, str(tmp_path / "out"))
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*")} == before


def test_a_failure_in_the_middle_leaves_no_half_written_tar(made: Made, tmp_path: Path) -> None:
    source = Path(made.tars[1])
    content = bytearray(source.read_bytes())
    entry = TarShard(str(source)).index()[5]
    place = content.index(b"\xff\xd8", entry.offset) + 200
    content[place] ^= 1
    source.write_bytes(bytes(content))
    os.utime(source, (0, 0))  # what was written again since is found at once, by its SHA-256
    with pytest.raises(InputError, match=r"00005.*not the one that was embedded"):
        write_all(open_selection(made.store, groups=made.groups), str(tmp_path / "out"))
    assert sorted(p.name for p in (tmp_path / "out").rglob("*") if p.is_file()) == ["00000.parquet", "00000.tar"]


def test_a_damaged_header_is_named(made: Made, tmp_path: Path) -> None:
    """The second member of a sample that is not the one looked at when a source is checked."""
    source = Path(made.tars[1])
    content = bytearray(source.read_bytes())
    place = content.index(b"00005.json")
    content[place + 20 : place + 90] = b"?" * 70
    source.write_bytes(bytes(content))
    os.utime(source, (0, 0))  # what was written again since is found at once, by its SHA-256
    selection = open_selection(made.store, groups=made.groups)
    with pytest.raises(InputError, match="the key is '' where the store has '00005'"):
        write_all(selection, str(tmp_path / "out"))
    rows = selection.rows(1)
    with pytest.raises(InputError, match="00005 could be read when it was embedded"):
        list(read_texts(rows.uri, rows.key, rows.offset, rows.size))


def test_a_shard_of_which_nothing_is_kept_has_an_index_and_no_tar(made: Made, tmp_path: Path) -> None:
    from distilclip.data.store import Store

    write_balance(str(tmp_path / "none"), Store.open(made.store), none_of=1)
    written = write_all(open_selection(made.store, groups=str(tmp_path / "none")), str(tmp_path / "out"))
    assert [tar.num_samples for tar in written] == [4, 0, 4]
    assert sorted(p.name for p in (tmp_path / "out" / "tars").iterdir()) == ["00000.tar", "00002.tar"]
    again = plan_tars(open_selection(made.store, groups=str(tmp_path / "none")), samples_per_tar=6)
    assert again == [TarPart(0, (Piece(0, 0, 4), Piece(2, 0, 2))), TarPart(1, (Piece(2, 2, 4),))]


def test_tables_and_moved_data_that_do_not_fit_are_named(made: Made, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="made from 3"):
        open_selection(made.store, data=made.tars[:2])
    with pytest.raises(InputError, match=r"2.tar, row 0: the key is '00100' where the store has '00000'"):
        write_all(open_selection(made.store, data=[made.tars[0], made.tars[2], made.tars[1]]), str(tmp_path))
    (tmp_path / "pairs.csv").write_text("filepath,caption\nnowhere.jpg,a\n")
    with pytest.raises(InputError, match="is no tar"):
        plan_tars(open_selection(made.store, data=[str(tmp_path / "pairs.csv")] * 3), samples_per_tar=None)
