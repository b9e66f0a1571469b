"""k-means in parts on two Ray nodes of this machine: which share of the time is the driver's, and how much memory.

No peer: the question is whether the driver, which is one process, will hold up many workers. Its time is what passes
between two waves of parts, when nobody else works, and its CPU time during them, when it hands them out. First centers
are drawn before the first round, also by the driver; that is told apart. At full size there are two rounds and no
labelling, since a round takes minutes; `--quick` is a whole stage, and its centers are compared with those of a run
without Ray.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import resource
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from _embeddings import clip_like
from _harness import is_quick, machine
from _stores import write_store

from distilclip.clustering import kmeans
from distilclip.clustering.fit_options import FitOptions
from distilclip.clustering.label_parts import Labelling
from distilclip.configs.cluster import Config
from distilclip.engine import Engine, Workers, connected
from distilclip.stages import cluster

NUM_SHARDS = 64
NUM_ROUNDS = 2
POLL_SECONDS = 0.5


@dataclass
class Watched:
    """Workers, and a note of each call: what is computed, when it begins and ends, and the driver's CPU time in it."""

    workers: Workers
    labels: bool
    calls: list[tuple[str, float, float, float]] = field(default_factory=list)

    @property
    def num_workers(self) -> int:
        return self.workers.num_workers

    def map_parts(self, prepare: Callable[[], Callable[[Any], Any]], parts: Sequence[Any]) -> Iterator[tuple[Any, Any]]:
        function = getattr(prepare, "func", prepare)
        if isinstance(getattr(function, "__self__", None), Labelling) and not self.labels:
            raise RoundsAreOver
        begun, cpu = time.monotonic(), time.process_time()
        yield from self.workers.map_parts(prepare, parts)
        self.calls.append((function.__name__, begun, time.monotonic(), time.process_time() - cpu))


class RoundsAreOver(Exception):  # noqa: N818 - no error
    """Labels are not wanted."""


def drive(config: Config, *, labels: bool, answer: Any) -> None:
    """Run the stage in this process, a child, and send what it took."""
    watched: list[Watched] = []

    @contextlib.contextmanager
    def connected_and_watched(engine: Engine, *, device: str) -> Iterator[Watched]:
        with connected(engine, device=device) as workers:
            watched.append(Watched(workers, labels))
            yield watched[0]

    cluster.connected = connected_and_watched  # type: ignore[assignment]
    kmeans.REPAIRS = 0  # the number of rounds shall not depend on clusters found empty
    begun, cpu = time.monotonic(), time.process_time()
    with contextlib.suppress(RoundsAreOver):
        cluster.main(config)
    usage = resource.getrusage(resource.RUSAGE_SELF)
    answer.send(
        {
            "begun": begun,
            "ended": time.monotonic(),
            "cpu": time.process_time() - cpu,
            "peak_mb": usage.ru_maxrss * 1024 / 1e6,
            "calls": watched[0].calls,
        }
    )


def watch_workers(peaks: dict[int, int], over: threading.Event) -> None:
    """Keep the largest resident memory of each Ray actor, in kilobytes; Ray names a process by what it runs."""
    while not over.wait(POLL_SECONDS):
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if (path / "cmdline").read_bytes().startswith(b"ray::_Worker"):
                    for line in (path / "status").read_text().splitlines():
                        if line.startswith("VmHWM:"):
                            peaks[int(path.name)] = int(line.split()[1])


def measured(config: Config, *, labels: bool) -> dict[str, Any]:
    """Run the stage in a process of its own; what it took, and the largest memory of any worker."""
    context = multiprocessing.get_context("spawn")
    receive, answer = context.Pipe(duplex=False)
    peaks: dict[int, int] = {}
    over = threading.Event()
    watcher = threading.Thread(target=watch_workers, args=(peaks, over))
    driver = context.Process(target=drive, args=(config,), kwargs={"labels": labels, "answer": answer})
    watcher.start()
    driver.start()
    answer.close()  # the driver has its own: where it fails, there is an end and no answer
    try:
        found: dict[str, Any] = receive.recv()
    finally:
        driver.join()
        over.set()
        watcher.join()
    return {**found, "worker_peak_mb": max(peaks.values(), default=0) * 1024 / 1e6}


