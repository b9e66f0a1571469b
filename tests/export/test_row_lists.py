from __future__ import annotations

import csv
import hashlib
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from distilclip.data.shards import open_shard, read_texts
from distilclip.data.store import Store
from distilclip.errors import InputError
from distilclip.export.row_lists import PartitionWriter, write_keys
from distilclip.export.selection import open_selection
from distilclip.export.uids import UID, read_subset, read_uids, write_subset
from tests.conftest import encoded, picture
from tests.conftest import write_tar as write_members
from tests.export.conftest import Made, write_balance, write_store, write_tar


def test_keys_name_the_kept_rows_with_their_file(made: Made, tmp_path: Path) -> None:
    keys = write_keys(open_selection(made.store, groups=made.groups), str(tmp_path))
    with open(tmp_path / "keys.tsv", newline="") as file:
        lines = list(csv.DictReader(file, delimiter="\t"))
    assert [(made.tars.index(line["uri"]), int(line["row"])) for line in lines] == made.kept
    assert [line["key"] for line in lines[:5]] == ["00001", "00004", "00005", "00006", "00001"]
    assert keys.num_keys == 12


def test_the_plain_list_is_left_out_where_keys_are_ambiguous(made: Made, tmp_path: Path) -> None:
    keys = write_keys(open_selection(made.store, groups=made.groups), str(tmp_path))
    assert (keys.num_ambiguous, keys.plain) == (8, False)  # the first two tars have the same keys
    assert not (tmp_path / "keys.txt").exists()


def test_the_plain_list_holds_a_key_per_line(tmp_path: Path) -> None:
    store = write_store(str(tmp_path / "store"), [write_tar(tmp_path / "0.tar", ["b", "a", "x", "c"], first=0)])
    keys = write_keys(open_selection(store.path), str(tmp_path))
    assert (keys.num_keys, keys.num_ambiguous, keys.plain) == (3, 0, True)
    assert (tmp_path / "keys.txt").read_text() == "b\na\nc\n"


def test_a_key_with_a_line_break_survives_the_table_and_forbids_the_list(tmp_path: Path) -> None:
    store = write_store(str(tmp_path / "store"), [write_tar(tmp_path / "0.tar", ["one\ntwo", "b\t3"], first=0)])
    assert not write_keys(open_selection(store.path), str(tmp_path)).plain
    with open(tmp_path / "keys.tsv", newline="") as file:
        assert [line["key"] for line in csv.DictReader(file, delimiter="\t")] == ["one\ntwo", "b\t3"]


def test_texts_are_those_of_the_samples(made: Made) -> None:
    rows = open_selection(made.store).rows(1)
    found = list(read_texts(rows.uri, rows.key, rows.offset, rows.size))
    shard = open_shard(rows.uri)
    for i, text in enumerate(found):
        sample = shard.read(int(rows.offset[i]), int(rows.size[i]))
        assert (text.caption, text.meta) == (sample.caption, sample.meta)
    shard.close()
    assert [text.caption for text in found] == [f"picture number {100 + row}" for row in (0, 1, 3, 4, 5, 6)]


