from __future__ import annotations

import tracemalloc
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

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
