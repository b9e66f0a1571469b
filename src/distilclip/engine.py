"""Compute the parts of a stage here, in processes, or on a Ray cluster; the files that come out are the same.

Parts and results are small (names, ranges, counts); data travels in files that a part writes atomically. So a part can
be computed twice without harm, which is what happens when a worker dies.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from distilclip import stage_folder
from distilclip.errors import InputError

Part = TypeVar("Part")
Result = TypeVar("Result")

MAX_DEATHS = 3  # of workers in succession, without a part finished between them


@dataclass(frozen=True, kw_only=True)
class Engine:
    """Options of a stage that can compute its parts elsewhere.

    Raises:
        InputError: an address without Ray, or a number of workers below one.
    """

    engine: Literal["local", "processes", "ray"] = stage_folder.execution("local")
    """where parts of the work are computed: here, in processes, or on a Ray cluster; the files are the same"""
    engine_address: str | None = stage_folder.execution(None)
    """address of a running Ray cluster, as HOST:PORT or auto (default: $RAY_ADDRESS, or start one on this machine)"""
    engine_workers: int | None = stage_folder.execution(None)
    """number of parts computed at the same time (default: one per core; on Ray with --device cuda, one per GPU)"""

    def __post_init__(self) -> None:
        if self.engine_address is not None and self.engine != "ray":
            raise InputError(f"engine_address={self.engine_address!r} is for --engine ray, not {self.engine}.")
        if self.engine_workers is not None and self.engine_workers < 1:
            raise InputError(f"engine_workers={self.engine_workers}; it must be at least 1.")


def map_parts(
    prepare: Callable[[], Callable[[Part], Result]], parts: Sequence[Part], *, engine: Engine, device: str = "cpu"
) -> Iterator[tuple[Part, Result]]:
    """Compute `function(part)` for every part, with `function = prepare()` made once in each worker.

    Args:
        prepare: picklable (a `functools.partial` of a module's function, or an object); it may load a model.
        parts: what to compute, in the order in which it is begun. Each may run twice: it must be idempotent.
        engine: where they are computed, and by how many workers.
        device: what a part computes on; with cuda, every worker on Ray gets a GPU of its own.

    Yields each part with its result, as they finish. An exception in a part stops everything and is raised here.

    Raises:
        InputError: workers die again and again, or Ray is not installed.
    """
    if not parts:
        return iter(())
    if engine.engine == "local":
        return _here(prepare, parts)
    if engine.engine == "processes":
        return _in_processes(prepare, parts, engine.engine_workers or os.cpu_count() or 1)
    return _on_ray(prepare, parts, engine, num_gpus=1.0 if device.startswith("cuda") else 0.0)


@contextlib.contextmanager
def connected(engine: Engine) -> Iterator[None]:
    """Keep one connection to Ray for several calls of `map_parts`, which else make one each."""
    with _cluster(_import_ray(), engine.engine_address) if engine.engine == "ray" else contextlib.nullcontext():
        yield


def _here(prepare: Callable[[], Callable[[Part], Result]], parts: Sequence[Part]) -> Iterator[tuple[Part, Result]]:
    function = prepare()
    for part in parts:
        yield part, function(part)


_function: Callable[[Any], Any] | None = None  # of a worker process


def _begin(prepare: Callable[[], Callable[[Any], Any]], num_threads: int) -> None:
    global _function
    os.environ["OMP_NUM_THREADS"] = str(num_threads)
    if "torch" in sys.modules:  # imported with what is to be prepared: too late for the environment
        sys.modules["torch"].set_num_threads(num_threads)
    _function = prepare()


def _compute(part: Any) -> Any:
    assert _function is not None
    return _function(part)


def _in_processes(
    prepare: Callable[[], Callable[[Part], Result]], parts: Sequence[Part], num_workers: int
) -> Iterator[tuple[Part, Result]]:
    num_workers = min(num_workers, len(parts))
    begin = functools.partial(_begin, prepare, max(1, (os.cpu_count() or 1) // num_workers))
    todo = list(parts)
    deaths = 0
    while todo:
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(num_workers, mp_context=context, initializer=begin)
        try:
            running: dict[Future[Any], int] = {pool.submit(_compute, part): i for i, part in enumerate(todo)}
            finished: set[int] = set()
            with contextlib.suppress(BrokenProcessPool):
                while running:
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        i = running.pop(future)
                        result = future.result()
                        finished.add(i)
                        deaths = 0
                        yield todo[i], result
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
        todo = [part for i, part in enumerate(todo) if i not in finished]
        deaths += 1
        if todo and deaths > MAX_DEATHS:
            raise InputError(_dying(todo))


def _on_ray(
    prepare: Callable[[], Callable[[Part], Result]], parts: Sequence[Part], engine: Engine, num_gpus: float
) -> Iterator[tuple[Part, Result]]:
    """Compute in a pool of actors; one whose node died is replaced when there is room for it.

    Only a running actor holds a part.
    """
    ray = _import_ray()
    with _cluster(ray, engine.engine_address):
        worker = ray.remote(num_cpus=1, num_gpus=num_gpus)(_Worker)
        num_workers = min(len(parts), engine.engine_workers or _room(ray, num_gpus))
        todo = collections.deque(parts)
        waiting: dict[Any, tuple[Any, list[Part]]] = {}  # what an actor will answer: the actor, and its part
        deaths = 0

        def begin() -> None:
            actor = worker.remote(prepare)
            waiting[actor.ready.remote()] = (actor, [])

        for _ in range(num_workers):
            begin()
        while todo or any(held for _, held in waiting.values()):
            (answer,), _ = ray.wait(list(waiting), num_returns=1)
            actor, held = waiting.pop(answer)
            try:
                result = ray.get(answer)
            except ray.exceptions.RayActorError as error:
                deaths += 1
                todo.extendleft(held)
                if deaths > MAX_DEATHS * num_workers:
                    raise InputError(_dying(held or todo)) from error
                begin()
                continue
            except ray.exceptions.RayTaskError as error:
                raise error.cause from error  # what the part raised, as if it had run here
            if held:
                deaths = 0
                yield held[0], result
            if todo:
                part = todo.popleft()
                waiting[actor.compute.remote(part)] = (actor, [part])


class _Worker:
    """A Ray actor."""

    def __init__(self, prepare: Callable[[], Callable[[Any], Any]]) -> None:
        self._prepare = prepare

    def ready(self) -> None:
        """Prepare, here and not above, so that what goes wrong is raised as it is and not as the death of an actor."""
        _begin(self._prepare, 1)

    def compute(self, part: Any) -> Any:
        return _compute(part)


@contextlib.contextmanager
def _cluster(ray: Any, address: str | None) -> Iterator[None]:
    """Connect to Ray, unless there is a connection already."""
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    address = address or os.environ.get("RAY_ADDRESS") or "local"  # Ray's default is any cluster it finds running here
    options = {"include_dashboard": False} if address == "local" else {}
    ray.init(address=address, logging_level="WARNING", log_to_driver=False, **options)
    try:
        yield
    finally:
        ray.shutdown()


def _room(ray: Any, num_gpus: float) -> int:
    resources = ray.cluster_resources()
    return max(1, int(resources.get("GPU", 0) / num_gpus if num_gpus else resources.get("CPU", 1)))


def _import_ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise InputError("--engine ray needs Ray: pip install 'distilclip[ray]'.") from error
    return ray


def _dying(parts: Sequence[Any]) -> str:
    return (
        f"Workers keep dying ({MAX_DEATHS} times and more without a result) at {parts[0]!r}. Is there enough memory? "
        "What is finished is kept; run again with fewer workers (--engine-workers) or less memory each (--memory-gb)."
    )
