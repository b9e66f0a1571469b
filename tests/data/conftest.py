"""A store over tiny tars, with groups and clusters beside it, made without a model."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from distilclip import files
from distilclip.data.shards import open_shard
from distilclip.data.side_files import Groups, Labels, write_groups, write_labels
from distilclip.data.store import Rows, SourceFile, Store, finished_shard, sample_id, write_manifest, write_shard
from distilclip.data.views import Views

TEACHER = {"name": "tiny", "digest": "1", "preprocessing": "p", "tokenizer": "t", "precision": "fp32", "scale": 10.0}
DIM = 4


def tokenize(captions: list[str]) -> Tensor:
    """Two tokens: the length of a caption and its last character."""
    return torch.tensor([[len(caption), ord(caption[-1])] for caption in captions])


def embedding(key: str) -> np.ndarray:
    """A unit vector that is a function of the key."""
    x = np.random.default_rng(int(key)).standard_normal(DIM)
    return (x / np.linalg.norm(x)).astype(np.float16)


def write_store(folder: str, uris: Sequence[str], *, invalid: Sequence[int] = (), views: Views | None = None) -> Store:
    """A store of the tars in which the rows `invalid` of every shard are unusable."""
    lines = []
    for shard, uri in enumerate(uris):
        opened = open_shard(uri)
        entries = opened.index()
        pictures = [opened.read(entry.offset, entry.size).image or b"" for entry in entries]
        digests = [list(hashlib.sha256(picture).digest()) for picture in pictures]
        valid = np.array([row not in invalid for row in range(len(entries))])
        image = np.stack([embedding(entry.key) for entry in entries]) * valid[:, None].astype(np.float16)
        write_shard(
            folder,
            shard,
            Rows(
                key=[entry.key for entry in entries],
                offset=np.array([entry.offset for entry in entries], np.uint64),
                size=np.array([entry.size for entry in entries], np.uint32),
                valid=valid,
                error=["" if ok else "no caption" for ok in valid],
                image_sha256=np.array(digests, np.uint8),
            ),
            image=image,
            text=-image,
            source=SourceFile(uri=uri, num_bytes=files.size(uri), sha256="s", truncated=False),
            teacher=TEACHER,
        )
        line = finished_shard(folder, shard)
        assert line is not None
        lines.append(line)
    write_manifest(folder, lines, dim=DIM, teacher=TEACHER, views=views)
    return Store.open(folder)


def write_sides(store: Store, groups: str, clusters: str) -> None:
    """Groups that keep every valid row but the first of each shard; clusters numbered by the row's key."""
    for shard in range(store.num_shards):
        rows = store.rows(shard)
        valid = np.flatnonzero(rows.valid).astype(np.uint32)
        ids = sample_id(shard, valid)
        keep = np.arange(len(valid)) > 0
        write_groups(groups, shard, Groups(valid, ids, ids, np.zeros(len(valid), np.float32), keep))
        cluster = np.array([int(rows.key[row]) for row in valid[keep]], np.uint32)
        write_labels(clusters, shard, Labels(valid[keep], cluster, np.zeros(len(cluster), np.float32)))


@pytest.fixture
def joined(tmp_path: Path, pair_tars: Callable[..., list[str]]) -> dict[str, str]:
    """Folders `store`, `groups` and `clusters` over three tars of seven rows, of which row 2 is unusable."""
    folders = {name: str(tmp_path / name) for name in ("store", "groups", "clusters")}
    store = write_store(folders["store"], pair_tars(shards=3, rows=7), invalid=[2])
    write_sides(store, folders["groups"], folders["clusters"])
    return folders
