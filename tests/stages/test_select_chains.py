"""Chains of `select` and `balance`: either after the other, and one definition of the rows to train on."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

import distilclip as dc
from distilclip import cli
from distilclip.data.images import ImageMatrix
from distilclip.data.pairs import join_stores
from distilclip.data.side_files import read_groups, read_labels
from distilclip.data.store import Store
from distilclip.engine import Engine
from distilclip.errors import InputError
from distilclip.export.selection import open_selection
from distilclip.grouping.rule import RuleName
from distilclip.stages import balance, select
from tests.export.conftest import make
from tests.stages.conftest import contents, write_store


@pytest.fixture
def selected(tmp_path: Path) -> tuple[str, str, np.ndarray]:
    """A store, a selection of it, and which of all rows that keeps."""
    store, _, _ = write_store(tmp_path / "store", text_noise=1.0, same_file=[(3, 50), (4, 90), (5, 6)])
    groups = str(tmp_path / "selected")
    select.main(select.Config(store=store, out=groups, score="clip-score", top=0.7, device="cpu"))
    kept = ImageMatrix(Store.open(store), groups).valid()
    assert 0 < kept.sum() < ImageMatrix(Store.open(store)).valid().sum()
    return store, groups, kept


def config(store: str, out: Path, **options: Any) -> balance.Config:
    return balance.Config(store=store, out=str(out), metric="euclidean", device="cpu", **options)


@pytest.mark.parametrize("rule", get_args(RuleName))
def test_a_balance_of_a_selection_is_that_of_its_rows_alone(
    rule: RuleName, selected: tuple[str, str, np.ndarray], tmp_path: Path
) -> None:
    store, groups, kept = selected
    options: dict[str, Any] = {"threshold": 0.6, "rule": rule, "top_k": 3 if rule == "topk" else None}
    result = balance.main(config(store, tmp_path / "whole", groups=groups, **options))
    images = ImageMatrix(Store.open(store))
    alone = dc.balance(images.read(0, len(images)), metric="euclidean", valid=kept, **options)
    assert result["num_valid"] == kept.sum()
    assert result["num_kept"] == alone.keep.sum() < kept.sum()
    for shard, (start, stop) in enumerate(zip(images.starts[:-1], images.starts[1:], strict=True)):
        table = read_groups(str(tmp_path / "whole"), shard)
        rows = np.flatnonzero(kept[start:stop])
        np.testing.assert_array_equal(table.row, rows)
        np.testing.assert_array_equal(images.rows(table.representative), alone.representative[start:stop][rows])
        np.testing.assert_array_equal(images.rows(table.group), alone.group[start:stop][rows])
    assert cli.main(["verify", str(tmp_path / "whole")]) == 0
    if rule != "topk":
        parts = config(store, tmp_path / "parts", groups=groups, block_rows=17, **options)
        assert balance.main(parts) == result
        assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


def test_kills_and_cuts_of_a_balanced_selection_change_no_byte(
    selected: tuple[str, str, np.ndarray], tmp_path: Path
) -> None:
    store, groups, _ = selected
    options: dict[str, Any] = {"groups": groups, "threshold": 0.3, "max_threshold": 0.6, "rule": "complete"}
    result = balance.main(config(store, tmp_path / "whole", **options))
    for name in ("result.json", "groups/000001.parquet"):
        (tmp_path / "whole" / name).unlink()
    assert balance.main(config(store, tmp_path / "whole", **options)) == result
    cut = config(store, tmp_path / "cut", groups=groups, from_folder=str(tmp_path / "whole"), threshold=0.4)
    own = balance.main(config(store, tmp_path / "own", groups=groups, threshold=0.4, max_threshold=0.6))
    assert balance.main(cut) == own
    assert contents(tmp_path / "cut") == contents(tmp_path / "own")
    with pytest.raises(InputError, match=r"whole searched the rows of --groups .*selected, not None: give the same"):
        balance.main(config(store, tmp_path / "all", from_folder=str(tmp_path / "whole"), threshold=0.4))


@pytest.mark.slow
def test_processes_balance_a_selection_to_the_same_bytes(selected: tuple[str, str, np.ndarray], tmp_path: Path) -> None:
    store, groups, _ = selected
    options: dict[str, Any] = {"groups": groups, "threshold": 0.3, "max_threshold": 0.6, "rule": "complete"}
    balance.main(config(store, tmp_path / "whole", **options))
    engine = Engine(engine="processes", engine_workers=2)
    balance.main(config(store, tmp_path / "processes", block_rows=40, execution=engine, **options))
    assert contents(tmp_path / "processes") == contents(tmp_path / "whole")


def test_verify_finds_a_balance_of_other_rows_than_its_selection(
    selected: tuple[str, str, np.ndarray], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store, groups, _ = selected
    result = balance.main(config(store, tmp_path / "some", groups=groups, threshold=0.3))
    balance.main(config(store, tmp_path / "all", threshold=0.3))
    name = "groups/000001.parquet"
    (tmp_path / "some" / "result.json").unlink()
    (tmp_path / "some" / name).write_bytes((tmp_path / "all" / name).read_bytes())
    assert cli.main(["verify", str(tmp_path / "some")]) == 1
    assert "its rows are not the rows of --groups" in capsys.readouterr().out
    assert cli.main(["verify", str(tmp_path / "some"), "--repair"]) == 0
    assert balance.main(config(store, tmp_path / "some", groups=groups, threshold=0.3)) == result


def test_the_rows_to_train_on_are_the_same_for_every_stage_at_the_end_of_a_chain(tmp_path: Path) -> None:
    """select, select, balance, select, cluster: what is clustered, trained on, exported and planned for."""
    made = make(tmp_path)
    folders = {name: str(tmp_path / name) for name in ("one", "two", "three", "four", "clusters")}
    steps = [
        f"select --out {folders['one']} --score clip-score --top 0.9",
        f"select --groups {folders['one']} --out {folders['two']} --score neg-clip-loss --num-others 10 --top 0.9",
        f"balance --groups {folders['two']} --out {folders['three']} --metric euclidean --threshold 0.6",
        f"select --groups {folders['three']} --out {folders['four']} --score clip-score --top 0.8",
        f"cluster --groups {folders['four']} --out {folders['clusters']} --num-centers 2",
    ]
    for step in steps:
        assert cli.main([*step.split(), "--store", made.store, "--device", "cpu"]) == 0
    store, groups = Store.open(made.store), folders["four"]
    kept = ImageMatrix(store, groups).valid()
    before = [ImageMatrix(store, folders[name]).valid() for name in ("one", "two", "three")]
    assert all((kept & ~mask).sum() == 0 for mask in before)
    assert 2 < kept.sum() < before[2].sum() < before[1].sum() < before[0].sum()
    rows = [(shard, row) for shard in range(3) for row in range(7) if kept[7 * shard + row]]
    trained = join_stores([store], groups=groups, clusters=folders["clusters"])
    assert list(zip(trained.shard.tolist(), trained.row.tolist(), strict=True)) == rows
    assert trained.cluster is not None
    assert (trained.cluster >= 0).all()
    exported = open_selection(made.store, groups=groups)
    assert [(shard, int(row)) for shard in range(3) for row in exported.rows(shard).row] == rows
    assert sum(exported.count(shard) for shard in range(3)) == len(rows)
    labelled = [(shard, int(row)) for shard in range(3) for row in read_labels(folders["clusters"], shard).row]
    assert labelled == rows
    for folder in folders.values():
        assert cli.main(["verify", folder]) == 0
    planned = dc.stages.plan(groups=groups)
    assert (planned["num_pairs"], planned["num_kept"]) == (21, len(rows))
