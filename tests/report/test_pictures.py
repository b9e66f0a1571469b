from __future__ import annotations

import base64
import io
from pathlib import Path

import pytest
from PIL import Image

from distilclip.data.store import Store, sample_id
from distilclip.report.pictures import PictureReader, thumbnail
from tests.conftest import picture
from tests.report.made_run import NASTY, write_embed, write_pairs


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(str(write_embed(tmp_path / "embed", write_pairs(tmp_path / "pairs"), teacher="t")))


def test_a_sample_is_read_by_its_offset(store: Store) -> None:
    reader = PictureReader(store, size=48)
    found = reader.picture(int(sample_id(1, 5)))
    assert (found.key, found.caption, found.problem) == ("00005", "picture 5 of shard 1", "")
    assert (found.width, found.height) == (48, 32)
    assert reader.picture(int(sample_id(0, 0))).caption == NASTY
    reader.close()


def test_the_thumbnail_is_the_picture_made_smaller_never_larger() -> None:
    image = picture(3, size=(96, 64))
    uri, size = thumbnail(image, 48)
    decoded = Image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/jpeg;base64,"))))
    assert decoded.size == size == (48, 32)
    assert thumbnail(image, 500)[1] == (96, 64)


def test_a_damaged_picture_is_told_not_raised(store: Store) -> None:
    reader = PictureReader(store, size=48)
    found = reader.picture(int(sample_id(0, 3)))
    reader.close()
    assert found.image == ""
    assert "row 3" in found.problem


def test_a_moved_tar_is_told_not_raised(store: Store) -> None:
    Path(store.shards[1].uri).rename(Path(store.shards[1].uri).with_suffix(".moved"))
    found = PictureReader(store, size=48).picture(int(sample_id(1, 1)))
    assert found.image == ""
    assert "00001.tar" in found.problem
