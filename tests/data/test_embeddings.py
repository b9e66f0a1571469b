from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from torch import Tensor

from distilclip import files
from distilclip.data.embeddings import MAX_OPEN_FILES, Embeddings
from distilclip.data.store import Rows, SourceFile, Store, finished_shard, write_manifest, write_shard
from distilclip.data.views import ViewEmbeddings, write_views
from distilclip.errors import InputError
from tests.data.conftest import TEACHER
from tests.data.test_views import store_with_views, unit

PairTars = Callable[..., list[str]]

ROWS, DIM = 3, 8


def written(folder: str, num_shards: int) -> Store:
    """A store in which row r of shard s has `angle(s, r)` as image and the opposite as text."""
    rows = Rows(
        key=["a", "b", "c"],
        offset=np.zeros(ROWS, np.uint64),
        size=np.zeros(ROWS, np.uint32),
        valid=np.ones(ROWS, bool),
        error=[""] * ROWS,
        image_sha256=np.zeros((ROWS, 32), np.uint8),
    )
    lines = []
    for shard in range(num_shards):
        image = np.stack([angle(shard, row) for row in range(ROWS)]).astype(np.float16)
        source = SourceFile(uri=f"{shard}.tar", num_bytes=1, sha256="s")
        write_shard(folder, shard, rows, image=image, text=-image, source=source, teacher=TEACHER)
        line = finished_shard(folder, shard)
        assert line is not None
        lines.append(line)
    write_manifest(folder, lines, dim=DIM, teacher=TEACHER)
    return Store.open(folder)


def read(
    embeddings: Embeddings,
    shard: np.ndarray,
    row: np.ndarray,
    view: np.ndarray | None = None,
    caption: np.ndarray | None = None,
) -> tuple[Tensor, Tensor]:
    """The image and the text embeddings of the same rows."""
    return embeddings.images(shard, row, view), embeddings.texts(shard, row, caption)


def angle(shard: int, row: int) -> np.ndarray:
    """A unit vector that differs for every shard and row."""
    x = np.zeros(DIM)
    x[:3] = np.cos(shard / 100), np.sin(shard / 100) * np.cos(row), np.sin(shard / 100) * np.sin(row)
    return x


def test_rows_of_more_shards_than_stay_open_in_any_order(tmp_path: Path) -> None:
    store = written(str(tmp_path), 3 * MAX_OPEN_FILES)
    shard = np.random.default_rng(0).permutation(np.repeat(np.arange(3 * MAX_OPEN_FILES, dtype=np.uint32), 2))
    row = np.random.default_rng(1).integers(0, ROWS, len(shard)).astype(np.uint32)
    opened = Embeddings(store)
    for embeddings in (opened, pickle.loads(pickle.dumps(opened))):
        image, text = read(embeddings, shard, row)
        expected = np.stack([angle(s, r) for s, r in zip(shard.tolist(), row.tolist(), strict=True)])
        np.testing.assert_allclose(image.numpy(), expected, atol=1e-3)
        assert (text == -image).all()


def test_a_store_of_more_shards_than_a_process_may_open_files(tmp_path: Path) -> None:
    written(str(tmp_path), 150)
    program = """
import resource, sys
import numpy as np
from distilclip.data.embeddings import Embeddings
from distilclip.data.store import Store
resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))
embeddings, shard = Embeddings(Store.open(sys.argv[1])), np.arange(150, dtype=np.uint32)
for row in range(3):
    image = embeddings.images(shard, np.full(150, row, np.uint32))
    print(float(image[100, 0]))
"""
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [round(float(value), 2) for value in done.stdout.split()] == [round(float(np.cos(1.0)), 2)] * 3


def test_of_a_remote_store_only_headers_and_rows_are_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    store = written("memory://embeddings/few", 2)
    path = store.payload_path(1)
    fetched: list[tuple[str, int]] = []
    read_range = files.read_range

    def counted(path: str, offset: int, length: int) -> bytes:
        fetched.append((path, length))
        return read_range(path, offset, length)

    monkeypatch.setattr(files, "read_range", counted)
    monkeypatch.setattr(files, "read_bytes", lambda path: pytest.fail(f"{path} is read whole"))
    embeddings, shard, row = Embeddings(store), np.ones(2, np.uint32), np.array([0, 2], np.uint32)
    for _ in range(2):
        image, _ = read(embeddings, shard, row)
        np.testing.assert_allclose(image.numpy(), [angle(1, 0), angle(1, 2)], atol=1e-3)
    row_bytes = DIM * 2
    assert sorted(fetched) == sorted([(path, 4096)] + [(path, row_bytes)] * 2 * 2 * 2)


def test_missing_cut_and_foreign_payloads_are_named(tmp_path: Path) -> None:
    store = written(str(tmp_path / "a"), 2)
    one, zero = np.ones(1, np.uint32), np.zeros(1, np.uint32)
    payload = Path(store.payload_path(1))
    content = payload.read_bytes()
    payload.write_bytes(content[: -DIM * 2])
    read(Embeddings(store), one, zero)
    with pytest.raises(InputError, match=r"000001\.safetensors is cut.*Embed the data again"):
        read(Embeddings(store), one, one + one)
    payload.write_bytes(content.replace(b'"teacher_digest":"1"', b'"teacher_digest":"2"'))
    with pytest.raises(InputError, match=r"000001\.safetensors was embedded by teacher tiny \(2\)"):
        read(Embeddings(store), one, zero)
    payload.unlink()
    with pytest.raises(InputError, match=r"missing.*000001\.safetensors.*Embed the data again"):
        read(Embeddings(store), one, zero)


def test_captions_that_a_file_of_views_promises_but_lacks_are_an_error(tmp_path: Path, pair_tars: PairTars) -> None:
    store = store_with_views(tmp_path, pair_tars(shards=1, rows=4), num_captions=3)
    views = store.view_embeddings(0)
    write_views(
        str(tmp_path), 0, ViewEmbeddings(views.image, views.text[:-1], views.text_first), {"teacher_digest": "1"}
    )
    embeddings, zero, last = Embeddings(store), np.zeros(1, np.uint32), np.array([3], np.uint32)
    read(embeddings, zero, last, np.zeros(1, np.int64), np.ones(1, np.int64))
    with pytest.raises(InputError, match=r"views/000000\.safetensors has 7 rows of text, not a row 7"):
        read(embeddings, zero, last, np.zeros(1, np.int64), np.full(1, 2))
    with pytest.raises(InputError, match="does not belong to the store"):
        store.view_embeddings(0)


def test_each_view_and_caption_has_its_own_embedding(tmp_path: Path, pair_tars: PairTars) -> None:
    store = store_with_views(tmp_path / "store", pair_tars(shards=2, rows=4), num_captions=3)
    embeddings = Embeddings(store)
    shard, row = np.array([1, 0, 1], np.uint32), np.array([3, 2, 0], np.uint32)
    assert embeddings.num_captions(shard, row).tolist() == [3, 3, 3]
    image, text = read(embeddings, shard, row, np.array([2, 0, 1]), np.array([0, 1, 2]))
    assert np.array_equal(image.numpy(), np.stack([unit(seed=seed) for seed in (1032, 20, 1001)]).astype(np.float32))
    others = unit(8, seed=5).astype(np.float32)  # two a row
    expected = [store.text(1)[3].astype(np.float32), others[2 * 2], others[2 * 0 + 1]]
    assert np.array_equal(text.numpy(), np.stack(expected))
