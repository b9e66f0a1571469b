"""`distilclip weigh`: each way to weigh, their product, and that training reads and verify checks what it writes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distilclip import cli
from distilclip.data.side_files import read_centers, read_groups, read_labels, read_weights
from distilclip.errors import InputError
from distilclip.stages import balance, cluster, select
from distilclip.stages.weigh import Config, main
from tests.stages.conftest import contents, write_store

SHARDS = 3


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A store, its balance and five clusters of what is kept."""
    folder = tmp_path_factory.mktemp("made")
    store, _, _ = write_store(folder / "store")
    groups, clusters = str(folder / "groups"), str(folder / "clusters")
    balance(store=store, out=groups, threshold=0.9, metric="euclidean", device="cpu")
    cluster(store=store, groups=groups, out=clusters, num_centers=5, device="cpu")
    return {"store": store, "groups": groups, "clusters": clusters}


def weights_of(folder: Path | str) -> np.ndarray:
    return np.concatenate([read_weights(str(folder), shard).weight for shard in range(SHARDS)])


def labels_of(made: dict[str, str]) -> tuple[np.ndarray, np.ndarray]:
    tables = [read_labels(made["clusters"], shard) for shard in range(SHARDS)]
    return np.concatenate([t.cluster for t in tables]), np.concatenate([t.distance for t in tables])


def sizes_of(made: dict[str, str]) -> np.ndarray:
    """How many rows each kept row stands for, one after the other."""
    tables = [read_groups(made["groups"], shard) for shard in range(SHARDS)]
    kept_for = np.concatenate([table.representative for table in tables]).tolist()
    ids = [(shard << 32) + int(row) for shard, table in enumerate(tables) for row in table.row[table.keep]]
    return np.array([kept_for.count(one) for one in ids])


def weigh(made: dict[str, str], out: Path, **options: Any) -> dict[str, Any]:
    by_cluster = "cluster_power" in options or "quota" in options
    inputs = {"store": made["store"], "groups": made["groups"]}
    return main(Config(out=str(out), **inputs, **({"clusters": made["clusters"]} if by_cluster else {}), **options))


def test_clusters_have_a_power_of_their_size(made: dict[str, str], tmp_path: Path) -> None:
    cluster, _ = labels_of(made)
    sizes = np.bincount(cluster)
    for power in (0.0, 0.5, 1.0):
        out = tmp_path / str(power)
        result = weigh(made, out, cluster_power=power)
        shares = np.bincount(cluster, weights_of(out))
        np.testing.assert_allclose(shares / shares.sum(), sizes**power / (sizes**power).sum())
        assert result["num_rows"] == result["num_drawn"] == len(cluster)
        weights = weights_of(out)
        assert result["effective_rows"] == pytest.approx(weights.sum() ** 2 / (weights**2).sum(), abs=0.1)
        assert result["most_often"] == pytest.approx(weights.max() / weights.mean())
        before = np.sort(sizes)[::-1] / sizes.sum()
        assert result["clusters"]["curve"][3]["before"] == pytest.approx(before[0])  # a fifth of the clusters is one
        assert result["clusters"]["curve"][-1]["after"] == pytest.approx(1)
    assert weigh(made, tmp_path / "0.0", cluster_power=0.0)["clusters"]["effective_after"] == pytest.approx(5)


def test_a_quota_is_drawn_from_all_rows_or_kept_as_the_farthest(made: dict[str, str], tmp_path: Path) -> None:
    """Step by step from the formulas of Abbas et al. 2024; here no cluster is at its bounds unless it is said."""
    cluster, distance = labels_of(made)
    centers, sizes = read_centers(made["clusters"]).astype(np.float64), np.bincount(cluster)
    between = 1 - centers @ centers.T
    wide = np.array([distance[cluster == c].mean(dtype=np.float64) for c in range(5)])
    complexity = wide * np.array([np.delete(between[c], c).mean() for c in range(5)])
    share = np.exp(complexity / 0.5) / np.exp(complexity / 0.5).sum()
    num_rows = round(0.4 * len(cluster))
    wanted = share * num_rows
    assert (wanted < sizes).all()
    weigh(made, tmp_path / "all", quota=0.4, temperature=0.5)
    np.testing.assert_allclose(np.bincount(cluster, weights_of(tmp_path / "all")), wanted, rtol=1e-5)
    result = weigh(made, tmp_path / "farthest", quota=0.4, temperature=0.5, quota_rows="farthest")
    chosen = weights_of(tmp_path / "farthest")
    assert set(chosen.tolist()) == {0.0, 1.0}
    assert result["num_drawn"] == chosen.sum() == num_rows
    assert np.abs(np.bincount(cluster, chosen) - wanted).max() < 1
    for c in range(5):
        assert distance[(cluster == c) & (chosen == 1)].min() >= distance[(cluster == c) & (chosen == 0)].max()


