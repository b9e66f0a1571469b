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
from distilclip.clustering.fit_options import FitOptions
from distilclip.clustering.kmeans import kmeans
from distilclip.data.side_files import read_centers, read_labels
from distilclip.engine import Engine
from distilclip.errors import InputError
from distilclip.stages import balance
from distilclip.stages.cluster import Config, main
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


def test_centers_are_those_of_kmeans_whatever_the_shards_and_the_engine(tmp_path: Path) -> None:
    stores = [write_store(tmp_path / name, rows=rows, shards=shards) for name, rows, shards in SHARDS]
    _, x, valid = stores[0]
    whole = kmeans(x[valid], num_centers=6, num_iterations=2, seed=3)
    for number, (store, _, _) in enumerate(stores):
        for engine in ("local", "processes") if number == 1 else ("local",):
            out = str(tmp_path / f"{number}{engine}")
            result = main(
                Config(
                    store=store,
                    out=out,
                    fit=FIT,
                    device="cpu",
                    execution=Engine(engine=engine),
                )
            )
            assert read_centers(out).tobytes() == whole.centers.tobytes()
            labels = np.concatenate([read_labels(out, shard).cluster for shard in range(SHARDS[number][2])])
            np.testing.assert_array_equal(labels, whole.labels)
            assert result["objective"] == pytest.approx(whole.objective)
            assert len(result["objectives"]) == 3
            assert not (Path(out) / "rounds").exists()


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
    for kill_at in (6, 13):  # in the middle of the first round, and of a later one
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