def test_texts_of_a_table(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(encoded(picture(1)))
    (tmp_path / "pairs.csv").write_text("filepath,caption,url\na.jpg,first,there\na.jpg,second,\n")
    found = read_texts(str(tmp_path / "pairs.csv"), ["a.jpg"], np.array([1], np.uint64), np.array([0], np.uint32))
    assert [(text.caption, text.meta["url"]) for text in found] == [("second", "")]


def test_uids_are_read_from_the_json_as_datacomp_reads_them(made: Made) -> None:
    rows = open_selection(made.store).rows(0)
    uids = read_uids(rows.uri, rows.key, rows.offset, rows.size, kind="json")
    texts = [text.meta["uid"] for text in read_texts(rows.uri, rows.key, rows.offset, rows.size)]
    expected = np.array([(int(uid[:16], 16), int(uid[16:32], 16)) for uid in texts], np.dtype("u8,u8"))  # its README
    np.testing.assert_array_equal(uids, expected)


def test_md5_uids_are_of_url_and_caption(made: Made) -> None:
    rows = open_selection(made.store).rows(2)
    high, low = read_uids(rows.uri, rows.key, rows.offset, rows.size, kind="md5")[0].tolist()
    assert f"{high:016x}{low:016x}" == hashlib.md5(b"somewhere/200.jpg\npicture number 200").hexdigest()


def test_a_sample_without_uid_is_named_with_the_remedy(tmp_path: Path) -> None:
    for content, message in ((b'{"url": "u"}', "has no `uid`"), (b'{"uid": "x1"}', "has the uid 'x1'")):
        tar = write_members(tmp_path / "0.tar", [("k.jpg", encoded(picture(0))), ("k.json", content), ("k.txt", b"c")])
        rows = open_selection(write_store(str(tmp_path / message[:3] / message[-4:]), [tar]).path).rows(0)
        with pytest.raises(InputError, match=f"k: its json {message}.*--uid md5"):
            read_uids(rows.uri, rows.key, rows.offset, rows.size, kind="json")


def test_a_subset_file_is_sorted_by_both_halves_and_holds_each_uid_once(tmp_path: Path) -> None:
    uids = np.array([(2, 1), (1, 2**64 - 1), (2, 0), (1, 3), (2, 1)], UID)
    assert write_subset(str(tmp_path / "s.npy"), uids) == 4
    found = np.load(tmp_path / "s.npy")
    assert found.dtype == np.dtype("u8,u8")
    assert found.tolist() == [(1, 3), (1, 2**64 - 1), (2, 0), (2, 1)]


def test_a_subset_selects_its_samples(made: Made, tmp_path: Path) -> None:
    """Both forms that DataComp's resharder reads: .npy, and the bare memory of the array."""
    everything = open_selection(made.store)
    rows = everything.rows(0)
    uids = np.sort(read_uids(rows.uri, rows.key, rows.offset, rows.size, kind="json")[[1, 3]])
    write_subset(str(tmp_path / "s.npy"), uids)
    uids.tofile(tmp_path / "s.mem")
    for path in ("s.npy", "s.mem"):
        selection = open_selection(made.store, subset=str(tmp_path / path))
        assert [selection.rows(shard).row.tolist() for shard in range(3)] == [[1, 4], [], []]
        assert [selection.count(shard) for shard in range(3)] == [2, 0, 0]


def test_datacomps_resharder_finds_the_kept_samples_in_the_file(made: Made, tmp_path: Path) -> None:
    """Its lookup, on our file: resharder.py takes a sample as often as its uid occurs."""
    selection, everything = open_selection(made.store, groups=made.groups), open_selection(made.store)
    parts = [selection.rows(shard) for shard in range(3)]
    uids = [read_uids(rows.uri, rows.key, rows.offset, rows.size, kind="json") for rows in parts]
    write_subset(str(tmp_path / "s.npy"), np.concatenate(uids))
    subset = np.load(tmp_path / "s.npy", mmap_mode="r")
    assert subset.dtype == np.dtype("u8,u8")
    for shard in range(3):
        rows = everything.rows(shard)
        for row, text in zip(rows.row, read_texts(rows.uri, rows.key, rows.offset, rows.size), strict=True):
            uid = np.array([divmod(int(text.meta["uid"], 16), 2**64)], np.dtype("u8,u8"))[0]
            count = np.searchsorted(subset, uid, "right") - np.searchsorted(subset, uid, "left")
            assert count == (1 if (shard, row) in made.kept else 0)


def test_files_that_are_no_subset_are_named(tmp_path: Path) -> None:
    np.save(tmp_path / "floats.npy", np.zeros(3))
    np.save(tmp_path / "unsorted.npy", np.array([(2, 1), (1, 1)], UID))
    for path, message in (("floats.npy", "float64"), ("unsorted.npy", "not sorted"), ("no.npy", "does not exist")):
        with pytest.raises(InputError, match=message):
            read_subset(str(tmp_path / path))


def test_tars_of_every_format_are_read(tmp_path: Path) -> None:
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT):
        name = "a" * (60 if form == tarfile.USTAR_FORMAT else 150)
        tar = write_tar(tmp_path / f"{form}.tar", [name, "b"], first=0, format=form)
        rows = open_selection(write_store(str(tmp_path / str(form)), [tar]).path).rows(0)
        assert [text.caption for text in read_texts(tar, rows.key, rows.offset, rows.size)] == [
            "picture number 0",
            "picture number 1",
        ]


def test_partitions_hold_embeddings_and_metadata_row_by_row(made: Made, tmp_path: Path) -> None:
    store = Store.open(made.store)
    writer = PartitionWriter(open_selection(made.store, groups=made.groups), str(tmp_path))
    assert [writer(shard) for shard in range(3)] == [4, 4, 4]
    for shard in range(3):
        kept = [row for s, row in made.kept if s == shard]
        for folder, embeddings in (("img_emb", store.image(shard)), ("text_emb", store.text(shard))):
            found = np.load(tmp_path / folder / f"{folder}_{shard}.npy")
            assert found.dtype == np.float16
            np.testing.assert_array_equal(found, embeddings[kept])
        metadata = pq.read_table(tmp_path / "metadata" / f"metadata_{shard}.parquet").to_pydict()
        assert metadata["image_path"] == [store.rows(shard).key[row] for row in kept]
        assert metadata["caption"] == [f"picture number {100 * shard + row}" for row in kept]
        assert list(zip(metadata["shard"], metadata["row"], strict=True)) == [(shard, row) for row in kept]


def test_a_partition_without_metadata_is_written_again_and_an_empty_one_has_no_files(
    made: Made, tmp_path: Path
) -> None:
    write_balance(str(tmp_path / "none"), Store.open(made.store), none_of=1)
    writer = PartitionWriter(open_selection(made.store, groups=str(tmp_path / "none")), str(tmp_path / "out"))
    assert [writer(shard) for shard in (0, 1, 2)] == [4, 0, 4]
    before = {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert len(before) == 6
    (tmp_path / "out/metadata/metadata_2.parquet").unlink()
    (tmp_path / "out/img_emb/img_emb_2.npy").write_bytes(b"of another run")
    assert [writer(shard) for shard in (0, 1, 2)] == [4, 0, 4]
    assert {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()} == before
