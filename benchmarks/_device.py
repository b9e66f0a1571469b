"""Time and memory on any device, and how fast it multiplies matrices: what the benchmarks called gpu_* compare with."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch


def synchronise(device: torch.device) -> None:
    """Wait for the device; the CPU has nothing to wait for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(function: Callable[[], object], device: torch.device, *, repeats: int, warm_ups: int = 2) -> float:
    """Median time of a call; the first ones compile and allocate and do not count."""
    times = []
    for turn in range(warm_ups + repeats):
        synchronise(device)
        start = time.perf_counter()
        function()
        synchronise(device)
        if turn >= warm_ups:
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def product_rate(
    rows: int,
    columns: int,
    dim: int,
    *,
    device: torch.device,
    dtype: torch.dtype,
    out_dtype: torch.dtype | None = None,
) -> float:
    """FLOP/s of [rows, dim] @ [dim, columns]; `out_dtype`, of CUDA only, is the type of sums and result."""
    left, right = (torch.randn(size, dim, device=device, dtype=dtype) for size in (rows, columns))
    options = {} if out_dtype is None or device.type != "cuda" else {"out_dtype": out_dtype}

    def products() -> None:
        for _ in range(10):
            _product = torch.mm(left, right.T, **options)

    return 10 * 2 * rows * columns * dim / seconds_of(products, device, repeats=3)


def reset_peak(device: torch.device) -> None:
    """Forget the most memory that was held so far."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_mb(device: torch.device) -> float | None:
    """Most memory that tensors held since `reset_peak`, in MB (10^6 bytes); None on the CPU, which does not count."""
    return torch.cuda.max_memory_allocated(device) / 1e6 if device.type == "cuda" else None


def name_of(device: torch.device) -> str:
    """The GPU's name."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
