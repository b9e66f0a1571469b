from __future__ import annotations

import os
import re
import tracemalloc
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distilclip.csv_rows import CsvColumns
from distilclip.data.samples import BadSample, Sample
from distilclip.data.shards import open_shard
from distilclip.errors import InputError
from tests.conftest import encoded, picture

IMAGES = [encoded(picture(i)) for i in range(5)]


def read_all(uri: str) -> list[Sample]:
    shard = open_shard(uri)
    samples = [shard.read(entry.offset, entry.size) for entry in shard.index()]
    shard.close()
    return samples


def test_parquet_as_hugging_face_stores_images(tmp_path: Path) -> None:
    path = str(tmp_path / "train-00000-of-00001.parquet")
    images = [{"bytes": image, "path": f"{i}.jpg"} for i, image in enumerate(IMAGES)]
    table = pa.table({"image": images, "text": [f"picture {i}" for i in range(5)], "label": list(range(5))})
    pq.write_table(table, path, row_group_size=2)
    samples = read_all(path)
    assert [s.image for s in samples] == IMAGES
    assert [s.caption for s in samples] == [f"picture {i}" for i in range(5)]
    assert [s.label for s in samples] == ["0", "1", "2", "3", "4"]
    assert [s.key for s in samples] == [f"{i:09d}" for i in range(5)]
    assert samples[3].meta == {"text": "picture 3", "label": 3}


def test_parquet_with_a_plain_binary_column_keys_and_gaps(tmp_path: Path) -> None:
    path = str(tmp_path / "a.parquet")
    columns = {
        "picture": pa.array([IMAGES[0], None, IMAGES[2]], pa.binary()),
        "caption": pa.array(["one", "two", None]),
        "key": ["a", "b", "c"],
    }
    pq.write_table(pa.table(columns), path)
    samples = read_all(path)
    assert [(s.key, s.image, s.caption) for s in samples] == [
        ("a", IMAGES[0], "one"),
        ("b", None, "two"),
        ("c", IMAGES[2], None),
    ]


