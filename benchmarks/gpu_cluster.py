"""Assignment to a million centers on a GPU: throughput of exact labels against the machine's own matrix product.

Prints TFLOP/s of both and their share, and last one line of JSON. Skips itself where there is no GPU. The published
figure to pass is flash-kmeans' 203 TFLOP/s for a fused arg-min on an H200.
"""

from __future__ import annotations

import json
import time
from typing import Any

import numpy as np
import torch
from _embeddings import on_the_sphere
from _harness import is_quick

from distilclip.ops.assignment import ROWS, DeviceCenters
from distilclip.ops.points import Points


def product_peak(dim: int) -> float:
    """FLOP/s of bfloat16 products, summed and given in float32, of blocks as large as the assignment's."""
    x = torch.randn(ROWS, dim, device="cuda", dtype=torch.bfloat16)
    for _ in range(3):
        _warm = torch.mm(x, x.T, out_dtype=torch.float32)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(20):
        _product = torch.mm(x, x.T, out_dtype=torch.float32)
    torch.cuda.synchronize()
    return 20 * 2 * ROWS * ROWS * dim / (time.perf_counter() - start)


def assignment(num_rows: int, dim: int, num_centers: int) -> dict[str, Any]:
    """Rows in half precision from the host, exact labels back: what a round of k-means does besides its sums."""
    centers = on_the_sphere(num_centers, dim, seed=1).astype(np.float32)
    centers /= np.linalg.norm(centers, axis=1, keepdims=True)
    near = centers[np.random.default_rng(0).integers(0, num_centers, num_rows)]
    rows = (near + 0.8 * on_the_sphere(num_rows, dim).astype(np.float32)).astype(np.float16)
    points = Points.of(rows, metric="cosine")
    tiles = DeviceCenters(torch.from_numpy(centers).to("cuda"))
    labels = np.empty(num_rows, np.int32)
    tiles.update(labels, points, np.arange(min(ROWS, num_rows)))  # warms up
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.synchronize()
    start = time.perf_counter()
    tiles.update(labels, points, np.arange(num_rows))
    seconds = time.perf_counter() - start
    peak, reached = product_peak(dim), 2 * num_rows * num_centers * dim / seconds
    return {
        "case": f"assignment, {num_rows:,} x {dim} to {num_centers:,} centers",
        "seconds": seconds,
        "tflops": reached / 1e12,
        "product_tflops": peak / 1e12,
        "share": reached / peak,
        "peak_mb": torch.cuda.max_memory_allocated() / 1e6,
        "wrong_labels": wrong_labels(points, centers, labels),
    }


def wrong_labels(points: Points, centers: np.ndarray, labels: np.ndarray) -> int:
    """Of the first rows, how many have another label than by all products in float64."""
    x, best = points.block(np.arange(64)).double().cuda(), torch.full((64,), -torch.inf, device="cuda").double()
    truth = torch.zeros(64, dtype=torch.int64, device="cuda")
    for start in range(0, len(centers), 1 << 16):
        value, index = (x @ torch.from_numpy(centers[start : start + (1 << 16)]).cuda().double().T).max(dim=1)
        truth = torch.where(value > best, index + start, truth)
        best = torch.maximum(value, best)
    return int((truth.cpu().numpy() != labels[:64]).sum())


def main() -> None:
    quick = is_quick(__doc__ or "")
    if not torch.cuda.is_available():
        print("gpu_cluster: no GPU here, nothing measured")
        return
    sizes = [(65_536, 512, 10_000)] if quick else [(1_000_000, 512, 10_000), (262_144, 1280, 1_000_000)]
    cases = []
    for size in sizes:
        cases.append(assignment(*size))
        print(cases[-1], flush=True)
    print(json.dumps({"name": "gpu_cluster", "cases": cases, "machine": {"gpu": torch.cuda.get_device_name()}}))


if __name__ == "__main__":
    main()
