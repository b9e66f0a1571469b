import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distilclip.data.side_files import read_forest, read_groups
from distilclip.data.store import sample_id, split_id
from distilclip.errors import InputError
from distilclip.grouping.balance import balance
from distilclip.stages.balance import Config, main
from tests.stages.conftest import contents, write_store


def test_files_hold_what_balance_says(tmp_path: Path) -> None:
    store, x, valid = write_store(tmp_path / "store")
    out = tmp_path / "balance"
    result = main(Config(store=store, out=str(out), threshold=0.3, metric="euclidean", device="cpu"))
    expected = balance(x, threshold=0.3, metric="euclidean", valid=valid)
    assert result["num_valid"] == valid.sum()
    assert result["num_kept"] == expected.keep.sum()
    assert result["removed_ratio"] == expected.removed_ratio > 0.1
    assert [point["num_groups"] for point in result["curve"]] == expected.curve.num_groups.tolist()
    for shard in range(3):
        part = read_groups(str(out), shard)
        rows = shard * 40 + part.row.astype(int)
        np.testing.assert_array_equal(rows, shard * 40 + np.flatnonzero(valid[shard * 40 : shard * 40 + 40]))
        np.testing.assert_array_equal(part.keep, expected.keep[rows])
        np.testing.assert_array_equal(part.distance, expected.distance[rows])
        for ids, reference in ((part.group, expected.group), (part.representative, expected.representative)):
            shard_of, row_of = split_id(ids)
            np.testing.assert_array_equal(shard_of.astype(int) * 40 + row_of, reference[rows])
        np.testing.assert_array_equal(part.keep, part.representative == sample_id(shard, part.row))
    assert len(read_forest(str(out)).left) == len(expected.forest)


def test_a_kill_after_any_file_leaves_the_same_bytes(tmp_path: Path) -> None:
    store, _, _ = write_store(tmp_path / "store")
    config: dict[str, Any] = {
        "store": store,
        "target_removed": 0.2,
        "max_threshold": 0.5,
        "metric": "euclidean",
        "device": "cpu",
    }
    whole = tmp_path / "whole"
    result = main(Config(out=str(whole), **config))
    assert result["removed_ratio"] == pytest.approx(0.2, abs=0.02)
    written = sorted(whole.rglob("*.*"), key=lambda p: p.stat().st_mtime_ns)
    written = [p for p in written if p.name not in ("config.json", "env.json", "inputs.json")]
    assert written[-1].name == "result.json"
    for kept in range(len(written)):
        cut = tmp_path / f"cut{kept}"
        shutil.copytree(whole, cut)
        for path in written[kept:]:
            (cut / path.relative_to(whole)).unlink()
        assert main(Config(out=str(cut), **config)) == result
        assert contents(cut) == contents(whole)


def test_the_rule_reaches_the_result(tmp_path: Path) -> None:
    store, _, _ = write_store(tmp_path / "store")
    config: dict[str, Any] = {"store": store, "threshold": 0.3, "metric": "euclidean", "device": "cpu"}
    plain = main(Config(out=str(tmp_path / "plain"), **config))
    lists = main(Config(out=str(tmp_path / "topk"), rule="topk", top_k=1, **config))
    assert plain["saturated"] is None
    assert 0 < lists["saturated"] < 1
    assert lists["num_groups"] >= plain["num_groups"]
    wide = {**config, "threshold": 0.9}
    chained = main(Config(out=str(tmp_path / "chained"), **wide))
    covered = main(Config(out=str(tmp_path / "cover"), rule="cover", **wide))
    assert covered["rule"] == "cover"
    assert covered["num_groups"] == covered["num_kept"] > chained["num_kept"]
    assert covered["chained"] == 0 < chained["chained"]
    assert len(covered["curve"]) == 20


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "either threshold or target_removed"),
        ({"threshold": 0.1, "rule": "topk"}, "top_k"),
        ({"target_removed": 1.5, "max_threshold": 0.3}, "between 0 and 1"),
        ({"threshold": -1.0}, "positive"),
    ],
)
def test_bad_flags_are_named_before_anything_is_read(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Config(store="nowhere", out="nowhere", metric="cosine", **arguments)


def test_a_target_out_of_reach_and_a_missing_store_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no embed folder"):
        main(Config(store=str(tmp_path / "no"), out=str(tmp_path / "a"), threshold=0.1, metric="cosine"))
    store, _, _ = write_store(tmp_path / "store")
    config = Config(
        store=store, out=str(tmp_path / "b"), target_removed=0.9, max_threshold=0.01, metric="cosine", device="cpu"
    )
    with pytest.raises(InputError, match="Raise max_threshold"):
        main(config)
