"""Rows that have a picture only, or a caption only, in a store."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from distilclip.data.images import ImageMatrix
from distilclip.data.side_files import Groups, kept_images, write_groups
from distilclip.data.store import Rows, SourceFile, Store, finished_shard, sample_id, write_manifest, write_shard
from distilclip.errors import InputError

TEACHER = {"name": "t", "digest": "d", "preprocessing": "{}", "tokenizer": "k", "precision": "fp32", "scale": 10.0}
HAS_IMAGE, HAS_TEXT = np.array([1, 1, 0, 0], bool), np.array([1, 0, 1, 0], bool)


def write_store(folder: Path, has_image: np.ndarray = HAS_IMAGE, has_text: np.ndarray = HAS_TEXT) -> Store:
    rows = Rows(
        key=list("abcd"),
        offset=np.zeros(4, np.uint64),
        size=np.zeros(4, np.uint32),
        valid=has_image | has_text,
        error=["" if valid else "no image" for valid in has_image | has_text],
        image_sha256=np.zeros((4, 32), np.uint8),
        has_image=has_image,
        has_text=has_text,
    )
    image, text = (np.eye(4, dtype=np.float16) * has[:, None] for has in (has_image, has_text))
    source = SourceFile(uri="0.tar", num_bytes=1, sha256="s")
    write_shard(
        str(folder),
        0,
        rows,
        image=image.astype(np.float16),
        text=text.astype(np.float16),
        source=source,
        teacher=TEACHER,
    )
    line = finished_shard(str(folder), 0)
    assert line is not None
    write_manifest(str(folder), [line], dim=4, teacher=TEACHER)
    return Store.open(str(folder))


def test_a_row_says_what_it_has(tmp_path: Path) -> None:
    store = write_store(tmp_path)
    store.verify()
    rows = store.rows(0)
    assert rows.has_image.tolist() == HAS_IMAGE.tolist()
    assert rows.has_text.tolist() == HAS_TEXT.tolist()
    assert rows.valid.tolist() == [True, True, True, False]
    assert ImageMatrix(store).valid().tolist() == HAS_IMAGE.tolist()
    assert ImageMatrix(store).count_pictureless(stage="balance") == 1


def test_a_row_table_of_an_older_version_has_both_of_every_valid_row(tmp_path: Path) -> None:
    store = write_store(tmp_path, HAS_IMAGE, HAS_IMAGE)
    path = tmp_path / "000000.rows.parquet"
    pq.write_table(pq.read_table(path).drop_columns(["has_image", "has_text"]), path)
    assert store.rows(0).has_text.tolist() == HAS_IMAGE.tolist()
    table = store.columns(0, "has_text", "key")
    assert table.column_names == ["has_text", "key"]
    assert table["has_text"].to_pylist() == HAS_IMAGE.tolist()


def test_a_row_without_a_picture_is_kept_and_has_no_label(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store")
    row = np.arange(3, dtype=np.uint32)
    ids = sample_id(0, row)
    write_groups(str(tmp_path / "groups"), 0, Groups(row, ids, ids, np.zeros(3, np.float32), np.ones(3, bool)))
    assert kept_images(store, 0, str(tmp_path / "groups")).tolist() == HAS_IMAGE.tolist()


def test_a_store_without_pictures_cannot_be_balanced(tmp_path: Path) -> None:
    store = write_store(tmp_path, np.zeros(4, bool))
    with pytest.raises(InputError, match="no row has a picture, and balance compares pictures"):
        ImageMatrix(store).count_pictureless(stage="balance")
