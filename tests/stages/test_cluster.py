import itertools
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distilclip.clustering import fit_parts, sketches
from distilclip.clustering import kmeans as kmeans_module
from distilclip.clustering.assignment import Assignment
from distilclip.clustering.fit_options import FitOptions
from distilclip.clustering.kmeans import kmeans
from distilclip.clustering.sums import CenterSums, Tally
from distilclip.data.side_files import read_centers, read_labels
from distilclip.engine import Engine
from distilclip.errors import InputError
from distilclip.stages import balance, cluster
from distilclip.stages.cluster import Config, main
from distilclip.vectors.points import Points
from tests.stages.conftest import contents, write_store

SHARDS = [("one", 120, 1), ("three", 40, 3), ("twelve", 10, 12)]  # name, rows of a shard, shards: the same rows
FIT = FitOptions(num_centers=6, num_iterations=2, seed=3)


def balanced(tmp_path: Path) -> tuple[str, str, np.ndarray, np.ndarray]:
    """A store, its balance folder, its rows, and which of them are kept."""
    store, x, valid = write_store(tmp_path / "store")
    groups = str(tmp_path / "balance")
    balance.main(balance.Config(store=store, out=groups, threshold=0.3, metric="euclidean", device="cpu"))
    from distilclip.grouping.balance import balance as balance_rows

    return store, groups, x, balance_rows(x, threshold=0.3, metric="euclidean", valid=valid).keep


def test_labels_are_the_nearest_centers_of_the_kept_rows(tmp_path: Path) -> None:
    store, groups, x, keep = balanced(tmp_path)
    out = tmp_path / "cluster"
    result = main(Config(store=store, groups=groups, out=str(out), fit=FitOptions(num_centers=5), device="cpu"))
    centers = read_centers(str(out))
    assert centers.shape == (5, 16)
    similarity = x.astype(np.float64) @ centers.astype(np.float64).T
    similarity /= np.maximum(np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True), 1e-9)
    distances = []
    for shard in range(3):
        part = read_labels(str(out), shard)
        rows = shard * 40 + part.row.astype(int)
        np.testing.assert_array_equal(rows, shard * 40 + np.flatnonzero(keep[shard * 40 : shard * 40 + 40]))
        np.testing.assert_array_equal(part.cluster, similarity[rows].argmax(axis=1))
        np.testing.assert_allclose(part.distance, 1 - similarity[rows].max(axis=1), atol=1e-6)
        distances.append(part.distance)
    assert result["num_labelled"] == keep.sum()
    assert result["objective"] == pytest.approx(np.concatenate(distances).mean())
    before, after = result["sizes_before_balance"], result["sizes"]
    assert sum(after["histogram"]) == sum(before["histogram"]) == 5
    assert before["largest"] > after["largest"]


def test_without_groups_every_valid_row_is_labelled(tmp_path: Path) -> None:
    store, _, valid = write_store(tmp_path / "store")
    result = main(
        Config(store=store, out=str(tmp_path / "c"), fit=FitOptions(num_centers=4, points_per_center=5), device="cpu")
    )
    assert result["num_labelled"] == valid.sum()
    assert result["sizes_before_balance"] is None


def test_a_kill_after_any_file_leaves_the_same_bytes(tmp_path: Path) -> None:
    store, groups, _, _ = balanced(tmp_path)
    config: dict[str, Any] = {"store": store, "groups": groups, "fit": FitOptions(num_centers=6), "device": "cpu"}
    whole = tmp_path / "whole"
    result = main(Config(out=str(whole), **config))
    written = sorted(whole.rglob("*.*"), key=lambda p: p.stat().st_mtime_ns)
    written = [p for p in written if p.name not in ("config.json", "env.json", "inputs.json")]
    for kept in range(len(written)):
        cut = tmp_path / f"cut{kept}"
        shutil.copytree(whole, cut)
        for path in written[kept:]:
            (cut / path.relative_to(whole)).unlink()
        assert main(Config(out=str(cut), **config)) == result
        assert contents(cut) == contents(whole)


def divide(monkeypatch: pytest.MonkeyPatch, *, parts: int, numbers: int) -> None:
    """Let a round have so many parts, and so many numbers in a range of centers."""
    monkeypatch.setattr(cluster, "choose_num_parts", lambda *_, **__: parts)
    monkeypatch.setattr(fit_parts, "NUMBERS", numbers)


