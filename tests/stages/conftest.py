"""A small finished store with known copies, and what a stage's folder holds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from distilclip.data.store import Rows, SourceFile, finished_shard, write_manifest, write_shard

TEACHER = {"name": "tiny", "digest": "d", "preprocessing": "p", "tokenizer": "t", "precision": "fp32", "scale": 100.0}


def write_store(
    folder: Path,
    *,
    rows: int = 40,
    shards: int = 3,
    dim: int = 16,
    same_file: Sequence[tuple[int, int]] = (),
    text_noise: float = 0.0,
    images: np.ndarray | None = None,
    folders: Sequence[str] = (),
) -> tuple[str, np.ndarray, np.ndarray]:
    """A finished store of images of which a third are near-copies across shards; its rows, and which are valid.

    Of each pair in `same_file`, the second row's image file is that of the first. Texts are the images with noise.
    With `images`, these are its rows, all valid. `folders` are those that the shards lie in.
    """
    random = np.random.default_rng(0)
    n = rows * shards
    x = random.standard_normal((n, dim))
    source, copied = random.integers(0, n // 2, n), random.random(n) < 0.35
    x[copied] = x[source[copied]] + 0.05 * random.standard_normal((copied.sum(), dim))
    x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float16)
    valid = random.random(n) < 0.9
    x[~valid] = 0
    if images is not None:
        x, valid = images.astype(np.float16), np.ones(n, bool)
    digests = random.integers(1, 255, (n, 32)).astype(np.uint8)
    for first, second in same_file:
        digests[second] = digests[first]
    text = x if text_noise == 0 else x + text_noise * random.standard_normal(x.shape) * random.random((n, 1))
    text = (text / np.maximum(np.linalg.norm(text, axis=1, keepdims=True), 1e-6)).astype(np.float16)
    text[~valid] = 0
    lines = []
    for shard in range(shards):
        here = slice(shard * rows, (shard + 1) * rows)
        table = Rows(
            key=[f"{i:05d}" for i in range(rows)],
            offset=np.arange(rows, dtype=np.uint64),
            size=np.ones(rows, np.uint32),
            valid=valid[here],
            error=["" if ok else "no image" for ok in valid[here]],
            image_sha256=digests[here],
        )
        write_shard(
            str(folder),
            shard,
            table,
            image=x[here],
            text=text[here],
            source=SourceFile(
                uri=f"{folders[shard]}/{shard}.tar" if folders else f"{shard}.tar",
                num_bytes=1,
                sha256="s",
                truncated=False,
            ),
            teacher=TEACHER,
        )
        line = finished_shard(str(folder), shard)
        assert line is not None
        lines.append(line)
    write_manifest(str(folder), lines, dim=dim, teacher=TEACHER)
    (folder / "config.json").write_text(json.dumps({"stage": "embed"}))
    (folder / "result.json").write_text(json.dumps({"stage": "embed"}))
    return str(folder), x, valid


def contents(folder: Path) -> dict[str, bytes]:
    """Every file that says what was found; config.json and env.json say how it was asked."""
    files = {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
    return {name: content for name, content in files.items() if name not in ("config.json", "env.json")}
