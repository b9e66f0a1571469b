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
import pickle
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import connection
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

from distilclip.errors import InputError
from distilclip.options import changeable

Part = TypeVar("Part")
Result = TypeVar("Result")

MAX_DEATHS = 3  # of workers in succession, without a part finished between them
SECONDS_TO_END = 10  # that an actor may take to be told that it ends


@dataclass(frozen=True, kw_only=True)
class Engine:
    """Options of a stage that can compute its parts elsewhere.

    Raises:
        InputError: an address without Ray, or a number of workers below one.
    """

    engine: Literal["local", "processes", "ray"] = changeable("local")
    """where parts of the work are computed: here, in processes, or on a Ray cluster; the files are the same"""
    engine_address: str | None = changeable(None)
    """address of a running Ray cluster, as HOST:PORT or auto (default: $RAY_ADDRESS, or start one on this machine)"""
    engine_workers: int | None = changeable(None)
    """number of parts computed at the same time (default: one per GPU where --device takes them, else one per core)"""

    def __post_init__(self) -> None:
        if self.engine_address is not None and self.engine != "ray":
            raise InputError(f"engine_address={self.engine_address!r} is for --engine ray, not {self.engine}.")
        if self.engine_workers is not None and self.engine_workers < 1:
            raise InputError(f"engine_workers={self.engine_workers}; it must be at least 1.")


@runtime_checkable
class Workers(Protocol):
    """Where the parts of several calls are computed; see `connected`."""

    @property
    def num_workers(self) -> int:
        """How many parts are computed at the same time, where there are as many."""

    def map_parts(
        self, prepare: Callable[[], Callable[[Part], Result]], parts: Sequence[Part]
    ) -> Iterator[tuple[Part, Result]]:
        """Compute as `map_parts` does. Begin a call when the one before is at its end."""


def map_parts(
    prepare: Callable[[], Callable[[Part], Result]], parts: Sequence[Part], *, engine: Engine, device: str = "cpu"
) -> Iterator[tuple[Part, Result]]:
    """Compute `function(part)` for every part, with `function = prepare()` made once in each worker.

    Args:
        prepare: picklable (a `functools.partial` of a module's function, or an object); it may load a model.
        parts: what to compute, in the order in which it is begun. Each may run twice: it must be idempotent.
        engine: where they are computed, and by how many workers.
        device: what a part computes on; with `cuda`, and with `auto` where there are any, every worker gets a GPU of
            its own, or as few others on it as there can be.

    Yields each part with its result, as they finish. An exception in a part stops everything and is raised here.

    Raises:
        InputError: workers die again and again, or Ray is not installed.
    """
    if parts:
        with connected(engine, device=device) as workers:
            yield from workers.map_parts(prepare, parts)


@contextlib.contextmanager
def connected(engine: Engine, *, device: str = "cpu") -> Iterator[Workers]:
    """Keep the workers of an engine for several calls of their `map_parts`: to start them takes seconds to minutes.

    At the end of the block they end.
    """
    if engine.engine == "local":
        yield _Here()
    elif engine.engine == "processes":
        gpus = _visible_gpus() if device in ("auto", "cuda") else []
        num_workers = engine.engine_workers or len(gpus) or os.cpu_count() or 1
        with contextlib.closing(_Processes(num_workers, gpus)) as processes:
            yield processes
    else:
        ray = _import_ray()
        with _cluster(ray, engine.engine_address):
            takes_gpu = device.startswith("cuda") or (device == "auto" and ray.cluster_resources().get("GPU", 0) >= 1)
            with contextlib.closing(_Actors(ray, engine.engine_workers, float(takes_gpu))) as actors:
                yield actors


class _Here:
    """Computes in this process."""

    num_workers = 1

    def map_parts(
        self, prepare: Callable[[], Callable[[Part], Result]], parts: Sequence[Part]
    ) -> Iterator[tuple[Part, Result]]:
        function = prepare()
        for part in parts:
            yield part, function(part)


_prepared: tuple[int, Callable[[Any], Any]] | None = None  # of a worker: the call, and the function of its parts


def _compute(call: int, load: Callable[[], Callable[[], Callable[[Any], Any]]], num_threads: int, part: Any) -> Any:
    """Compute a part in a worker; what `load()` prepares is kept for all parts of a call."""
    global _prepared
    if _prepared is None or _prepared[0] != call:
        _prepared = None  # it may hold much: let it go before there is more
        os.environ["OMP_NUM_THREADS"] = str(num_threads)
        prepare = load()
        if "torch" in sys.modules:  # imported with what is to be prepared: too late for the environment
            sys.modules["torch"].set_num_threads(num_threads)
        _prepared = call, prepare()
    return _prepared[1](part)


