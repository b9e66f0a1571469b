"""Scores of pairs against plain numpy on whole arrays, and a balance that grows against one from scratch.

The note scores 12.8 M pairs in a fresh process. Its store has few different shards under many names (hard links), so
the disk holds 1.2 GB of it and not 39: it measures computing and memory, not a disk.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from _embeddings import clip_like
from _harness import Case, compare, is_quick
from _stores import SHARD, described, finish_store, write_store
from safetensors.numpy import load_file

from distilclip import stage_folder
from distilclip.data.side_files import read_groups
from distilclip.stages import balance, select

PLACE = Path(tempfile.mkdtemp(prefix="distilclip-bench-"))


def pairs(num_rows: int, dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Unit rows of pictures and captions that resemble each other more or less."""
    image = clip_like(num_rows, dim)
    text = image + np.random.default_rng(1).uniform(0.02, 0.2, (num_rows, 1)) * image[::-1]
    return image, (text / np.linalg.norm(text, axis=1, keepdims=True)).astype(np.float16)


@functools.cache
def score_store(num_rows: int) -> str:
    path = PLACE / f"pairs-{num_rows}"
    write_store(path, *pairs(num_rows, 768))
    return str(path)


def fresh(name: str) -> str:
    """A folder that does not exist."""
    shutil.rmtree(PLACE / name, ignore_errors=True)
    return str(PLACE / name)


def kept(folder: str) -> list[np.ndarray]:
    shards = range(len(list(Path(folder, "groups").iterdir())))
    return [np.flatnonzero(read_groups(folder, shard).keep) for shard in shards]


def select_best(store: str) -> list[np.ndarray]:
    out = fresh("selected")
    select.main(select.Config(store=store, out=out, score="clip-score", top=0.3))
    return kept(out)


def numpy_best(store: str) -> list[np.ndarray]:
    """The same by numpy: both matrices in memory, the cosines in float64, the share by a partition."""
    loaded = [load_file(path) for path in sorted(Path(store).glob("*.safetensors"))]
    image, text = (np.concatenate([block[side] for block in loaded]).astype(np.float64) for side in ("image", "text"))
    image /= np.linalg.norm(image, axis=1, keepdims=True)
    text /= np.linalg.norm(text, axis=1, keepdims=True)
    score = (image * text).sum(axis=1).astype(np.float32)
    num = round(0.3 * len(score))
    keep = score >= np.partition(score, len(score) - num)[len(score) - num]
    return [np.flatnonzero(part) for part in np.split(keep, range(SHARD, len(keep), SHARD))]


def equal_parts(ours: list[np.ndarray], peer: list[np.ndarray]) -> bool:
    return len(ours) == len(peer) and all(map(np.array_equal, ours, peer))


def grown_store(num_old: int) -> dict[str, Any]:
    """A store of old rows and one more shard, and the balance of the old ones."""
    path, dim = PLACE / f"grown-{num_old}", 64
    x = clip_like(num_old + SHARD, dim)
    lines = write_store(path, x, x)
    options: dict[str, Any] = {"store": str(path), "metric": "euclidean", "threshold": 0.2, "device": "cpu"}
    finish_store(path, lines[:-1], dim=dim)
    old = fresh(f"old-{num_old}")
    balance.main(balance.Config(out=old, **options))
    before = {"num_shards": len(lines) - 1, "result": stage_folder.result_digest(str(path))}
    finish_store(path, lines, dim=dim)
    (path / "extended.json").write_text(json.dumps({"former": [before]}))
    return {"options": options, "old": old}


def extend(given: dict[str, Any]) -> str:
    out = fresh("extended")
    balance.main(balance.Config(out=out, extend=given["old"], **given["options"]))
    return out


def from_scratch(given: dict[str, Any]) -> str:
    out = fresh("scratch")
    balance.main(balance.Config(out=out, **given["options"]))
    return out


def equal_bytes(ours: str, peer: str) -> bool:
    """Whether two folders hold the same files, but for what says how they were made."""

    def contents(folder: str) -> dict[str, bytes]:
        own = ("env.json", "config.json")
        return {
            str(path.relative_to(folder)): path.read_bytes()
            for path in Path(folder).rglob("*")
            if path.is_file() and path.name not in own
        }

    return contents(ours) == contents(peer)


def score_many(num_rows: int) -> list[str]:
    """Score a store of hard links in a fresh process; one sentence for each score."""
    few = Path(score_store(40 * SHARD))
    path = PLACE / "many"
    lines = [described(few, shard) for shard in range(40)]
    many = []
    path.mkdir()
    for shard in range(num_rows // SHARD):
        for file in few.glob(f"{shard % 40:06d}.*"):
            os.link(file, path / file.name.replace(f"{shard % 40:06d}", f"{shard:06d}", 1))
        many.append(dataclasses.replace(lines[shard % 40], index=shard, uri=f"{shard:06d}.tar"))
    finish_store(path, many, dim=768)
    found = []
    sizes = (("clip-score", path, num_rows), ("neg-clip-loss", few, 40 * SHARD))  # of all, the latter takes an hour
    for score, store, size in sizes:
        command = [sys.executable, "-m", "distilclip", "select", "--store", str(store), "--out", fresh(score)]
        started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([*command, "--score", score, "--top", "0.3", "--quiet"], check=True)
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime
        found.append(
            f"{size / 1e6:g} M x 768 pairs by {score}: {time.perf_counter() - started:.0f} s, {cpu:.0f} CPU s, "
            f"at most {used.ru_maxrss / 1e6:.2f} GB."
        )
    return found


def main() -> None:
    quick = is_quick(__doc__ or "")
    num_scored, num_old = (100_000, 20_000) if quick else (400_000, 1_000_000)
    cases = [
        Case(
            name=f"select {num_scored:,} x 768 by clip-score",
            setup=lambda: score_store(num_scored),
            ours=select_best,
            peer=numpy_best,
            equal=equal_parts,
        ),
        Case(
            name=f"balance {num_old:,} + {SHARD:,} x 64, extended",
            setup=functools.cache(lambda: grown_store(num_old)),
            ours=extend,
            peer=from_scratch,
            equal=equal_bytes,
        ),
    ]
    notes = {} if quick else {"many": lambda: score_many(12_800_000)}
    try:
        compare("curation", cases, notes)
    finally:
        shutil.rmtree(PLACE, ignore_errors=True)


if __name__ == "__main__":
    main()
