"""Kill Ray workers by chance while stages compute, and a node: they end with the bytes of a run on one machine."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.faults import stage_cases
from tests.faults.children import differences, run_stage, snapshot
from tests.faults.crash_points import outcome
from tests.faults.long_training import children_of
from tests.faults.outcome import Outcome, Size
from tests.faults.stage_cases import World

SECONDS = 900
"""A stage that takes longer hangs."""
MORE = {"embed": (), "balance": ("--block-rows", "40"), "cluster": ()}
"""Flags that make more parts."""
OWN = ("config.json", "env.json", "inputs.json", "result.json")
"""Files that may name what the run was: the results are compared without."""


def drill(folder: Path, *, size: Size) -> list[Outcome]:
    """Three stages on two nodes; there is no small size of it: Ray takes long to start, and tests/stages has a test."""
    started = time.monotonic()
    world = stage_cases.make(folder / "world", shards=10, rows=40, stages=("embed", "balance"))
    found = [kill_workers(world, name) for name in (MORE if size == "full" else ("balance",))]
    num_kills = sum(killed.num_workers + killed.num_nodes for killed in found)
    return [
        outcome(
            "Stages on a Ray cluster whose workers and nodes are killed give the bytes of a run on one machine.",
            f"{', '.join(MORE)} on two nodes; after a finished part, by chance, SIGKILL of a worker, and once in each "
            "stage of a node, for which another comes.",
            [(num_kills, [killed.problem for killed in found if killed.problem])],
            started,
        )
    ]


@dataclass(frozen=True, kw_only=True)
class Killed:
    """How many workers and nodes a stage lost, and what was wrong with what it gave."""

    num_workers: int
    num_nodes: int
    problem: str


def kill_workers(world: World, name: str) -> Killed:
    """Run a stage on a cluster of two nodes, and kill what computes for it."""
    os.environ["RAY_TMPDIR"] = "/tmp"  # a socket's path may have 107 characters
    os.environ["RAY_raylet_start_wait_time_s"] = "120"  # noqa: SIM112 - half a minute is too short when the machine is busy
    import ray.cluster_utils

    case = stage_cases.cases(world)[name]
    case.clear()
    ended = run_stage((*case.argv, *MORE[name]), world.folder)
    if ended.code:
        raise AssertionError(f"{case.argv} gave {ended.code}: {ended.said}")
    before = {path: digest for path, digest in snapshot(case.out).items() if path not in OWN}
    case.clear()
    cluster = ray.cluster_utils.Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False}
    )
    try:
        node = cluster.add_node(num_cpus=1)
        said = world.folder / "said.txt"
        flags = (
            *case.argv,
            *MORE[name],
            "--engine",
            "ray",
            "--engine-address",
            cluster.address,
            "--engine-workers",
            "2",
        )
        with said.open("w") as file:
            driver = subprocess.Popen([sys.executable, "-m", "distilclip", *flags], stdout=file, stderr=file)
        killed = _kill_while(driver, case.out, lambda: _replace_node(cluster, node))
        if driver.returncode:
            return Killed(**killed, problem=f"{name} gave {driver.returncode}: {said.read_text()[-400:]}")
    finally:
        cluster.shutdown()
    after = {path: digest for path, digest in snapshot(case.out).items() if path not in OWN}
    changes = differences(before, after)
    return Killed(**killed, problem=f"{name}: {', '.join(changes)}" if changes else "")


def _replace_node(cluster: Any, node: Any) -> None:
    cluster.remove_node(node, allow_graceful=False)
    cluster.add_node(num_cpus=1)


def _kill_while(driver: subprocess.Popen[bytes], out: Path, kill_node: Callable[[], None]) -> dict[str, int]:
    """Kill by chance whenever a part is finished, until the driver ends."""
    draw, num_workers, num_nodes, parts = random.Random(0), 0, 0, 0
    deadline = time.monotonic() + SECONDS
    while driver.poll() is None:
        if time.monotonic() > deadline:
            driver.kill()
            raise TimeoutError(f"a driver hung for {SECONDS} s")
        time.sleep(0.02)
        there = sum(path.suffix in (".parquet", ".safetensors") for path in out.rglob("*"))
        if there <= parts:
            continue
        parts = there
        if num_nodes == 0 and num_workers:
            num_nodes += 1
            kill_node()
        elif draw.random() < 0.6 and (workers := ray_workers()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(draw.choice(workers), signal.SIGKILL)
                num_workers += 1
    return {"num_workers": num_workers, "num_nodes": num_nodes}


def ray_workers() -> list[int]:
    """Return the actors below this process: Ray names a process by what it runs."""
    found, below = [], [os.getpid()]
    while below:
        started = children_of(below.pop())
        below += started
        for pid in started:
            with contextlib.suppress(OSError):
                if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"ray::_Worker"):
                    found.append(pid)
    return sorted(found)
