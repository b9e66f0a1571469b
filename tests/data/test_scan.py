from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from distilclip.csv_rows import CsvColumns
from distilclip.data import scan as scanning
from distilclip.data.scan import ScannedBatch, ShardList, scan
from distilclip.data.shards import Shard
from tests.data.conftest import tokenize
from tests.data.test_views import VIEWS

PairTars = Callable[..., list[str]]


def preprocess(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.asarray(image.resize((4, 4))).transpose(2, 0, 1).copy())


def scanned(uris: list[str], batch_size: int = 2) -> Iterator[ScannedBatch]:
    return scan(
        ShardList(shards=list(enumerate(uris))),
        preprocess=preprocess,
        tokenize=tokenize,
        batch_size=batch_size,
        num_workers=0,
        views=VIEWS,
        view_size=4,
    )


def remote(name: str, paths: list[str]) -> list[str]:
    uris = []
    for number, path in enumerate(paths):
        uris.append(f"memory://{name}/{number}.tar")
        fsspec.filesystem("memory").put(path, uris[-1])
    return uris


def test_every_tensor_of_a_batch_is_pinned(pair_tars: PairTars, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = scanning._Decoder(preprocess, tokenize, 10**6, VIEWS, 4)
    entries = scanning.open_shard(pair_tars(shards=1, rows=3)[0]).index()
    decoded = decoder[
        scanning._Task(shard=0, path=pair_tars(shards=1, rows=3)[0], first=0, entries=entries, may_lack=())
    ]
    assert isinstance(decoded, scanning._DecodedBatch)
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: tensor + 1)  # there is no page-locked memory without a GPU
    pinned = decoded.pin_memory()
    named = {name for name, kind in ScannedBatch.__annotations__.items() if "Tensor" in kind}
    assert named == {"pixels", "tokens", "view_pixels", "other_tokens"}
    for name in named:
        assert torch.equal(pinned.fields[name], decoded.fields[name] + 1)
    assert pinned.task == decoded.task
    assert set(pinned.fields) == set(decoded.fields)


def test_the_next_shard_is_indexed_while_one_is_decoded(pair_tars: PairTars, monkeypatch: pytest.MonkeyPatch) -> None:
    uris = pair_tars(shards=4, rows=4)
    begun: list[str] = []
    open_shard = scanning.open_shard

    def recorded(uri: str, columns: CsvColumns | None) -> Shard:
        begun.append(uri)
        return open_shard(uri, columns)

    monkeypatch.setattr(scanning, "open_shard", recorded)
    with contextlib.closing(scanned(uris)) as batches:
        next(batches)
        until = time.monotonic() + 30
        while len(begun) < 2 and time.monotonic() < until:
            time.sleep(0.01)
        assert begun == uris[:2]
        assert [(batch.source.uri, batch.first) for batch in batches] == [
            (uri, first) for uri in uris for first in (0, 2)
        ][1:]


def test_no_download_outlives_a_scan(pair_tars: PairTars, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "downloads").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "downloads"))
    uris = remote("scan", pair_tars(shards=3, rows=4))
    with contextlib.closing(scanned(uris)) as batches:
        next(batches)
        assert any((tmp_path / "downloads").iterdir())
    assert not any((tmp_path / "downloads").iterdir())
    assert [len(batch.errors) for batch in scanned(uris, batch_size=3)] == [3, 1] * 3
    assert not any((tmp_path / "downloads").iterdir())
