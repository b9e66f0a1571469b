"""Runs a function in several processes that form a gloo group, as torchrun would start them."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from typing import Any

import torch

SECONDS = 120


def server() -> ForkServerContext:
    """Processes forked from a server that has imported torch and computed nothing.

    One that has run a backward pass cannot be forked, and a new one would import torch anew.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "distilclip.train.loop"])
    return context


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def join_ranks(rank: int, world: int, port: int) -> None:
    """Give this process its place, as torchrun would, and one thread."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def run_ranks(world: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """What `function(*args)` returns in each of `world` processes, in the order of ranks; their failures fail here."""
    context, port = server(), free_port()
    pipes = [context.Pipe(duplex=False) for _ in range(world)]
    processes = [
        context.Process(target=_rank, args=(rank, world, port, pipe[1], function, args), daemon=False)
        for rank, pipe in enumerate(pipes)
    ]
    for process in processes:
        process.start()
    outcomes = [_answer(pipe[0]) for pipe in pipes]
    for process in processes:
        process.join(10)
        if process.is_alive():
            process.kill()
    failures = [f"rank {rank}: {failure}" for rank, (_, failure) in enumerate(outcomes) if failure]
    assert not failures, "\n".join(failures)
    return [result for result, _ in outcomes]


def _answer(pipe: Connection) -> tuple[Any, str | None]:
    return pickle.loads(pipe.recv_bytes()) if pipe.poll(SECONDS) else (None, f"no answer within {SECONDS} s")


def _rank(
    rank: int, world: int, port: int, pipe: Connection, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    join_ranks(rank, world, port)
    try:
        pipe.send_bytes(pickle.dumps((function(*args), None)))  # by value: shared memory ends with its process
    except BaseException:  # an assertion, too, must reach the test
        pipe.send_bytes(pickle.dumps((None, traceback.format_exc())))
