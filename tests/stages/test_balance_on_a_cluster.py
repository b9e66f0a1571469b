"""Balance in parts: whatever the blocks, the engine, and whoever dies, the same bytes."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distilclip.data.images import ImageMatrix
from distilclip.data.store import Store
from distilclip.data.tensors import write_tensors
from distilclip.engine import Engine
from distilclip.grouping import search_parts
from distilclip.grouping import sorted_rows as sorted_rows_module
from distilclip.grouping.search_parts import StoreSearch
from distilclip.grouping.sorted_rows import CellSort, SortedRows
from distilclip.stages.balance import Config, main
from distilclip.vectors.tolerance import Tolerance
from tests.stages.conftest import contents, write_store


def run(store: str, out: Path, **options: object) -> dict[str, bytes]:
    options = {"threshold": 0.3, "max_threshold": 0.6, **options}
    config = Config(store=store, out=str(out), metric="euclidean", device="cpu", **options)  # type: ignore[arg-type]
    main(config)
    return contents(out)


@pytest.fixture
def many_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many cells as a larger store has, so that parts leave out what is far from them."""
    monkeypatch.setattr(search_parts, "default_num_cells", lambda num_points: min(12, num_points))


def sorted_rows(store: str, folder: Path, *, block_rows: int, most_near: int = 1000, num_searched: int = 0) -> CellSort:
    """The sorted rows of a store, with what is chosen of them."""
    images = ImageMatrix(Store.open(store))
    near = Tolerance(0.6, "euclidean")
    sort = CellSort(
        folder=str(folder),
        num_rows=len(images),
        near=near,
        block_rows=block_rows,
        most_near=most_near,
        num_searched=num_searched,
    )
    sort.fit(images, images.valid(), 12)
    for block in sort.blocks:
        sort.sort(images, images.valid(), block)
    sort.join()
    for block in sort.blocks:
        SortedRows(sort).choose(block)
    return sort


@pytest.mark.parametrize("num_searched", [0, 50, 110])
def test_every_near_pair_of_distinct_rows_is_in_one_part(tmp_path: Path, num_searched: int) -> None:
    """Of pairs that are not near, most are in none."""
    store, x, valid = write_store(tmp_path / "store")
    sort = sorted_rows(store, tmp_path / "sorted", block_rows=11, most_near=7, num_searched=num_searched)
    rows, parts = SortedRows(sort), SortedRows(sort).parts
    seen = np.zeros((120, 120), int)
    num_batches = 0
    for part in parts:
        for near in rows.read(part):
            assert (np.diff(near.rows) > 0).all()
            np.testing.assert_array_equal(near.values, x[near.rows])
            cells, number = near.cells, near.rows[near.distinct][near.cells.order]
            assert cells.num_seeking <= part[1] - part[0] <= 11
            assert (number[: cells.num_seeking] >= num_searched).all()
            for place in range(cells.num_seeking):
                later = number[max(place + 1, cells.num_met) :]
                np.add.at(seen, (np.minimum(number[place], later), np.maximum(number[place], later)), 1)
            num_batches += 1
    x = x.astype(np.float64)
    near_pairs = np.triu(np.linalg.norm(x[:, None] - x[None], axis=2) < 0.6, k=1)
    near_pairs &= valid[:, None] & valid[None] & (np.arange(120) >= num_searched)
    assert near_pairs.any()
    assert (seen[near_pairs] == 1).all()
    assert seen.max() == 1
    if not num_searched:
        assert num_batches > len(parts) == 10
        assert seen.sum() < 0.8 * valid.sum() ** 2 / 2


@pytest.mark.usefixtures("many_cells")
def test_equal_rows_of_several_blocks_are_joined_to_the_first_of_all(tmp_path: Path) -> None:
    """Ties: the same few rows over and over, so that whole groups lie at the distance 0 and others at one distance."""
    random = np.random.default_rng(1)
    x = np.eye(4)[random.integers(0, 4, 60)] + 0.25 * np.eye(4)[random.integers(0, 4, 60)]
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    store, _, _ = write_store(tmp_path / "store", rows=20, dim=4, images=x)
    for threshold in (0.01, 0.5, 1.5):
        reach = {"threshold": threshold, "max_threshold": threshold}
        whole = run(store, tmp_path / f"whole{threshold}", **reach)
        for block_rows in (7, 20, 31):
            assert run(store, tmp_path / f"{block_rows}-{threshold}", block_rows=block_rows, **reach) == whole


def test_another_block_size_sorts_anew_and_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, _, _ = write_store(tmp_path / "store")
    with monkeypatch.context() as patched:
        patched.setattr(StoreSearch, "_meet", lambda *arguments: stop())
        with pytest.raises(KeyboardInterrupt):
            run(store, tmp_path / "parts", block_rows=30)
    left = list((tmp_path / "parts" / "search" / "sorted").glob("*.safetensors"))
    assert len(left) == 4 + 4 + 2  # sorted blocks, what is chosen of each, and what all share
    assert run(store, tmp_path / "parts", block_rows=41) == run(store, tmp_path / "whole")


def stop() -> None:
    raise KeyboardInterrupt


@pytest.mark.usefixtures("many_cells")
@pytest.mark.parametrize("block_rows", [pytest.param(1, marks=pytest.mark.slow), 7, 40, 119])
def test_blocks_change_nothing(tmp_path: Path, block_rows: int) -> None:
    store, _, _ = write_store(tmp_path / "store")
    assert run(store, tmp_path / "parts", block_rows=block_rows) == run(store, tmp_path / "whole")


@pytest.mark.usefixtures("many_cells")
def test_a_kill_after_any_file_of_a_search_in_parts_leaves_the_same_bytes(tmp_path: Path) -> None:
    store, _, _ = write_store(tmp_path / "store")
    whole, out, written = run(store, tmp_path / "whole"), tmp_path / "parts", 0
    while not (out / "result.json").exists():
        write = stop_after(1)
        with pytest.MonkeyPatch.context() as patched:
            for module in (sorted_rows_module, search_parts):
                patched.setattr(module, "write_tensors", write)
            with contextlib.suppress(KeyboardInterrupt):
                run(store, out, block_rows=40)
        now = len(list((out / "search").rglob("*.safetensors")))
        finished = (out / "result.json").exists()  # and what the search wrote is removed
        assert now == (0 if finished else written + 1)
        written += not finished
    assert written + 1 == 1 + 3 + 1 + 3 + 3  # the run that ends writes the last one
    assert contents(out) == whole


def stop_after(count: int) -> Callable[..., None]:
    """Write so many files, and be interrupted before the next."""
    left = iter(range(count))

    def write(*arguments: Any) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt
        write_tensors(*arguments)

    return write


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
    return len(list((out / "search" / "sorted").glob("*.safetensors")))


def wait_for_parts(out: Path, count: int, driver: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while num_parts(out) < count:
        assert driver.poll() is None, "the driver ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
