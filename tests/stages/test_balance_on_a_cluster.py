"""Balance in parts: whatever the blocks, the engine, and whoever dies, the same bytes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from distilclip.engine import Engine
from distilclip.grouping.search_parts import pair_blocks, rows_of_budget
from distilclip.stages.balance import Config, main
from tests.stages.conftest import contents, write_store


def run(store: str, out: Path, **options: object) -> dict[str, bytes]:
    config = Config(store=store, out=str(out), threshold=0.3, max_threshold=0.6, metric="euclidean", **options)  # type: ignore[arg-type]
    main(config)
    return contents(out)


def test_every_pair_of_rows_is_in_one_part() -> None:
    parts = pair_blocks(10, block_rows=3)
    seen = np.zeros((10, 10), int)
    for part in parts:
        seen[slice(*part.left), slice(*part.right)] += 1
    assert (np.triu(seen) == np.triu(np.ones((10, 10)))).all()
    assert len(pair_blocks(10, block_rows=10)) == 1
    assert len({str(part) for part in parts}) == len(parts) == 10
    assert rows_of_budget(1000, 1.0) == 1000
    assert 2 * rows_of_budget(10**9, 1.0) * 512 <= 2**30


@pytest.mark.parametrize("block_rows", [pytest.param(7, marks=pytest.mark.slow), 40, 119])
def test_blocks_change_nothing(tmp_path: Path, block_rows: int) -> None:
    store, _, _ = write_store(tmp_path / "store")
    assert run(store, tmp_path / "parts", block_rows=block_rows) == run(store, tmp_path / "whole")


@pytest.mark.slow
def test_processes_change_nothing(tmp_path: Path) -> None:
    store, _, _ = write_store(tmp_path / "store")
    shared = run(store, tmp_path / "shared", execution=Engine(engine="processes", engine_workers=2))
    assert shared == run(store, tmp_path / "whole")


def test_rows_of_one_image_file_are_one_group_whatever_their_embeddings(tmp_path: Path) -> None:
    store, _, valid = write_store(tmp_path / "store", same_file=[(4, 50), (4, 100)])
    assert valid[[4, 50, 100]].all()
    out = tmp_path / "balance"
    result = main(Config(store=store, out=str(out), threshold=1e-4, metric="euclidean"))
    assert result["num_kept"] == valid.sum() - 2
    assert run(store, tmp_path / "parts", block_rows=11) == run(store, tmp_path / "whole")


@pytest.mark.xdist_group("ray")
@pytest.mark.slow
def test_a_killed_driver_and_a_killed_node_change_nothing(tmp_path: Path) -> None:
    cluster_utils = pytest.importorskip("ray.cluster_utils")
    store, _, _ = write_store(tmp_path / "store")
    out = tmp_path / "shared"
    cluster = cluster_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        second = cluster.add_node(num_cpus=1)
        driver = start_driver(store, out, cluster.address)
        wait_for_parts(out, 4, driver)
        driver.send_signal(signal.SIGKILL)
        driver.wait()
        assert not (out / "result.json").exists()
        finished = num_parts(out)
        driver = start_driver(store, out, cluster.address)
        wait_for_parts(out, finished + 4, driver)
        cluster.remove_node(second, allow_graceful=False)
        assert driver.wait(timeout=120) == 0
    finally:
        cluster.shutdown()
    assert contents(out) == run(store, tmp_path / "whole")


def start_driver(store: str, out: Path, address: str) -> subprocess.Popen[bytes]:
    flags = ["--store", store, "--out", str(out), "--threshold", "0.3", "--max-threshold", "0.6"]
    flags += ["--metric", "euclidean", "--block-rows", "5", "--engine", "ray", "--engine-address", address]
    return subprocess.Popen([sys.executable, "-m", "distilclip", "balance", *flags], env={**os.environ})


def num_parts(out: Path) -> int:
    return len(list((out / "search").glob("0*.parquet")))


def wait_for_parts(out: Path, count: int, driver: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while num_parts(out) < count:
        assert driver.poll() is None, "the driver ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
