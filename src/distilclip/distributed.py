"""Exchange tensors between the processes that train together. For one process alone, every function does nothing.

`torchrun` starts the processes and tells each its place by environment variables; `job` makes a process group of them.
Only stages and train know that there are other processes; a user's own loop tells the losses by `rows_of_this_rank`.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from jaxtyping import Shaped
from torch import Tensor
from torch.autograd.function import once_differentiable

from distilclip.devices import resolve_device
from distilclip.errors import InputError
from distilclip.losses.features import RankRows

T = TypeVar("T")


@contextlib.contextmanager
def job(device: str = "auto") -> Iterator[torch.device]:
    """Join the process group that torchrun asks for, for the length of the block; yields this process's device.

    Each process takes the CUDA device of its local rank and touches no other. Without torchrun there is no group.

    Raises:
        InputError: the machine has fewer CUDA devices than processes, or the device cannot exchange tensors.
    """
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if several and torch.cuda.is_available() and device.partition(":")[0] in ("auto", "cuda"):
        device = _own_cuda_device(int(os.environ["LOCAL_RANK"]))
    resolved = resolve_device(device)
    if resolved.type == "cuda" and resolved.index is not None:
        torch.cuda.set_device(resolved)  # events and streams belong to the current device
    if not several:
        yield resolved
        return
    if resolved.type not in ("cuda", "cpu"):
        raise InputError(f"Several processes train on CUDA or on the CPU, not on {resolved}. Use --device cpu.")
    # Host tensors are reduced as well (counts, signals), hence gloo beside NCCL.
    backend = "cpu:gloo,cuda:nccl" if resolved.type == "cuda" else "gloo"
    number, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group(backend, store=_new_part("job"), rank=number, world_size=world_size)
    try:
        yield resolved
    finally:
        dist.destroy_process_group()


def _own_cuda_device(local_rank: int) -> str:
    if "SLURM_STEP_ID" in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ and torch.cuda.device_count() == 1:
        return "cuda:0"  # srun --gpus-per-task shows each process its own
    if local_rank >= torch.cuda.device_count():
        raise InputError(
            f"torchrun started process {local_rank + 1} on a machine with {torch.cuda.device_count()} CUDA devices. "
            "Lower --nproc-per-node."
        )
    return f"cuda:{local_rank}"


_stores: dict[tuple[str, ...], Any] = {}
_num_parts: Counter[str] = Counter()


def _new_part(purpose: str) -> Any:
    """Return a part of the store that all processes share, for one use; all processes ask for them in the same order.

    A second process group in a process must not find the addresses of the first.
    """
    place = tuple(os.environ[name] for name in ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE"))
    if place not in _stores:
        _stores[place] = next(iter(dist.rendezvous("env://")))[0]
    _num_parts[purpose] += 1
    return dist.PrefixStore(f"distilclip {purpose} {_num_parts[purpose]}", _stores[place])


class Orders:
    """Words that the first process of several gives to the others, which wait as long as it takes."""

    def __init__(self) -> None:
        self._store = _new_part("orders")
        self._num_given = 0

    def give(self, word: str) -> None:
        """Let the others go on with a word."""
        self._num_given += 1
        self._store.set(f"order {self._num_given}", word)

    def take(self) -> str:
        """Wait for the next word. Raises `InputError` where the first process is gone."""
        self._num_given += 1
        name = f"order {self._num_given}"
        try:
            while not self._store.check([name]):
                time.sleep(0.2)
            return self._store.get(name).decode()
        except (dist.DistNetworkError, dist.DistStoreError) as error:
            raise InputError("The first of the processes has ended; see its message.") from error

    def end(self) -> None:
        """Tell the others that there is nothing more to do, and wait until they know, for at most 30 s."""
        self.give("")
        world_size, end = int(os.environ["WORLD_SIZE"]), time.monotonic() + 30
        while self._store.add("ended", 0) < world_size - 1 and time.monotonic() < end:
            time.sleep(0.05)

    def confirm_end(self) -> None:
        """Let the first process, which holds the store, end."""
        self._store.add("ended", 1)


def rank() -> int:
    """Return the number of this process, from 0."""
    return dist.get_rank() if _in_group() else 0


def world() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if _in_group() else 1


def gather(rows: Shaped[Tensor, "n ..."]) -> Shaped[Tensor, "m ..."]:
    """Return the rows of all processes in the order of ranks, m = world x n; each must bring the same number.

    The gradient of a process's rows is the sum over all processes' losses, so these losses may be parts of one sum.
    """
    return _Gather.apply(rows) if world() > 1 else rows


def rows_of_this_rank(num_rows: int) -> RankRows:
    """Say to a loss which rows of the global batch are here, and how to reach the others: its argument `rows`.

    Without a process group, all rows are here. Else every process must hold `num_rows` rows; rank 2 of 4 with 8 rows
    has the rows 16 to 23 of 32. Each process's loss is then its part of the loss of the global batch, with all rows as
    keys: the sum over the processes is the loss, and so is the sum of the gradients. DistributedDataParallel takes the
    mean of the gradients, so multiply by the number of processes first:

        rows = rows_of_this_rank(len(image))
        loss = contrastive(image, text, scale=scale, rows=rows)
        (loss * dist.get_world_size()).backward()
    """
    start = rank() * num_rows
    return RankRows(here=slice(start, start + num_rows), count=world() * num_rows, gather=gather, reduce=reduce_)


def gather_objects(value: T) -> list[T]:
    """Return every process's value (picklable), in the order of ranks."""
    if world() == 1:
        return [value]
    values: list[Any] = [None] * world()
    dist.all_gather_object(values, value)
    return values


def reduce_(values: Tensor, operation: Literal["sum", "max"] = "sum") -> Tensor:
    """Replace `values` by their sum or maximum over the processes, element by element; no gradient."""
    if world() > 1:
        dist.all_reduce(values, dist.ReduceOp.SUM if operation == "sum" else dist.ReduceOp.MAX)
    return values


def broadcast_(values: Tensor) -> Tensor:
    """Replace `values` by those of rank 0."""
    if world() > 1:
        dist.broadcast(values, 0)
    return values


def on_first(function: Callable[[], T]) -> T:
    """Call `function` on rank 0 and return its value on every process; its `InputError` is raised on all, too."""
    if world() == 1:
        return function()
    outcome: list[Any] = [None, None]
    if rank() == 0:
        try:
            outcome = [function(), None]
        except InputError as error:
            outcome = [None, error]
    dist.broadcast_object_list(outcome, 0)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def barrier() -> None:
    """Wait until every process has come here."""
    if world() > 1:
        dist.barrier()


def _in_group() -> bool:
    return dist.is_available() and dist.is_initialized()


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        gathered = rows.new_empty(world() * len(rows), *rows.shape[1:])
        dist.all_gather_into_tensor(gathered, rows.contiguous())
        return gathered

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        own = gradient.new_empty(len(gradient) // world(), *gradient.shape[1:])
        dist.reduce_scatter_tensor(own, gradient.contiguous())
        return own
