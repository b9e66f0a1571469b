"""All-pairs search on a GPU: throughput of the whole search against the machine's own matrix product.

Prints TFLOP/s of both and their share, and last one line of JSON. Skips itself where there is no GPU.
"""

from __future__ import annotations

import json
import time

import numpy as np
import torch
from _embeddings import clip_like
from _harness import is_quick

from distilclip.grouping.forest import ForestBuilder
from distilclip.grouping.near_pairs import tile_rows
from distilclip.grouping.search_gpu import compare_all
from distilclip.vectors.points import Points, distinct
from distilclip.vectors.tolerance import Tolerance


def product_peak(size: int, dim: int) -> float:
    """FLOP/s of float16 products of two square blocks of rows, as the search multiplies them."""
    x = torch.randn(size, dim, device="cuda", dtype=torch.float16)
    for _ in range(3):
        _warm = x @ x.T
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(20):
        _product = x @ x.T
    torch.cuda.synchronize()
    return 20 * 2 * size * size * dim / (time.perf_counter() - start)


def main() -> None:
    quick = is_quick(__doc__ or "")
    if not torch.cuda.is_available():
        print("gpu_balance: no GPU here, nothing measured")
        return
    num_rows, dim = (200_000, 512) if quick else (2_000_000, 1280)
    x = clip_like(num_rows, dim)
    points = Points.of(x, metric="euclidean")
    rows = distinct(points.values, np.arange(len(x))).first
    size = tile_rows(dim, None, most=1 << 14)
    peak = product_peak(size, dim)
    cases = []
    for metric, threshold in (("euclidean", 0.07), ("sqeuclidean", 0.07), ("cosine", 0.07)):
        forest = ForestBuilder(len(x))
        torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        tolerance = Tolerance(threshold, metric)
        compare_all(points, rows, tolerance, into=forest, size=size, device=torch.device("cuda"))
        edges = len(forest.forest())
        seconds = time.perf_counter() - start
        reached = len(rows) ** 2 / 2 * 2 * dim / seconds
        cases.append(
            {
                "case": f"{num_rows // 1000}k x {dim}, {metric} {threshold}",
                "seconds": seconds,
                "tflops": reached / 1e12,
                "product_tflops": peak / 1e12,
                "share": reached / peak,
                "peak_mb": torch.cuda.max_memory_allocated() / 1e6,
                "edges": edges,
            }
        )
        print(cases[-1], flush=True)
    print(json.dumps({"name": "gpu_balance", "cases": cases, "machine": {"gpu": torch.cuda.get_device_name()}}))


if __name__ == "__main__":
    main()
