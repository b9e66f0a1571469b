"""Compute tasks in loader processes; results come in the order of the tasks, for any number of processes."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from distilclip.errors import InputError

MOST_WORKERS = 16

Tokenize = Callable[[list[str]], Tensor]  # in a loader process: captions to token ids [n, context]


def map_tasks(dataset: Dataset[Any], tasks: Iterable[Any], *, num_workers: int) -> Iterator[Any]:
    """Yield `dataset[task]` of every task, in order, computed a few ahead in `num_workers` processes (0: in this one).

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
        worker_init_fn=_leave_signals_to_parent,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # else the loader draws its base seed from the global random state
        **parallel,
    )
    for result in results:
        if isinstance(result, InputError):
            raise result
        yield result


def default_workers() -> int:
    """Return one process for each core of this training process but one, at most `MOST_WORKERS`."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(MOST_WORKERS, max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) - 1))


def _leave_signals_to_parent(worker: int) -> None:
    """Let the parent handle signals to the whole job (a preemption): it still needs batches.

    SIGTERM ends a loader process only where its parent sent it. A thread waits for it, since a handler in Python is not
    told who did.
    """
    if not hasattr(signal, "sigwaitinfo"):  # not on macOS
        return
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


def _identity(result: Any) -> Any:
    return result
