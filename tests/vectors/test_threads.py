import os
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch

from distilclip.vectors.threads import in_threads


def test_slices_cover_the_range_once(set_threads: Callable[[int], None]) -> None:
    seen = np.zeros(103, int)

    def add(start: int, stop: int) -> None:
        seen[start:stop] += 1

    set_threads(4)
    in_threads(add, 103)
    in_threads(add, 103, at_least=1000)  # too few for two threads
    assert (seen == 2).all()
    assert torch.get_num_threads() == 4


COUNT_THREADS = """
import os, torch
from distilclip.vectors.threads import workers

counts, x = [], torch.ones(256, 256)
def multiply(_):
    for _ in range(50):
        torch.mm(x, x)
    counts.append(len(os.listdir("/proc/self/task")))

torch.set_num_threads(4)
torch.mm(x, x)  # starts the caller's own threads
before = len(os.listdir("/proc/self/task"))
with workers(4) as map_threads:
    map_threads(multiply, range(4))
assert max(counts) <= before + 4, (before, counts)
assert torch.get_num_threads() == 4
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts threads in /proc")
def test_a_worker_computes_on_one_thread_of_four() -> None:
    """In a process of its own, because the tests run with one thread, where this cannot go wrong."""
    subprocess.run([sys.executable, "-c", COUNT_THREADS], env={**os.environ, "OMP_NUM_THREADS": "4"}, check=True)
