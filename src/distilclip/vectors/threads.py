"""Run a function in one thread per core; for compiled loops and torch, which work without the GIL."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch


def in_threads(function: Callable[[int, int], Any], count: int, *, at_least: int = 1) -> None:
    """Call `function(start, stop)` on equal slices of `range(count)`, each in a thread and `at_least` as long."""
    num_slices = max(1, min(torch.get_num_threads(), count // at_least))
    if num_slices == 1:
        function(0, count)
        return
    bounds = np.linspace(0, count, num_slices + 1).astype(int).tolist()
    with workers(num_slices) as map_threads:
        map_threads(function, bounds[:-1], bounds[1:])


@contextlib.contextmanager
def workers(count: int) -> Iterator[Callable[..., None]]:
    """Give a `map` over `count` threads, in each of which torch computes on one thread."""
    num_threads = torch.get_num_threads()
    # In the caller, and again in every thread: a new thread of Python begins with OpenMP's default, one per core, so
    # that C threads would compute on C x C.
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield lambda function, *arguments: list(pool.map(function, *arguments)).clear()
    finally:
        torch.set_num_threads(num_threads)