def test_parquet_faults_name_the_file_and_a_remedy(tmp_path: Path) -> None:
    path = str(tmp_path / "a.parquet")
    pq.write_table(pa.table({"image": ["a.jpg"], "caption": ["a"]}), path)
    with pytest.raises(InputError, match=r"a\.parquet has no column of image bytes.*image, caption.*Rename"):
        open_shard(path).index()
    pq.write_table(pa.table({"image": pa.array([], pa.binary())}), path)
    with pytest.raises(InputError, match=r"a\.parquet has no rows"):
        open_shard(path).index()
    (tmp_path / "cut.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(InputError, match=r"cut\.parquet is no complete Parquet file"):
        open_shard(str(tmp_path / "cut.parquet")).index()


def test_parquet_reads_rows_in_any_order_with_a_small_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distilclip.data.tabular.CACHE_BYTES", 1)
    path = str(tmp_path / "a.parquet")
    pq.write_table(pa.table({"image": pa.array(IMAGES, pa.binary()), "caption": list("abcde")}), path, row_group_size=2)
    shard = open_shard(path)
    for row in (4, 0, 3, 1, 2, 4):
        assert shard.read(row, 0).image == IMAGES[row]
    with pytest.raises(InputError, match="has no row 5"):
        shard.read(5, 0)


def test_all_parquet_files_of_a_process_share_one_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = pa.table({"image": pa.array(IMAGES, pa.binary()), "caption": list("abcde")})
    monkeypatch.setattr("distilclip.data.tabular.CACHE_BYTES", int(2.5 * table.nbytes))
    shards = []
    for name in "abc":
        pq.write_table(table, tmp_path / f"{name}.parquet")
        shards.append(open_shard(str(tmp_path / f"{name}.parquet")))
    decoded: list[int] = []
    read_row_group = pq.ParquetFile.read_row_group

    def counted(file: pq.ParquetFile, group: int, **options: object) -> pa.Table:
        decoded.append(group)
        return read_row_group(file, group, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", counted)

    def num_decoded(names: str) -> int:
        decoded.clear()
        for name in names:
            assert shards["abc".index(name)].read(3, 0).image == IMAGES[3]
        return len(decoded)

    assert num_decoded("ababba") == 2  # two fit
    assert num_decoded("ca") == 1  # the third put out the one unused the longest, b
    assert num_decoded("b") == 1  # and b, again, c
    shards[0].close()
    assert num_decoded("cb") == 1  # c fits beside b, since what a held is gone
    for shard in shards:
        shard.close()


@pytest.mark.parametrize("suffix", ["csv", "tsv"])
def test_a_folder_with_a_table(tmp_path: Path, suffix: str) -> None:
    comma = "," if suffix == "csv" else "\t"
    (tmp_path / "images").mkdir()
    for i, image in enumerate(IMAGES[:3]):
        (tmp_path / "images" / f"{i}.jpg").write_bytes(image)
    rows = [["filepath", "caption", "label"], ["images/0.jpg", '"red, and blue"', "7"]]
    rows += [["images/1.jpg", "солнце", ""], [str(tmp_path / "images" / "2.jpg"), "", ""], ["images/9.jpg", "gone", ""]]
    path = tmp_path / f"pairs.{suffix}"
    path.write_text("\ufeff" + "\n".join(comma.join(row) for row in rows), encoding="utf-8")
    shard = open_shard(str(path))
    entries = shard.index()
    assert [entry.key for entry in entries][:2] == ["images/0.jpg", "images/1.jpg"]
    samples = [shard.read(entry.offset, entry.size) for entry in entries[:3]]
    assert [s.image for s in samples] == IMAGES[:3]
    assert [s.caption for s in samples] == ["red, and blue", "солнце", None]
    assert samples[0].label == "7"
    with pytest.raises(BadSample, match=r"row 3: missing image file"):
        shard.read(3, 0)


def test_one_bad_row_of_a_table_condemns_itself_alone(tmp_path: Path) -> None:
    (tmp_path / "0.jpg").write_bytes(IMAGES[0])
    path = tmp_path / "pairs.csv"
    rows = [b"filepath,caption", b"0.jpg,fine", b"0.jpg,na\xefve", b"0.jpg,red, and blue", b",nothing", b"\xff.jpg,a"]
    path.write_bytes(b"\r\n".join(rows))
    shard = open_shard(str(path))
    entries = shard.index()
    assert [e.error for e in entries] == ["", "", "more values than columns", "no image", "file path is not UTF-8"]
    assert shard.read(0, 0).caption == "fine"
    with pytest.raises(BadSample, match="caption is not UTF-8"):
        shard.read(1, 0)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_rows_of_a_table_are_found_again_by_number(tmp_path: Path, end: str, mark: str) -> None:
    (tmp_path / "0.jpg").write_bytes(IMAGES[0])
    lines = [
        "caption,filepath,place",
        "",
        '"two',
        'lines, ""quoted""",0.jpg,1',
        "",
        "",
        "длинный,0.jpg,2",
        "short,0.jpg",
    ]
    path = tmp_path / "pairs.csv"
    path.write_text(mark + end.join(lines) + end * 2, encoding="utf-8", newline="")
    expected = [(f'two{end}lines, "quoted"', "1"), ("длинный", "2"), ("short", None)]
    shard = open_shard(str(path))
    assert [(entry.key, entry.offset, entry.error) for entry in shard.index()] == [("0.jpg", i, "") for i in range(3)]
    for row in (2, 0, 1, 0):
        sample = shard.read(row, 0)
        assert (sample.caption, sample.meta["place"], sample.image) == (*expected[row], IMAGES[0])
    with pytest.raises(InputError, match="has no row 3"):
        shard.read(3, 0)
    shard.close()


def test_a_table_is_not_held_in_memory(tmp_path: Path) -> None:
    (tmp_path / "0.jpg").write_bytes(IMAGES[0])
    path = tmp_path / "pairs.csv"
    path.write_text("filepath,caption\n" + "".join(f"0.jpg,a caption that has number {i}\n" for i in range(20_000)))
    shard = open_shard(str(path))
    tracemalloc.start()
    assert shard.read(12_345, 0).caption == "a caption that has number 12345"
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 20_000 * 20
    shard.close()


def test_a_table_without_its_columns_says_so(tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    path.write_text("link\twords\n")
    with pytest.raises(InputError, match=r"pairs\.csv has no column caption and no column filepath"):
        open_shard(str(path)).index()
    path.write_text("filepath,caption\n")
    with pytest.raises(InputError, match="has no rows"):
        open_shard(str(path)).index()


def test_a_remote_table_finds_its_images(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe("/table/pairs.csv", b"filepath,caption\na/0.jpg,zero\nmemory://table/b.jpg,one\n")
    memory.pipe("/table/a/0.jpg", IMAGES[0])
    memory.pipe("/table/b.jpg", IMAGES[1])
    assert [s.image for s in read_all("memory://table/pairs.csv")] == IMAGES[:2]


def test_parquet_whose_structs_name_files_reads_them(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for i in (0, 1):
        (tmp_path / "images" / f"{i}.jpg").write_bytes(IMAGES[i])
    fsspec.filesystem("memory").pipe("/named/2.jpg", IMAGES[2])
    paths = ["images/0.jpg", str(tmp_path / "images" / "1.jpg"), "memory://named/2.jpg", "images/9.jpg", None]
    images = pa.array(
        [{"bytes": None, "path": path} for path in paths], pa.struct({"bytes": "binary", "path": "string"})
    )
    pq.write_table(pa.table({"image": images, "text": list("abcde")}), tmp_path / "a.parquet")
    shard = open_shard(str(tmp_path / "a.parquet"))
    assert [entry.error for entry in shard.index()] == [""] * 5
    assert [shard.read(row, 0).image for row in (0, 1, 2, 4)] == [*IMAGES[:3], None]
    with pytest.raises(BadSample, match=r"a\.parquet: 000000003: missing image file: .*images/9\.jpg"):
        shard.read(3, 0)


def test_parquet_with_lists_of_captions_means_what_a_tar_does(tmp_path: Path) -> None:
    lists = [["one", "two"], ["", "three"], [], None, ["four", "four"]]
    for column in ("captions", "caption"):
        table = pa.table({"image": pa.array(IMAGES, pa.binary()), column: pa.array(lists, pa.list_(pa.string()))})
        pq.write_table(table, tmp_path / f"{column}.parquet")
        samples = read_all(str(tmp_path / f"{column}.parquet"))
        assert [s.caption for s in samples] == ["one", "three", None, None, "four"]
        assert [s.captions for s in samples] == [["one", "two"], ["three"], [], [], ["four"]]


@pytest.mark.parametrize(
    ("header", "flags"),
    [
        ("filepath,caption", {}),
        ("title\tfilepath", {}),
        ("Image;Title", {}),
        ("image_path|id|text", {}),
        ("caption\turl", {}),
        ("photo;alt", {"csv_img_key": "photo", "csv_caption_key": "alt"}),
        ("photo#caption", {"csv_img_key": "photo", "csv_separator": "#"}),
        ("filepath\tcaption,title", {"csv_separator": "\\t", "csv_caption_key": "caption,title"}),
    ],
)
def test_columns_and_separator_by_guess_and_by_flag(tmp_path: Path, header: str, flags: dict[str, str]) -> None:
    (tmp_path / "0.jpg").write_bytes(IMAGES[0])
    columns = CsvColumns(**flags)
    separator = "\t" if flags.get("csv_separator") == "\\t" else next(c for c in "\t;|#," if c in header)
    image_names = {"filepath", "Image", "image_path", "url", "photo"}
    row = separator.join("0.jpg" if name in image_names else f"a {name}" for name in header.split(separator))
    (tmp_path / "pairs.csv").write_text(f"{header}\n{row}\n")
    shard = open_shard(str(tmp_path / "pairs.csv"), columns)
    (entry,) = shard.index()
    sample = shard.read(entry.offset, 0)
    assert (sample.key, sample.image) == ("0.jpg", IMAGES[0])
    assert sample.caption == f"a {flags.get('csv_caption_key') or re.search('caption|Title|title|text', header)[0]}"  # type: ignore[index]


def test_wrong_columns_by_flag_are_named(tmp_path: Path) -> None:
    (tmp_path / "pairs.csv").write_text("photo,words\n0.jpg,a\n")
    with pytest.raises(InputError, match=r"has no column foto; .*Did you mean 'photo'\?.*--csv-img-key"):
        open_shard(str(tmp_path / "pairs.csv"), CsvColumns(csv_img_key="foto", csv_caption_key="words")).index()
    with pytest.raises(InputError, match=r"csv_separator is '::'; it must be one character"):
        CsvColumns(csv_separator="::")


def test_addresses_in_a_table_are_to_be_fetched_first(tmp_path: Path) -> None:
    (tmp_path / "cc3m.tsv").write_text("caption\turl\na\thttps://example.org/0.jpg\n")
    with pytest.raises(
        InputError, match=r"web addresses .*img2dataset .*--input_format tsv --url_col url --caption_col"
    ):
        open_shard(str(tmp_path / "cc3m.tsv")).index()


@pytest.mark.parametrize("place", ["first", "last"])
@pytest.mark.parametrize("later", ["", 'said "so"', '5 inch"'])
def test_a_stray_quote_spoils_its_own_row_alone(tmp_path: Path, place: str, later: str) -> None:
    """A caption that begins with a quote, and another later on that ends the quoted text legally or not, or never."""
    (tmp_path / "0.jpg").write_bytes(IMAGES[0])
    rows = [f"caption number {i}" for i in range(1000)]
    rows[10] = '"hello'
    rows[900] = later or rows[900]
    lines = [f"0.jpg,{row}" if place == "last" else f"{row},0.jpg" for row in rows]
    (tmp_path / "pairs.csv").write_text(
        "filepath,caption\n" * (place == "last") + "caption,filepath\n" * (place != "last")
    )
    with (tmp_path / "pairs.csv").open("a") as file:
        file.write("\n".join(lines) + "\n")
    shard = open_shard(str(tmp_path / "pairs.csv"))
    entries = shard.index()
    assert len(entries) == 1000
    assert [(i, entry.error) for i, entry in enumerate(entries) if entry.error] == [(10, "unclosed quote")]
    for row in (0, 9, 11, 900, 999):
        assert shard.read(row, 0).caption == rows[row]
    with pytest.raises(BadSample, match="row 10: unclosed quote"):
        shard.read(10, 0)


def test_captions_of_several_lines_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "pairs.csv").write_text('caption,filepath\n"two\nlines",0.jpg\none,1.jpg\n')
    assert [entry.key for entry in open_shard(str(tmp_path / "pairs.csv")).index()] == ["0.jpg", "1.jpg"]
    assert "of 2 rows, the longest has 2 lines" in capsys.readouterr().err


@pytest.mark.parametrize(
    "path", ["a\0b.jpg", "x" * 300 + ".jpg", ".", "pipe.jpg", "loop.jpg", "/dev/zero", "0.jpg/1.jpg"]
)
def test_a_path_that_cannot_be_read_condemns_its_own_row(tmp_path: Path, path: str) -> None:
    (tmp_path / "0.jpg").write_bytes(IMAGES[0])
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    (tmp_path / "pairs.csv").write_text(f"filepath,caption\n{path},a\n0.jpg,b\n")
    shard = open_shard(str(tmp_path / "pairs.csv"))
    shard.index()
    with pytest.raises(BadSample, match=r"row 0: (missing|unreadable) image file"):
        shard.read(0, 0)
    assert shard.read(1, 0).image == IMAGES[0]
