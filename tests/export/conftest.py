"""Tars as img2dataset and others write them, a store over them, groups beside it, and an exported model."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from distilclip import files, stage_folder
from distilclip.data.shards import open_shard
from distilclip.data.side_files import Groups, write_groups
from distilclip.data.store import Rows, SourceFile, Store, finished_shard, sample_id, write_manifest, write_shard
from distilclip.models.clip import Clip, load_clip
from tests.conftest import encoded, picture

TEACHER = {"name": "tiny", "digest": "1", "preprocessing": "p", "tokenizer": "t", "precision": "fp32", "scale": 10.0}
DIM = 4
DROPPED = (0, 3)  # rows that the groups of every shard leave out
INVALID = 2


def write_tar(path: Path, names: Sequence[str], *, first: int, format: int = tarfile.PAX_FORMAT) -> str:
    """A tar of samples jpg, json, txt and a member of another kind, with owners and times; the third has no picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for row, name in enumerate(names):
            number = first + row
            meta = {"uid": f"{number * 7919 % 2**61:032x}", "url": f"somewhere/{number}.jpg", "width": 40}
            members = {
                "jpg": encoded(picture(number)),
                "json": json.dumps(meta).encode(),
                "txt": f"picture number {number}".encode(),
                "depth.npy": bytes([row]) * (100 + row),
            }
            if row == INVALID:
                del members["jpg"]
            for extension, content in members.items():
                info = tarfile.TarInfo(f"{name}.{extension}")
                info.size, info.mtime, info.uname, info.mode = len(content), 1_600_000_000 + row, "someone", 0o640
                tar.addfile(info, io.BytesIO(content))
    return str(path)


def write_store(folder: str, uris: Sequence[str]) -> Store:
    """A finished store of shards, with the digests of their pictures and random embeddings."""
    random = np.random.default_rng(0)
    lines = []
    for shard, uri in enumerate(uris):
        opened = open_shard(uri)
        entries = opened.index()
        valid = np.array([not entry.error for entry in entries])
        digests = np.zeros((len(entries), 32), np.uint8)
        for row, entry in enumerate(entries):
            image = None if entry.error else opened.read(entry.offset, entry.size).image
            if image is not None:
                digests[row] = np.frombuffer(hashlib.sha256(image).digest(), np.uint8)
        opened.close()
        image, text = random.standard_normal((2, len(entries), DIM))
        image, text = (x / np.linalg.norm(x, axis=1, keepdims=True) * valid[:, None] for x in (image, text))
        rows = Rows(
            key=[entry.key for entry in entries],
            offset=np.array([entry.offset for entry in entries], np.uint64),
            size=np.array([entry.size for entry in entries], np.uint32),
            valid=valid,
            error=[entry.error for entry in entries],
            image_sha256=digests,
        )
        write_shard(
            folder,
            shard,
            rows,
            image=image.astype(np.float16),
            text=text.astype(np.float16),
            source=SourceFile(uri=uri, num_bytes=files.size(uri), sha256="s", truncated=False),
            teacher=TEACHER,
        )
        line = finished_shard(folder, shard)
        assert line is not None
        lines.append(line)
    write_manifest(folder, lines, dim=DIM, teacher=TEACHER)
    for name in ("config.json", "result.json"):
        stage_folder.write_json(files.join(folder, name), {"stage": "embed"})
    return Store.open(folder)


def write_balance(folder: str, store: Store, *, dropped: Sequence[int] = DROPPED, none_of: int | None = None) -> None:
    """A finished balance folder that leaves out some rows of every shard, and all rows of the shard `none_of`."""
    for shard in range(store.num_shards):
        valid = np.flatnonzero(store.rows(shard).valid).astype(np.uint32)
        keep = np.array([row not in dropped for row in valid]) & (shard != none_of)
        ids = sample_id(shard, valid)
        write_groups(folder, shard, Groups(valid, ids, ids, np.zeros(len(valid), np.float32), keep))
    for name in ("config.json", "result.json"):
        stage_folder.write_json(files.join(folder, name), {"stage": "balance"})
    stage_folder.write_json(files.join(folder, "inputs.json"), {"embed": stage_folder.result_digest(store.path)})


@dataclass(frozen=True)
class Made:
    """Three tars of seven samples, their store and groups; the second tar repeats the keys of the first."""

    tars: list[str]
    store: str
    groups: str

    @property
    def kept(self) -> list[tuple[int, int]]:
        """Shard and row of what the groups keep, in order."""
        return [(shard, row) for shard in range(3) for row in range(7) if row not in (*DROPPED, INVALID)]


def make(folder: Path) -> Made:
    """Tars in three formats, two of them with the same keys, and the folders over them."""
    starts, formats = (0, 0, 100), (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT)
    tars = [
        write_tar(
            folder / "data" / f"{shard}.tar",
            [f"{starts[shard] + row:05d}" for row in range(7)],
            first=100 * shard,
            format=formats[shard],
        )
        for shard in range(3)
    ]
    store = write_store(str(folder / "store"), tars)
    write_balance(str(folder / "groups"), store)
    return Made(tars, store.path, str(folder / "groups"))


@pytest.fixture
def made(tmp_path: Path) -> Made:
    """See `make`."""
    return make(tmp_path)


@pytest.fixture(scope="session")
def tiny_clip(tiny_clip_folder: str) -> Clip:
    """A two-layer CLIP with random weights."""
    return load_clip(tiny_clip_folder)


@pytest.fixture(scope="session")
def onnx_folder(tiny_clip: Clip, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The two-layer CLIP as ONNX. Exporting takes seconds: nobody writes into it."""
    pytest.importorskip("onnxruntime")
    from distilclip.export.onnx_files import write_onnx

    folder = str(tmp_path_factory.mktemp("onnx") / "model")
    write_onnx(tiny_clip, folder)
    return folder