def on_two_nodes(config: Callable[[str], Config], *, labels: bool) -> dict[str, Any]:
    """Run the stage on two nodes of one core each; `config` is told the address of the cluster."""
    os.environ["RAY_TMPDIR"] = "/tmp"  # a socket's path may have 107 characters
    os.environ["RAY_raylet_start_wait_time_s"] = "600"  # noqa: SIM112 - half a minute is too short on a busy machine
    import ray.cluster_utils

    nodes = ray.cluster_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        nodes.add_node(num_cpus=1)
        return measured(config(nodes.address), labels=labels)
    finally:
        nodes.shutdown()


def shares(found: dict[str, Any]) -> dict[str, float]:
    """Seconds of a run by whose they are."""
    rounds = [call for call in found["calls"] if call[0] in ("prepare_sums", "prepare_move")]
    first, last = rounds[0][1], rounds[-1][2]
    waves = sum(end - begin for _, begin, end, _ in rounds)
    return {
        "start_s": first - found["begun"],
        "rounds_s": last - first,
        "sums_s": sum(end - begin for name, begin, end, _ in rounds if name == "prepare_sums"),
        "move_s": sum(end - begin for name, begin, end, _ in rounds if name == "prepare_move"),
        "between_s": last - first - waves,
        "handing_out_s": sum(cpu for *_, cpu in rounds),
    }


def run(place: Path, *, num_rows: int, dim: int, num_centers: int, quick: bool) -> dict[str, Any]:
    """One case: its line of the table, and the sentences below it."""
    rows = clip_like(num_rows, dim)
    write_store(place / "store", rows, rows, rows_of_shard=-(-num_rows // NUM_SHARDS))
    del rows
    fit = FitOptions(num_centers=num_centers, num_iterations=NUM_ROUNDS - 1)

    def config(out: str, engine: Engine) -> Config:
        return Config(store=str(place / "store"), out=str(place / out), fit=fit, device="cpu", execution=engine)

    found = on_two_nodes(
        lambda address: config("there", Engine(engine="ray", engine_address=address, engine_workers=2)), labels=quick
    )
    equal = None
    if quick:
        cluster.main(config("here", Engine()))
        equal = len({(place / out / "centers.safetensors").read_bytes() for out in ("here", "there")}) == 1
    part = shares(found)
    driver = part["between_s"] + part["handing_out_s"]
    seconds = found["ended"] - found["begun"]
    name = f"{num_rows:,} x {dim}, {num_centers:,} centers, {NUM_ROUNDS} rounds"
    said = (
        f"{name} on two Ray nodes of one core: driver {driver:.2f} s of {part['rounds_s']:.0f} s, "
        f"{driver / part['rounds_s']:.2%} ({part['between_s']:.2f} s between waves, {part['handing_out_s']:.2f} s of "
        f"CPU in them); first waves {part['sums_s']:.0f} s, second {part['move_s']:.1f} s; peak memory "
        f"{found['peak_mb']:,.0f} MB of the driver, {found['worker_peak_mb']:,.0f} MB of a worker. First centers, "
        f"before: {part['start_s']:.0f} s of {seconds:.0f} s in all."
    )
    case = {
        "case": name,
        "ours_s": part["rounds_s"],
        "peer_s": None,
        "ratio": None,
        "ours_peak_mb": found["worker_peak_mb"],
        "peer_peak_mb": None,
        "equal": equal,
    }
    return {"case": case, "said": said}


def main() -> None:
    quick = is_quick(__doc__ or "")
    size = {"num_rows": 40_000, "num_centers": 1_000} if quick else {"num_rows": 4_000_000, "num_centers": 100_000}
    place = Path(tempfile.mkdtemp(prefix="distilclip-bench-"))
    try:
        found = run(place, dim=64, quick=quick, **size)
    finally:
        shutil.rmtree(place)
    print(found["said"])
    notes = {"driver": [found["said"]]}
    print(json.dumps({"name": "kmeans_on_ray", "cases": [found["case"]], "notes": notes, "machine": machine()}))


if __name__ == "__main__":
    main()
