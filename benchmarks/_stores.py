"""Write stores of made-up pairs: what the stages after `embed` read, without pictures or a teacher."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from distilclip.data.store import Rows, SourceFile, StoreShard, finished_shard, write_manifest, write_shard

SHARD = 10_000
TEACHER = {
    "name": "made up",
    "digest": "d",
    "preprocessing": "{}",
    "tokenizer": "t",
    "precision": "fp32",
    "scale": 100.0,
}


def write_store(path: Path, image: np.ndarray, text: np.ndarray, *, rows_of_shard: int = SHARD) -> list[StoreShard]:
    """Write a finished store of made-up pairs; return the lines of its manifest."""
    lines = []
    for shard, first in enumerate(range(0, len(image), rows_of_shard)):
        num = len(image[first : first + rows_of_shard])
        rows = Rows(
            [f"{row:06d}" for row in range(num)],
            np.arange(num, dtype=np.uint64),
            np.ones(num, np.uint32),
            np.ones(num, bool),
            [""] * num,
            np.zeros((num, 32), np.uint8),
        )
        own, source = slice(first, first + num), SourceFile(uri=f"{shard:06d}.tar", num_bytes=1, sha256="s")
        write_shard(str(path), shard, rows, image=image[own], text=text[own], source=source, teacher=TEACHER)
        lines.append(described(path, shard))
    finish_store(path, lines, dim=image.shape[1])
    return lines


def described(path: Path, shard: int) -> StoreShard:
    """The line of a finished shard."""
    found = finished_shard(str(path), shard)
    assert found is not None
    return found


def finish_store(path: Path, lines: Sequence[StoreShard], *, dim: int) -> None:
    """Write the manifest of a store, and what says that it is finished."""
    write_manifest(str(path), list(lines), dim=dim, teacher=TEACHER)
    for name in ("config", "result"):
        (path / f"{name}.json").write_text(json.dumps({"stage": "embed"}))