def test_a_kept_row_counts_for_its_group_and_ways_multiply(made: dict[str, str], tmp_path: Path) -> None:
    sizes = sizes_of(made)
    assert sizes.max() > 1
    for power in (0.0, 0.5, 1.0):
        result = weigh(made, tmp_path / str(power), group_power=power)
        np.testing.assert_allclose(weights_of(tmp_path / str(power)), sizes.astype(float) ** power)
        assert result["largest_group"] == sizes.max()
    weigh(made, tmp_path / "clusters", cluster_power=0.0)
    weigh(made, tmp_path / "both", cluster_power=0.0, group_power=0.5)
    product = weights_of(tmp_path / "clusters") * weights_of(tmp_path / "0.5")
    np.testing.assert_allclose(weights_of(tmp_path / "both"), product)


def test_data_sets_have_their_share_after_all_else(
    made: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for shard in range(SHARDS):
        Path(f"{shard}.tar").write_bytes(b"")
    data = ("2.tar=0.5", "{0,1}.tar=1.5")
    result = weigh(made, tmp_path / "out", group_power=1.0, data=data)
    sums = [read_weights(str(tmp_path / "out"), shard).weight.sum() for shard in range(SHARDS)]
    np.testing.assert_allclose([sums[2], sums[0] + sums[1]], [0.5, 1.5])
    assert [part["share"] for part in result["parts"]] == [0.25, 0.75]
    first = read_weights(str(tmp_path / "out"), 0).weight
    np.testing.assert_allclose(first / first.min(), sizes_of(made)[: len(first)])
    with pytest.raises(InputError, match=r"the parts are 2 files, but the store .* was made from 3"):
        weigh(made, tmp_path / "two", data=("0.tar=1", "1.tar=1"))


def test_a_kill_changes_no_byte_and_verify_finds_what_is_damaged(made: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = weigh(made, out, quota=0.5, quota_rows="farthest", group_power=0.5)
    before = contents(out)
    assert cli.main(["verify", str(out)]) == 0
    (out / "result.json").unlink()
    (out / "weights/000001.parquet").unlink()
    assert weigh(made, out, quota=0.5, quota_rows="farthest", group_power=0.5) == result
    assert contents(out) == before
    shutil.copy(out / "weights/000000.parquet", out / "weights/000001.parquet")
    assert cli.main(["verify", str(out)]) == 1
    assert cli.main(["verify", str(out), "--repair"]) == 0
    assert not (out / "weights/000001.parquet").exists()
    assert weigh(made, out, quota=0.5, quota_rows="farthest", group_power=0.5) == result
    assert contents(out) == before


def test_labels_and_groups_must_fit(made: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"row \d+ of shard 0 is kept and has no label"):
        main(Config(store=made["store"], clusters=made["clusters"], out=str(tmp_path / "a"), cluster_power=0.5))
    selected = str(tmp_path / "selected")
    options: dict[str, Any] = {"score": "clip-score", "top": 1.0, "device": "cpu"}
    select(store=made["store"], out=selected, **options)
    with pytest.raises(InputError, match="no kept row stands for another, so --group-power has no effect"):
        main(Config(store=made["store"], groups=selected, out=str(tmp_path / "b"), group_power=0.5))
    inside = str(tmp_path / "inside")
    select(store=made["store"], groups=made["groups"], out=inside, **{**options, "top": 0.5})
    result = main(
        Config(
            store=made["store"], groups=inside, clusters=made["clusters"], out=str(tmp_path / "c"), cluster_power=0.5
        )
    )
    kept = sum(int(read_groups(inside, shard).keep.sum()) for shard in range(SHARDS))
    assert result["num_rows"] == kept


def test_weights_that_leave_few_rows_are_said_at_once(
    made: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weigh(made, tmp_path / "out", group_power=4.0, cluster_power=0.0)
    result = json.loads((tmp_path / "out/result.json").read_text())
    said = "The weights are so uneven" in capsys.readouterr().err
    assert said == (result["effective_rows"] < 0.1 * result["num_rows"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "Nothing to weigh by"),
        ({"cluster_power": 0.5}, "--cluster-power needs --clusters"),
        ({"quota": 0.5}, "--quota needs --clusters"),
        ({"clusters": "c", "group_power": 0.5, "groups": "g"}, "--clusters has no effect"),
        ({"clusters": "c", "cluster_power": 0.5, "quota": 0.5}, "Give one of them"),
        ({"group_power": 0.5}, "--group-power needs --groups"),
        ({"group_power": 0.5, "groups": "g", "temperature": 0.2}, "no effect without --quota"),
        ({"clusters": "c", "quota": 1.0}, "above 0 and below 1"),
        ({"clusters": "c", "quota": 0.5, "temperature": 0.0}, "must be positive"),
        ({"clusters": "c", "cluster_power": float("nan")}, "cluster_power is nan"),
        ({"data": ("a/*.tar",)}, "give every part its share"),
    ],
)
def test_options_without_effect_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Config(store="s", out="o", **options)
