from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors import safe_open

from distilclip import files
from distilclip.data.store import (
    Rows,
    SourceFile,
    Store,
    finished_shard,
    sample_id,
    split_id,
    write_manifest,
    write_shard,
)
from distilclip.errors import InputError

TEACHER = {
    "name": "tiny",
    "digest": "1234",
    "preprocessing": '{"size": [32, 32]}',
    "tokenizer": "SimpleTokenizer, context 12",
    "precision": "fp32",
    "scale": 14.25,
}


def unit(rows: int, seed: int) -> np.ndarray:
    x = np.random.default_rng(seed).standard_normal((rows, 8))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float16)


def rows_of(shard: int, num: int = 3) -> Rows:
    return Rows(
        key=[f"{shard}/{row} ключ" for row in range(num)],
        offset=np.arange(num, dtype=np.uint64) * 2**33,
        size=np.full(num, 2**32 - 1, np.uint32),
        valid=np.arange(num) != 1,
        error=["", "no caption", ""][:num],
        image_sha256=np.repeat(np.array([[7], [0], [9]], np.uint8), 32, axis=1)[:num],
    )


def write_store(folder: str, *, shards: int = 2, teacher: dict[str, Any] = TEACHER) -> Store:
    for shard in range(shards):
        image, text = unit(3, shard), unit(3, shard + 10)
        image[1] = text[1] = 0
        write_shard(
            folder,
            shard,
            rows_of(shard),
            image=image,
            text=text,
            source=SourceFile(uri=f"{shard}.tar", num_bytes=100 + shard, sha256="s", truncated=shard == 1),
            teacher=teacher,
        )
    lines = [line for shard in range(shards) if (line := finished_shard(folder, shard)) is not None]
    write_manifest(folder, lines, dim=8, teacher=teacher)
    return Store.open(folder)


def test_ids_name_shard_and_row() -> None:
    assert sample_id(3, 5) == 3 * 2**32 + 5
    assert split_id(sample_id(2**31, 2**32 - 1)) == (2**31, 2**32 - 1)
    shard, row = np.array([0, 1, 2**31], np.uint32), np.array([9, 2**32 - 1, 0], np.uint32)
    back = split_id(sample_id(shard, row))
    assert np.array_equal(back[0], shard)
    assert np.array_equal(back[1], row)
    assert sample_id(1, row).tolist() == [2**32 + 9, 2**33 - 1, 2**32]


@pytest.mark.parametrize("remote", [False, True])
def test_round_trip(tmp_path: Path, remote: bool) -> None:
    store = write_store("memory://stores/round" if remote else str(tmp_path))
    assert (store.num_shards, store.num_rows, store.dim) == (2, 6, 8)
    assert store.teacher == TEACHER
    assert [(s.index, s.uri, s.num_bytes, s.status) for s in store.shards] == [
        (0, "0.tar", 100, "complete"),
        (1, "1.tar", 101, "truncated"),
    ]
    rows, expected = store.rows(1), rows_of(1)
    for name, value in vars(expected).items():
        assert np.array_equal(getattr(rows, name), value), name
    assert np.array_equal(store.image(1)[[0, 2]], unit(3, 1)[[0, 2]])
    assert np.array_equal(store.text(1)[[0, 2]], unit(3, 11)[[0, 2]])
    assert not store.image(1)[1].any()
    store.verify()


def test_columns_of_a_row_table_are_read_alone(tmp_path: Path) -> None:
    store = write_store(str(tmp_path))
    table = store.columns(1, "valid", "key")
    assert table.column_names == ["valid", "key"]
    assert table["key"].to_pylist() == ["1/0 ключ", "1/1 ключ", "1/2 ключ"]
    assert table["valid"].to_pylist() == [True, False, True]
    write_shard(
        str(tmp_path),
        0,
        rows_of(0, num=2),
        image=unit(2, 0),
        text=unit(2, 0),
        source=SourceFile(uri="0.tar", num_bytes=100, sha256="s", truncated=False),
        teacher=TEACHER,
    )
    for read in (store.rows, lambda shard: store.columns(shard, "valid")):
        with pytest.raises(InputError, match=r"000000\.rows\.parquet has 2 rows, the manifest says 3"):
            read(0)


def test_writing_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_store(str(tmp_path / name))
    first = {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()}
    second = {p.name: p.read_bytes() for p in (tmp_path / "b").iterdir()}
    assert len(first) == 5
    assert first == second


def test_the_payload_says_what_it_is(tmp_path: Path) -> None:
    write_store(str(tmp_path))
    with safe_open(str(tmp_path / "000001.safetensors"), "np") as file:
        assert file.metadata() == {
            "format": "1",
            "uri": "1.tar",
            "tar_digest": "s",
            **{f"teacher_{name}": str(value) for name, value in TEACHER.items()},
        }
        assert file.get_tensor("image").dtype == np.float16


