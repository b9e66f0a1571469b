"""Compute tasks in loader processes; results come in the order of the tasks, for any number of processes."""

from __future__ import annotations

import functools
import io
import itertools
import os
import pickle
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing import reduction
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from distilclip.errors import InputError
from distilclip.messages import say

MOST_WORKERS = 16
MOST_SECONDS = 1800
"""Longest wait for one result of the loader processes: by then, the processes that train together have given up."""
_CHECK_SECONDS = 10  # between two looks at whether the loader processes are alive

Tokenize = Callable[[list[str]], Tensor]  # in a loader process: captions to token ids [n, context]


def map_tasks(dataset: Dataset[Any], tasks: Iterable[Any], *, num_workers: int, pinned: bool = True) -> Iterator[Any]:
    """Yield `dataset[task]` of every task, in order, computed a few ahead in `num_workers` processes (0: in this one).

    A task that fails for the user's data *returns* its `InputError`, which is raised here: raised in a worker it would
    arrive as a traceback in a message. Results lie in shared memory, at most 2 `num_workers` of them and the one that
    the caller holds; where it is full (Docker gives 64 MB), they are copied instead. With `pinned` a thread moves them
    to page-locked memory, where there is a CUDA GPU.

    Raises:
        InputError: a task's own; or a loader process was killed, or none has answered in `MOST_SECONDS`.
    """
    parallel: dict[str, Any] = {}
    if num_workers > 0:
        # Fork shares what the dataset holds; where it is unsafe (macOS), that is copied to each process.
        context = "fork" if sys.platform == "linux" else "spawn"
        parallel = {"multiprocessing_context": context, "prefetch_factor": 2, "timeout": _CHECK_SECONDS}
    results = DataLoader(
        dataset,
        batch_size=None,
        sampler=tasks,
        num_workers=num_workers,
        collate_fn=_share,
        worker_init_fn=_leave_signals_to_parent,
        pin_memory=pinned and torch.cuda.is_available(),
        generator=torch.Generator(),  # else the loader draws its base seed from the global random state
        **parallel,
    )
    warned = False
    arriving = _iterate(results)
    while (result := _wait(arriving)) is not _END:
        if isinstance(result, _Copied):
            if not warned:
                say(f"No shared memory can be had ({result.error}): {_COPIED}")
            result, warned = pickle.loads(result.content), True
        if isinstance(result, InputError):
            raise result
        yield result


_END = object()
_COPIED = (
    "loader processes copy their results through pipes, which is slower. Give more shared memory (docker run "
    "--shm-size=8g, or --ipc=host) or room in the temporary folder ($TMPDIR), or lower --num-workers."
)


def _iterate(results: DataLoader[Any]) -> Iterator[Any]:
    """Begin the loader processes, without torch's handler of SIGCHLD: it would raise in whatever the caller does."""
    before = signal.getsignal(signal.SIGCHLD) if hasattr(signal, "SIGCHLD") else None
    arriving = iter(results)
    if before is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, before)
    return arriving


def _wait(arriving: Iterator[Any]) -> Any:
    """Return the next result, or `_END`. Raises `InputError` where a loader process is dead or the wait too long."""
    for waited in itertools.count(_CHECK_SECONDS, _CHECK_SECONDS):
        try:
            return next(arriving, _END)
        except (RuntimeError, OSError, EOFError) as error:
            words = str(error)
            if _tells_of_a_kill(error, words):
                detail = words.splitlines()[0].rstrip(".") if words else "it ended before its results were taken"
                raise InputError(
                    f"A loader process was killed ({detail}), most likely because memory ran out. Lower --num-workers "
                    "or --batch-size, or allow the job more memory."
                ) from error
            if "DataLoader timed out" not in words:
                raise
            if waited >= MOST_SECONDS:
                raise InputError(
                    f"The loader processes gave nothing in {waited} s. Does the storage of the data answer? "
                    "--num-workers 0 shows where it waits."
                ) from error
            if waited == 60:
                say(f"The loader processes have given nothing for {waited} s: the storage is slow, or does not answer.")
    raise AssertionError("a count has no end")


def _tells_of_a_kill(error: Exception, words: str) -> bool:
    """Return whether waiting failed because a loader process is dead, not because of what it raised itself.

    The memory of a result is handed over by the process that made it: where that is gone, its socket does not answer.
    """
    if isinstance(error, RuntimeError):
        return "DataLoader worker (pid" in words
    return "in DataLoader worker process" not in words


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


@dataclass(frozen=True)
class _Copied:
    """A result by value, and why it does not lie in shared memory."""

    content: bytes
    error: str


class _TensorSharer(pickle.Pickler):
    """Moves every tensor in an object to shared memory, as sending it would do."""

    def persistent_id(self, obj: Any) -> str | None:
        if not isinstance(obj, Tensor):
            return None
        obj.share_memory_()
        return "shared"


def _share(result: Any) -> Any:
    """Move a result of a loader process to shared memory, or copy it where that cannot be.

    Without this a thread of the loader process would find out, and drop the result: the parent would wait for ever.
    """
    if get_worker_info() is None:
        return result
    try:
        _open_socket()
        _TensorSharer(io.BytesIO()).dump(result)
    except (RuntimeError, OSError) as error:
        return _Copied(pickle.dumps(result), str(error).splitlines()[0])
    return result


@functools.cache
def _open_socket() -> None:
    """Open the socket of this process from which its parent fetches what results share. It is a file.

    Raises `OSError` where the temporary folder has no room for it, or is read-only.
    """
    with open(os.devnull) as file:
        reduction.DupFd(file.fileno())
