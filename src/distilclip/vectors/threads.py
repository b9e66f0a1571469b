"""Run work that leaves the GIL in one thread per core."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch


def in_threads(function: Callable[[int, int], Any], count: int, *, at_least: int = 1) -> None:
    """Call `function(start, stop)` over equal slices of `range(count)`, one per core; for work without the GIL."""
    num_slices = max(1, min(torch.get_num_threads(), count // at_least))
    if num_slices == 1:
        function(0, count)
        return
    bounds = np.linspace(0, count, num_slices + 1).astype(int).tolist()
    with workers(num_slices) as map_threads:
        map_threads(function, bounds[:-1], bounds[1:])


@contextlib.contextmanager
def workers(count: int) -> Iterator[Callable[..., None]]:
    """A `map` over threads, inside which torch computes on one thread each, so that both never compete for a core."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(count) as pool:
            yield lambda function, *arguments: list(pool.map(function, *arguments)).clear()
    finally:
        torch.set_num_threads(num_threads)