class _Processes:
    """Computes in processes of this machine, which end with this one, however it ends."""

    def __init__(self, num_workers: int, gpus: Sequence[str]) -> None:
        self.num_workers, self._gpus, self._num_calls = num_workers, gpus, 0
        self._pool: ProcessPoolExecutor | None = None

    def map_parts(
        self, prepare: Callable[[], Callable[[Part], Result]], parts: Sequence[Part]
    ) -> Iterator[tuple[Part, Result]]:
        self._num_calls += 1
        num_threads = max(1, (os.cpu_count() or 1) // min(self.num_workers, len(parts)))
        load = functools.partial(pickle.loads, pickle.dumps(prepare))
        compute = functools.partial(_compute, self._num_calls, load, num_threads)
        todo = list(parts)
        deaths = 0
        while todo:
            pool = self._pool = self._pool or _start_pool(self.num_workers, self._gpus)
            finished: set[int] = set()
            running: dict[Future[Any], int] = {}
            try:
                running |= {pool.submit(compute, part): i for i, part in enumerate(todo)}
                while running:
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        i = running.pop(future)
                        result = future.result()
                        finished.add(i)
                        deaths = 0
                        yield todo[i], result
            except BrokenProcessPool:
                self.close()
            finally:
                for future in running:
                    future.cancel()
            todo = [part for i, part in enumerate(todo) if i not in finished]
            deaths += 1
            if todo and deaths > MAX_DEATHS:
                raise InputError(_dying(todo))

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None


def _start_pool(num_workers: int, gpus: Sequence[str]) -> ProcessPoolExecutor:
    context = multiprocessing.get_context("spawn")
    places = context.SimpleQueue()  # the GPU of each worker, in turn
    for worker in range(num_workers if gpus else 0):
        places.put(gpus[worker % len(gpus)])
    begin = functools.partial(_begin, places if gpus else None)
    return ProcessPoolExecutor(num_workers, mp_context=context, initializer=begin)


def _begin(places: Any) -> None:
    """Begin as a worker: with its own GPU, before torch looks for them, and not longer than its parent."""
    if places is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = places.get()
    _end_with_parent()


def _visible_gpus() -> list[str]:
    """Return the GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    named = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    count = torch.cuda.device_count()
    return named[:count] if named else [str(number) for number in range(count)]


def _end_with_parent() -> None:
    """End this process when its parent has ended: killed, that cannot tell its workers to."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class _Actors:
    """Computes in a pool of actors on Ray; one whose node died is replaced when there is room for it.

    Only a running actor holds a part. One that is ready too late for a call waits for the next.
    """

    def __init__(self, ray: Any, num_workers: int | None, num_gpus: float) -> None:
        self._ray, self._most_workers, self._num_gpus = ray, num_workers, num_gpus
        self._worker = ray.remote(num_cpus=1, num_gpus=num_gpus)(_Worker)
        self._num_calls = 0
        self._free: list[Any] = []
        self._late: dict[Any, Any] = {}  # what actors will answer to no call any more, and which are then free

    @property
    def num_workers(self) -> int:
        """As many as were asked for, or as the cluster has room for now."""
        return self._most_workers or _room(self._ray, self._num_gpus)

    def map_parts(
        self, prepare: Callable[[], Callable[[Part], Result]], parts: Sequence[Part]
    ) -> Iterator[tuple[Part, Result]]:
        self._num_calls += 1
        shared = [self._ray.put(prepare)]  # in a list, so that an actor fetches it once and not for each part
        num_workers = min(len(parts), self.num_workers)
        todo = collections.deque(parts)
        busy: dict[Any, tuple[Any, Part]] = {}
        deaths = 0
        try:
            while todo or busy:
                for _ in range(num_workers - len(busy) - len(self._free) - len(self._late)):
                    actor = self._worker.remote()
                    self._late[actor.ready.remote()] = actor
                while todo and self._free:
                    actor, part = self._free.pop(), todo.popleft()
                    busy[actor.compute.remote(self._num_calls, shared, part)] = actor, part
                (answer,), _ = self._ray.wait([*busy, *(self._late if todo else ())], num_returns=1)
                held = busy.pop(answer, None)
                actor = self._late.pop(answer) if held is None else held[0]
                try:
                    result = self._answer(answer, of_this_call=held is not None)
                except self._ray.exceptions.RayActorError as error:
                    deaths += 1
                    todo.extendleft([] if held is None else [held[1]])
                    if deaths > MAX_DEATHS * num_workers:
                        raise InputError(_dying(todo)) from error
                    continue
                self._free.append(actor)
                if held is not None:
                    deaths = 0
                    yield held[1], result
        finally:
            self._late |= {answer: actor for answer, (actor, _) in busy.items()}

    def _answer(self, answer: Any, *, of_this_call: bool) -> Any:
        """Return what an actor answers. What a part of this call raised is raised here, as if it had run here."""
        try:
            return self._ray.get(answer)
        except self._ray.exceptions.RayTaskError as error:
            if of_this_call:
                raise error.cause from error
            return None

    def close(self) -> None:
        """End all actors. Their last answers are taken, or Ray would report each as an error that nobody handled."""
        for actor in [*self._free, *self._late.values()]:
            self._ray.kill(actor)
        for answer in self._late:
            with contextlib.suppress(self._ray.exceptions.RayError):
                self._ray.get(answer, timeout=SECONDS_TO_END)


class _Worker:
    """A Ray actor."""

    def ready(self) -> None:
        """Answer, which shows that this actor runs."""

    def compute(self, call: int, shared: list[Any], part: Any) -> Any:
        return _compute(call, lambda: _import_ray().get(shared[0]), 1, part)


@contextlib.contextmanager
def _cluster(ray: Any, address: str | None) -> Iterator[None]:
    """Connect to Ray, unless there is a connection already."""
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    address = address or os.environ.get("RAY_ADDRESS") or "local"  # Ray's default is any cluster it finds running here
    options = {"include_dashboard": False} if address == "local" else {}
    before = signal.getsignal(signal.SIGTERM)
    ray.init(address=address, logging_level="WARNING", log_to_driver=False, **options)
    if callable(before) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, before)  # Ray has replaced it by one that ends with the exit code 1
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
