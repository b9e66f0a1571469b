"""Work in loader processes: results in the order of the tasks, whatever the number of processes."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from distilclip.errors import InputError


def map_tasks(dataset: Dataset[Any], tasks: Iterable[Any], *, num_workers: int) -> Iterator[Any]:
    """`dataset[task]` of every task, in order, computed in `num_workers` processes (0: in this one), a few ahead.

    A task that fails for the user's data *returns* its `InputError`, which is raised here: raised in a worker it would
    arrive as a traceback in a message.
    """
    parallel: dict[str, Any] = {}
    if num_workers > 0:
        # Fork shares what the dataset holds; where it is unsafe (macOS), that is copied to each process.
        parallel = {"multiprocessing_context": "fork" if sys.platform == "linux" else "spawn", "prefetch_factor": 2}
    results = DataLoader(
        dataset,
        batch_size=None,
        sampler=tasks,
        num_workers=num_workers,
        collate_fn=_identity,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # else the loader draws its base seed from the global random state
        **parallel,
    )
    for result in results:
        if isinstance(result, InputError):
            raise result
        yield result


def _identity(result: Any) -> Any:
    return result