def test_an_unfinished_store_names_the_stage(tmp_path: Path) -> None:
    write_store(str(tmp_path))
    (tmp_path / "manifest.parquet").unlink()
    with pytest.raises(InputError, match=r"no finished store.*distilclip embed"):
        Store.open(str(tmp_path))


def test_a_shard_counts_as_finished_only_with_its_rows(tmp_path: Path) -> None:
    write_store(str(tmp_path))
    (tmp_path / "000001.rows.parquet").unlink()
    assert finished_shard(str(tmp_path), 1) is None
    line = finished_shard(str(tmp_path), 0)
    assert line is not None
    assert line.num_rows == 3
    assert line.sha256 == files.sha256(str(tmp_path / "000000.safetensors"))


def test_an_unknown_format_version_is_refused(tmp_path: Path) -> None:
    store = write_store(str(tmp_path))
    payload = tmp_path / "000000.safetensors"
    payload.write_bytes(payload.read_bytes().replace(b'"format":"1"', b'"format":"9"'))
    with pytest.raises(InputError, match=r"000000\.safetensors has format version 9; this distilclip reads version 1"):
        store.image(0)
    manifest = tmp_path / "manifest.parquet"
    pq.write_table(pq.read_table(manifest).replace_schema_metadata({"distilclip.format": "9"}), manifest)
    with pytest.raises(InputError, match=r"manifest\.parquet has format version 9; this distilclip reads version 1"):
        Store.open(str(tmp_path))
    pq.write_table(pa.table({"a": [1]}), manifest)
    with pytest.raises(InputError, match="has format version none"):
        Store.open(str(tmp_path))


def test_a_shard_by_another_teacher_is_refused(tmp_path: Path) -> None:
    store = write_store(str(tmp_path / "a"))
    write_store(str(tmp_path / "b"), teacher={**TEACHER, "name": "other", "digest": "9999"})
    (tmp_path / "a" / "000001.safetensors").write_bytes((tmp_path / "b" / "000001.safetensors").read_bytes())
    with pytest.raises(InputError, match=r"embedded by teacher other \(9999\), the rest of the store by tiny \(1234\)"):
        store.image(1)


def test_verify_finds_changed_bytes_and_changed_keys(tmp_path: Path) -> None:
    store = write_store(str(tmp_path))
    payload = tmp_path / "000000.safetensors"
    whole = payload.read_bytes()
    payload.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(InputError, match=r"000000\.safetensors is not the file that was written"):
        store.verify()
    payload.write_bytes(whole)
    store.verify()
    rows = (tmp_path / "000001.rows.parquet").read_bytes()
    (tmp_path / "000000.rows.parquet").write_bytes(rows)
    with pytest.raises(InputError, match=r"000000\.rows\.parquet: the keys were changed"):
        store.verify()


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0])
def test_verify_finds_embeddings_that_are_no_unit_vectors(tmp_path: Path, value: float) -> None:
    image = unit(3, 0)
    image[2] = value
    write_shard(
        str(tmp_path),
        0,
        rows_of(0),
        image=image,
        text=unit(3, 1),
        source=SourceFile(uri="0.tar", num_bytes=1, sha256="s", truncated=False),
        teacher=TEACHER,
    )
    line = finished_shard(str(tmp_path), 0)
    assert line is not None
    write_manifest(str(tmp_path), [line], dim=8, teacher=TEACHER)
    with pytest.raises(InputError, match=r"000000\.safetensors, image, row 2: not a finite unit vector"):
        Store.open(str(tmp_path)).verify()


def test_a_store_is_read_while_its_folder_is_read_only(tmp_path: Path) -> None:
    store = write_store(str(tmp_path))
    for path in tmp_path.iterdir():
        path.chmod(0o444)
    assert store.image(0).shape == (3, 8)
    with pytest.raises(ValueError, match="read-only"):
        store.image(0)[0, 0] = 1


def test_a_changed_payload_is_refused_with_and_without_its_quick_digest(tmp_path: Path) -> None:
    store = write_store(str(tmp_path))
    assert files.has_digest(store.payload_path(0), store.shards[0].xxh3 or "")
    manifest = tmp_path / "manifest.parquet"
    table = pq.read_table(manifest)
    payload = Path(store.payload_path(0))
    content = bytearray(payload.read_bytes())
    content[-1] ^= 1
    payload.write_bytes(content)
    with pytest.raises(InputError, match=r"000000\.safetensors .*digest differs; shard 0"):
        Store.open(str(tmp_path)).text(0)
    pq.write_table(table.drop_columns("xxh3"), manifest)  # as an older version wrote it
    older = Store.open(str(tmp_path))
    assert older.shards[0].xxh3 is None
    assert older.image(1).shape == (3, 8)
    with pytest.raises(InputError, match=r"000000\.safetensors .*digest differs; shard 0"):
        older.text(0)
