"""Folders as people have them: img2dataset's outputs, pictures, and what must be refused with a remedy."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distilclip.data.samples import BadSample
from distilclip.data.shards import find_shards, open_shard, source_size
from distilclip.errors import InputError
from tests.conftest import encoded, picture, write_tar

JPEG = encoded(picture(0))
META = pa.table({"url": ["https://example.org/0.jpg"], "caption": ["a"], "key": ["000000000"]})


def names(folder: Path | str) -> list[str]:
    return [os.path.relpath(uri, folder) + ("/" if uri.endswith("/") else "") for uri in find_shards(str(folder))]


def captions(uri: str) -> list[tuple[str, str | None]]:
    shard = open_shard(uri)
    samples = [shard.read(entry.offset, entry.size) for entry in shard.index()]
    assert all(sample.image == JPEG for sample in samples)
    return [(sample.key, sample.caption) for sample in samples]


def img2dataset(folder: Path, output_format: str) -> None:
    """Two shards of one pair, as img2dataset 1.45 lays them out."""
    folder.mkdir()
    for stem in ("00000", "00001"):
        (folder / f"{stem}_stats.json").write_text(json.dumps({"count": 1}))
        meta = json.dumps({"caption": stem, "url": "https://example.org"}).encode()
        if output_format == "parquet":
            pq.write_table(META.append_column("jpg", pa.array([JPEG], pa.binary())), folder / f"{stem}.parquet")
            continue
        pq.write_table(META, folder / f"{stem}.parquet")
        members = [(f"{stem}0000.jpg", JPEG), (f"{stem}0000.json", meta), (f"{stem}0000.txt", stem.encode())]
        if output_format == "webdataset":
            write_tar(folder / f"{stem}.tar", members)
            continue
        (folder / stem).mkdir()
        for name, content in members:
            (folder / stem / name).write_bytes(content)


@pytest.mark.parametrize(
    ("output_format", "shards"),
    [
        ("webdataset", ["00000.tar", "00001.tar"]),
        ("files", ["00000/", "00001/"]),
        ("parquet", ["00000.parquet", "00001.parquet"]),
    ],
)
def test_a_folder_of_img2dataset_is_read_as_it_is(tmp_path: Path, output_format: str, shards: list[str]) -> None:
    img2dataset(tmp_path / "pairs", output_format)
    assert names(tmp_path / "pairs") == shards
    key, caption = {
        "webdataset": ("000000000", "00000"),
        "files": ("000000000.jpg", "00000"),
        "parquet": ("000000000", "a"),
    }[output_format]
    assert captions(find_shards(str(tmp_path / "pairs"))[0]) == [(key, caption)]


def test_pictures_lie_in_folders_with_or_without_texts(tmp_path: Path) -> None:
    (tmp_path / "trip" / "day 1").mkdir(parents=True)
    (tmp_path / ".thumbnails").mkdir()
    for name in ("b.jpg", "a.JPG", "a.b.jpeg", "trip/1.jpg", "trip/day 1/2.jpg", ".thumbnails/0.jpg", "._b.jpg"):
        (tmp_path / name).write_bytes(JPEG)
    (tmp_path / "trip" / "1.txt").write_text(" a beach\n")
    (tmp_path / "trip" / "day 1" / "2.json").write_text(json.dumps({"captions": ["", "two"]}))
    (tmp_path / "notes.txt").write_text("no caption of a picture")
    assert names(tmp_path) == ["./", "trip/", "trip/day 1/"]
    root, trip, day = find_shards(str(tmp_path))
    assert captions(root) == [("a.JPG", None), ("a.b.jpeg", None), ("b.jpg", None)]  # no picture has a text
    assert captions(trip) == [("1.jpg", "a beach")]
    assert captions(day) == [("2.jpg", "two")]
    assert source_size(root) == 3 * len(JPEG)
    (tmp_path / "a.txt").write_text("an a")
    assert captions(root) == [("a.JPG", "an a"), ("a.b.jpeg", None), ("b.jpg", None)]  # now the others lack theirs


def test_a_picture_whose_name_is_no_utf8_has_a_printable_key(tmp_path: Path) -> None:
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.jpg")).write_bytes(JPEG)
    assert captions(f"{tmp_path}/") == [("caf\\xe9.jpg", None)]


def test_a_folder_that_changed_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(JPEG)
    shard = open_shard(f"{tmp_path}/")
    with pytest.raises(InputError, match=r"has no picture 1: pictures were removed"):
        shard.read(1, 0)
    shard.index()
    os.remove(tmp_path / "a.jpg")
    with pytest.raises(BadSample, match="missing image file"):
        shard.read(0, 0)


def test_links_in_a_circle_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(JPEG)
    (tmp_path / "again").symlink_to(tmp_path)
    assert names(tmp_path) == ["./"]


def test_a_remote_folder_is_read_alike() -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe({"/album/a.jpg": JPEG, "/album/b/c.jpg": JPEG, "/album/b/c.txt": b"see"})
    assert find_shards("memory://album") == ["memory://album/", "memory://album/b/"]
    assert captions("memory://album/") == [("a.jpg", None)]
    assert captions("memory://album/b/") == [("c.jpg", "see")]


def test_tables_are_taken_where_nothing_else_is(tmp_path: Path) -> None:
    (tmp_path / "pairs.csv").write_text("filepath,caption\na.jpg,a\n")
    assert names(tmp_path) == ["pairs.csv"]


@pytest.mark.parametrize("other", ["a.jpg", "more.parquet"])
def test_shards_of_two_kinds_are_refused(tmp_path: Path, other: str) -> None:
    write_tar(tmp_path / "0.tar", [("0.jpg", JPEG), ("0.txt", b"a")])
    if other == "a.jpg":
        (tmp_path / other).write_bytes(JPEG)
    else:
        pq.write_table(META.append_column("jpg", pa.array([JPEG], pa.binary())), tmp_path / other)
    with pytest.raises(InputError, match=r"holds tars \(.*0\.tar\) and .*Say which are meant"):
        find_shards(str(tmp_path))
    assert find_shards(str(tmp_path / "*.tar")) == [str(tmp_path / "0.tar")]


def test_pictures_beside_their_table_are_refused_and_an_unrelated_table_is_not(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(JPEG)
    (tmp_path / "sales.csv").write_text("month,sum\n1,2\n")
    assert names(tmp_path) == ["./"]
    (tmp_path / "pairs.csv").write_text("filepath,caption\na.jpg,a\n")
    with pytest.raises(InputError, match=r"folders of pictures .* and tables of captions \(.*pairs\.csv\)"):
        find_shards(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("0.tar.gz", 'for f in *.tar.gz; do gzip -dk "$f"; done'),
        ("0.tgz", 'for f in *.tgz; do gzip -dc "$f" > "${f%.tgz}.tar"; done'),
        ("0.tar.zst", 'for f in *.tar.zst; do zstd -dk "$f"; done'),
    ],
)
def test_compressed_tars_are_refused_with_the_command(tmp_path: Path, name: str, command: str) -> None:
    (tmp_path / name).write_bytes(b"\x1f\x8b")
    for given in (tmp_path, tmp_path / name):
        with pytest.raises(InputError, match=rf"compressed.*{re.escape(command)}"):
            open_shard(find_shards(str(given))[0])


def test_a_folder_of_nothing_says_what_could_be_there(tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("")
    with pytest.raises(InputError, match=r"holds no tar, no Parquet file, no CSV and no picture \(avif, bmp"):
        find_shards(str(tmp_path))


def test_metadata_of_laion_is_named_as_addresses(tmp_path: Path) -> None:
    pq.write_table(pa.table({"URL": ["https://example.org/0.jpg"], "TEXT": ["a"]}), tmp_path / "part-0.parquet")
    (uri,) = find_shards(str(tmp_path))
    command = "--input_format parquet --url_col URL --caption_col TEXT --output_format webdataset"
    with pytest.raises(InputError, match=rf"web addresses \(column URL\).*img2dataset --url_list .*{command}"):
        open_shard(uri).index()
