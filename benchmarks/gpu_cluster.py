"""A million centers on a GPU, against the machine's own matrix product: exact labels, and the cluster loss.

The assignment multiplies in bfloat16; the published figure to pass is flash-kmeans' 203 TFLOP/s for a fused arg-min on
an H200. The cluster loss multiplies in float32: its floor is the time of its five products of n x k x d (logits of
student and teacher, gradients of student and, from both, of the centers) at the speed of a float32 product. Prints,
last, one line of JSON. With --quick toy sizes, on the CPU too; without, it skips itself where there is no GPU.
"""

from __future__ import annotations

import json
import time
from typing import Any

import numpy as np
import torch
from _device import name_of, peak_mb, product_rate, reset_peak, seconds_of, synchronise
from _embeddings import on_the_sphere
from _harness import is_quick
from torch import Tensor
from torch.nn import functional as F

from distilclip.clustering._assign_gpu import ROWS, DeviceCenters
from distilclip.losses.cluster import cluster
from distilclip.vectors.points import Points

PRODUCTS = 5  # of n x k x d in the cluster loss, forward and backward
TILE = 1024, 16_384  # rows and centers of the product that is the loss's floor; its own tiles are no larger
CHECKED = 64  # rows that are computed again in float64


def assignment(num_rows: int, dim: int, num_centers: int, device: torch.device) -> dict[str, Any]:
    """Rows in half precision from the host, exact labels back: what a round of k-means does besides its sums."""
    centers = on_the_sphere(num_centers, dim, seed=1).astype(np.float32)
    centers /= np.linalg.norm(centers, axis=1, keepdims=True)
    near = centers[np.random.default_rng(0).integers(0, num_centers, num_rows)]
    rows = (near + 0.8 * on_the_sphere(num_rows, dim).astype(np.float32)).astype(np.float16)
    points = Points.of(rows, metric="cosine")
    tiles = DeviceCenters(torch.from_numpy(centers).to(device))
    labels = np.empty(num_rows, np.int32)
    tiles.update(labels, points, np.arange(min(ROWS, num_rows)))  # warms up
    reset_peak(device)
    synchronise(device)
    start = time.perf_counter()
    tiles.update(labels, points, np.arange(num_rows))
    seconds = time.perf_counter() - start
    size = min(ROWS, num_rows)
    rate = product_rate(size, size, dim, device=device, dtype=torch.bfloat16, out_dtype=torch.float32)
    reached = 2 * num_rows * num_centers * dim / seconds
    return {
        "case": f"assignment, {num_rows:,} x {dim} to {num_centers:,} centers",
        "seconds": seconds,
        "tflops": reached / 1e12,
        "product_tflops": rate / 1e12,
        "share": reached / rate,
        "peak_mb": peak_mb(device),
        "wrong_labels": wrong_labels(points, centers, labels, device),
    }


def wrong_labels(points: Points, centers: np.ndarray, labels: np.ndarray, device: torch.device) -> int:
    """Of the first rows, how many have another label than by all products in float64."""
    x = points.block(np.arange(CHECKED)).double().to(device)
    best = torch.full((CHECKED,), -torch.inf, device=device, dtype=torch.float64)
    truth = torch.zeros(CHECKED, dtype=torch.int64, device=device)
    for start in range(0, len(centers), 1 << 16):
        block = torch.from_numpy(centers[start : start + (1 << 16)]).to(device).double()
        value, index = (x @ block.T).max(dim=1)
        truth = torch.where(value > best, index + start, truth)
        best = torch.maximum(value, best)
    return int((truth.cpu().numpy() != labels[:CHECKED]).sum())


def cluster_loss(num_rows: int, dim: int, num_centers: int, device: torch.device) -> dict[str, Any]:
    """Forward and backward of the loss over all centers, as CLIP-CID takes it in every step."""
    generator = torch.Generator(device).manual_seed(0)

    def near(rows: Tensor) -> Tensor:
        noise = torch.randn(rows.shape, generator=generator, device=device)
        return F.normalize(F.normalize(rows, dim=1) + 0.04 * noise, dim=1)

    centers = torch.randn(num_centers, dim, generator=generator, device=device)
    labels = torch.randint(num_centers, (num_rows,), generator=generator, device=device)
    teacher = near(centers[labels])
    student = near(teacher).requires_grad_()
    centers.requires_grad_()

    def forward_and_backward() -> None:
        student.grad = centers.grad = None
        cluster(student, teacher, centers, labels).total.backward()

    reset_peak(device)
    seconds = seconds_of(forward_and_backward, device, repeats=3, warm_ups=1)
    peak = peak_mb(device)
    rate = product_rate(min(TILE[0], num_rows), min(TILE[1], num_centers), dim, device=device, dtype=torch.float32)
    floor = PRODUCTS * 2 * num_rows * num_centers * dim / rate
    first = slice(0, CHECKED)
    student, centers = student.detach()[first], centers.detach()
    found = cluster(student, teacher[first], centers, labels[first]).total
    return {
        "case": f"cluster loss, forward and backward, n={num_rows:,} d={dim} k={num_centers:,}",
        "seconds": seconds,
        "product_seconds": floor,
        "to_product": seconds / floor,
        "product_tflops": rate / 1e12,
        "peak_mb": peak,
        "inputs_and_gradients_mb": 4 * dim * (3 * num_rows + 2 * num_centers) / 1e6,
        "relative_error": relative_error(found, student, teacher[first], centers, labels[first]),
    }


def relative_error(found: Tensor, student: Tensor, teacher: Tensor, centers: Tensor, labels: Tensor) -> float:
    """Of a loss of few rows, against its formula in float64 with all logits at once."""
    parts = F.normalize(centers, dim=1).split(1 << 16)
    own, other = (torch.cat([x.double() @ part.double().T for part in parts], dim=1) for x in (student, teacher))
    p, q = F.log_softmax(own / 0.07, dim=1), F.log_softmax(other / 0.07, dim=1)
    divergence = F.kl_div(q, p, log_target=True, reduction="batchmean")
    expected = 0.999 * F.cross_entropy(own, labels) + 0.001 * divergence
    return float((found - expected).abs() / expected)


def main() -> None:
    quick = is_quick(__doc__ or "")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not quick:
        print("gpu_cluster: no GPU here, nothing measured")
        return
    assigned = [(2048, 64, 1000)] if quick else [(1_000_000, 512, 10_000), (262_144, 1280, 1_000_000)]
    lost = [(256, 64, 2000)] if quick else [(8192, 1280, 100_000), (8192, 1280, 1_000_000)]
    cases = []
    for measure, sizes in ((assignment, assigned), (cluster_loss, lost)):
        for size in sizes:
            cases.append(measure(*size, device))
            print(cases[-1], flush=True)
    machine = {"gpu": name_of(device), "torch": torch.__version__}
    print(json.dumps({"name": "gpu_cluster", "cases": cases, "machine": machine}))


if __name__ == "__main__":
    main()