@pytest.mark.parametrize(("shards", "parts", "numbers"), [(0, 1, 1 << 22), (1, 3, 32), (2, 5, 1)])
def test_centers_are_those_of_kmeans_whatever_the_shards_and_the_parts(
    shards: int, parts: int, numbers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, rows, num_shards = SHARDS[shards]
    store, x, valid = write_store(tmp_path / "store", rows=rows, shards=num_shards)
    whole = kmeans(x[valid], num_centers=6, num_iterations=2, seed=3)
    divide(monkeypatch, parts=parts, numbers=numbers)
    out = str(tmp_path / "out")
    result = main(Config(store=store, out=out, fit=FIT, device="cpu"))
    assert read_centers(out).tobytes() == whole.centers.tobytes()
    labels = np.concatenate([read_labels(out, shard).cluster for shard in range(num_shards)])
    np.testing.assert_array_equal(labels, whole.labels)
    assert result["objective"] == pytest.approx(whole.objective)
    assert len(result["objectives"]) == 3
    assert not (Path(out) / "rounds").exists()


def test_empty_clusters_are_split_across_ranges_as_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def twice(points: Points, rows: np.ndarray, *, num_centers: int, **_: Any) -> np.ndarray:
        return points.block(rows[np.arange(num_centers) // 2]).numpy()  # of two equal centers the second gets no row

    monkeypatch.setattr(kmeans_module, "first_centers", twice)
    store, x, valid = write_store(tmp_path / "store")
    whole = kmeans(x[valid], num_centers=9, num_iterations=4)
    divide(monkeypatch, parts=3, numbers=32)
    empty: list[int] = []
    splits = Tally.splits
    monkeypatch.setattr(Tally, "splits", lambda tally: empty.append(tally.num_empty) or splits(tally))
    main(Config(store=store, out=str(tmp_path / "out"), fit=FitOptions(num_centers=9, num_iterations=4), device="cpu"))
    assert empty[0] == 4
    assert read_centers(str(tmp_path / "out")).tobytes() == whole.centers.tobytes()


def forbidden(*_: Any, **__: Any) -> Any:
    raise AssertionError("this is for workers")


def test_processes_give_the_bytes_of_kmeans_and_the_driver_adds_up_no_sums(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, x, valid = write_store(tmp_path / "store")
    whole = kmeans(x[valid], num_centers=6, num_iterations=2, seed=3)
    for method in ("zero", "add", "tally", "renew"):
        monkeypatch.setattr(CenterSums, method, forbidden)
    monkeypatch.setattr(fit_parts.Rounds, "centers", forbidden)
    out = str(tmp_path / "out")
    execution = Engine(engine="processes", engine_workers=2)
    result = main(Config(store=store, out=out, fit=FIT, device="cpu", execution=execution))
    assert read_centers(out).tobytes() == whole.centers.tobytes()
    assert result["objective"] == pytest.approx(whole.objective)


def test_only_the_last_round_keeps_its_sums(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, _, _ = write_store(tmp_path / "store")
    monkeypatch.setattr(fit_parts.Rounds, "_write_centers", forbidden)
    with pytest.raises(AssertionError, match="for workers"):
        main(Config(store=store, out=str(tmp_path / "cut"), fit=FIT, device="cpu"))
    rounds = tmp_path / "cut" / "rounds"
    assert sorted(path.name for path in rounds.glob("0*")) == ["0001", "0002", "0003"]  # the last one never began
    assert [path.parent.name for path in rounds.rglob("sums-*")] == ["0002"]


def test_a_part_that_was_cut_off_is_summed_anew_without_a_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, _, _ = write_store(tmp_path / "store")
    config = {"store": store, "fit": FIT, "device": "cpu"}
    result = main(Config(out=str(tmp_path / "whole"), **config))
    with monkeypatch.context() as interrupted:
        interrupted.setattr(fit_parts.Rounds, "_move", forbidden)
        with pytest.raises(AssertionError, match="for workers"):
            main(Config(out=str(tmp_path / "cut"), **config))
    rounds = fit_parts.Rounds(store=store, folder=str(tmp_path / "cut" / "rounds"), device="cpu", num_centers=6, dim=16)
    (sums,) = (tmp_path / "cut" / "rounds" / "0000").glob("sums-*")
    before = sums.read_bytes()
    sums.unlink()
    with monkeypatch.context() as searching:
        searching.setattr(Assignment, "update", forbidden)
        rounds.prepare_sums(0)(fit_parts.Range(0, 3))
    assert sums.read_bytes() == before
    divide(monkeypatch, parts=2, numbers=1 << 22)  # as with other workers
    assert main(Config(out=str(tmp_path / "cut"), **config)) == result
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.xdist_group("ray")
def test_ray_gives_the_bytes_of_local(tmp_path: Path) -> None:
    store, _, _ = write_store(tmp_path / "store")
    config = {"store": store, "fit": FIT, "device": "cpu"}
    here = main(Config(out=str(tmp_path / "local"), **config))
    there = main(Config(out=str(tmp_path / "ray"), execution=Engine(engine="ray", engine_workers=2), **config))
    assert there == here
    assert contents(tmp_path / "ray") == contents(tmp_path / "local")


@pytest.mark.slow
def test_a_kill_in_the_middle_of_a_round_leaves_the_same_bytes(tmp_path: Path) -> None:
    store, groups, _, _ = balanced(tmp_path)
    config = {"store": store, "groups": groups, "fit": FitOptions(num_centers=6, points_per_center=12), "device": "cpu"}
    result = main(Config(out=str(tmp_path / "whole"), **config))
    assert len(result["objectives"]) > 3
    begun = """
import os, signal, sys
from distilclip.clustering import fit_parts
from distilclip.clustering.fit_options import FitOptions
from distilclip.stages.cluster import Config, main
write, kill_at, calls = fit_parts.write_tensors, int(sys.argv[1]), []
def write_or_die(*arguments):
    calls.append(arguments)
    if len(calls) == kill_at:
        os.kill(os.getpid(), signal.SIGKILL)
    return write(*arguments)
fit_parts.write_tensors = write_or_die
main(Config(**eval(sys.argv[2])))
"""
    for kill_at in (6, 13, 16):  # among the shards of a round, among its centers, and among the shards of the next
        cut = tmp_path / f"cut{kill_at}"
        arguments = [str(kill_at), repr({"out": str(cut), **config})]
        died = subprocess.run([sys.executable, "-c", begun, *arguments], env=dict(os.environ), check=False)
        assert died.returncode == -signal.SIGKILL
        assert not (cut / "centers.safetensors").exists()
        assert main(Config(out=str(cut), **config)) == result
        assert contents(cut) == contents(tmp_path / "whole")


def test_machines_with_other_codes_may_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, groups, _, _ = balanced(tmp_path)
    config: dict[str, Any] = {"store": store, "groups": groups, "fit": FitOptions(num_centers=6), "device": "cpu"}
    result = main(Config(out=str(tmp_path / "whole"), **config))
    assert len(result["objectives"]) > 2
    kinds = itertools.cycle([np.int8, np.float32])
    prepare = fit_parts.Rounds.prepare_sums

    def prepare_elsewhere(self: fit_parts.Rounds, number: int) -> Callable[[fit_parts.Range], None]:
        kind = next(kinds)
        for module in (fit_parts, sketches):
            monkeypatch.setattr(module, "fastest_code", lambda: kind)
        return prepare(self, number)

    monkeypatch.setattr(fit_parts.Rounds, "prepare_sums", prepare_elsewhere)
    assert main(Config(out=str(tmp_path / "mixed"), **config)) == result
    assert contents(tmp_path / "mixed") == contents(tmp_path / "whole")


def test_groups_of_another_store_are_refused(tmp_path: Path) -> None:
    _, groups, _, _ = balanced(tmp_path)
    other, _, _ = write_store(tmp_path / "other", rows=30)
    with pytest.raises(InputError, match="made for another store"):
        main(Config(store=other, groups=groups, out=str(tmp_path / "c"), fit=FitOptions(num_centers=2), device="cpu"))


def test_more_centers_than_kept_rows_is_an_error(tmp_path: Path) -> None:
    store, groups, _, keep = balanced(tmp_path)
    with pytest.raises(InputError, match=f"number of rows, {keep.sum()}"):
        main(Config(store=store, groups=groups, out=str(tmp_path / "c"), fit=FitOptions(num_centers=120), device="cpu"))
    with pytest.raises(InputError, match="num_centers is 0"):
        FitOptions(num_centers=0)
