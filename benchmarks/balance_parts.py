"""`balance` in parts against all rows at once: the CPU seconds of all processes, rows read, and the same bytes.

    python benchmarks/balance_parts.py --rows 300000 --dim 512 --blocks 300000 37501 --workers 2

writes a store of made-up CLIP-like rows, and prints one line for each metric and way to compute it.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import resource
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from _embeddings import clip_like

from distilclip.data.store import Rows, SourceFile, StoreShard, finished_shard, write_manifest, write_shard
from distilclip.engine import Engine
from distilclip.grouping.sorted_rows import SortedRows
from distilclip.stages import balance

THRESHOLD = 0.07
SHARD_ROWS = 100_000
TEACHER = {"name": "made", "digest": "d", "preprocessing": "p", "tokenizer": "t", "precision": "fp32", "scale": 100.0}


def write_store(folder: Path, x: np.ndarray) -> str:
    """A finished store of these rows; its image files are all different."""
    shards: list[StoreShard] = []
    for shard, start in enumerate(range(0, len(x), SHARD_ROWS)):
        here = x[start : start + SHARD_ROWS]
        number = np.arange(start, start + len(here), dtype=np.uint64)
        digests = np.zeros((len(here), 32), np.uint8)
        digests[:, :8] = (number + 1).view(np.uint8).reshape(-1, 8)
        table = Rows(
            key=[f"{i:09d}" for i in number],
            offset=number,
            size=np.ones(len(here), np.uint32),
            valid=np.ones(len(here), bool),
            error=[""] * len(here),
            image_sha256=digests,
        )
        source = SourceFile(uri=f"{shard}.tar", num_bytes=1, sha256="s")
        write_shard(str(folder), shard, table, image=here, text=here, source=source, teacher=TEACHER)
        line = finished_shard(str(folder), shard)
        assert line is not None
        shards.append(line)
    write_manifest(str(folder), shards, dim=x.shape[1], teacher=TEACHER)
    for name in ("config.json", "result.json"):
        (folder / name).write_text('{"stage": "embed"}')
    return str(folder)


class Reads:
    """Counts the rows that parts read in this process: their own, and all with those that may be near."""

    def __init__(self) -> None:
        self.rows = 0
        read = SortedRows.read

        def counted(rows: SortedRows, part: tuple[int, int]) -> Any:
            for near in read(rows, part):
                self.rows += len(near.rows)
                yield near

        SortedRows.read = counted  # type: ignore[method-assign]


def cpu_seconds() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def measure(config: balance.Config, num_rows: int, reads: Reads) -> None:
    shutil.rmtree(config.out, ignore_errors=True)
    reads.rows = 0
    wall, cpu = time.perf_counter(), cpu_seconds()
    balance.main(config)
    wall, cpu = time.perf_counter() - wall, cpu_seconds() - cpu
    digest = hashlib.sha256()
    for path in sorted(Path(config.out).rglob("*.parquet")):
        digest.update(path.read_bytes())
    how = config.execution.engine if config.block_rows is None else f"blocks of {config.block_rows:,}"
    print(
        f"{config.metric} {THRESHOLD}, {how}: CPU {cpu:.1f} s, wall {wall:.1f} s, "
        f"rows read {reads.rows / num_rows:.2f} N here, bytes {digest.hexdigest()[:12]}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--blocks", type=int, nargs="*", default=[100_000, 12_501])
    parser.add_argument("--workers", type=int, default=0, help="also in so many processes")
    parser.add_argument("--metrics", nargs="*", default=["euclidean", "sqeuclidean", "cosine"])
    options = parser.parse_args()
    balance.FORECAST_FROM = 1 << 62  # a forecast takes time of its own
    reads = Reads()
    with tempfile.TemporaryDirectory() as place:
        few = write_store(Path(place) / "few", clip_like(8192, options.dim))
        store = write_store(Path(place) / "store", clip_like(options.rows, options.dim))
        fixed: dict[str, Any] = {"out": str(Path(place) / "out"), "threshold": THRESHOLD, "device": "cpu"}
        for block_rows in (8192, 5000):  # compiles what is not compiled yet
            measure(balance.Config(store=few, metric="euclidean", block_rows=block_rows, **fixed), 8192, reads)
        for metric, block_rows in itertools.product(options.metrics, options.blocks):
            measure(balance.Config(store=store, metric=metric, block_rows=block_rows, **fixed), options.rows, reads)
        for metric in options.metrics if options.workers else ():
            engine = Engine(engine="processes", engine_workers=options.workers)
            measure(balance.Config(store=store, metric=metric, execution=engine, **fixed), options.rows, reads)


if __name__ == "__main__":
    main()
