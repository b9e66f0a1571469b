"""`distilclip select`: what it keeps, in which order, and that later stages read it as they read a balance."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import distilclip as dc
from distilclip import cli, stage_folder
from distilclip.data.side_files import read_groups, read_labels
from distilclip.data.store import Store, split_id
from distilclip.engine import Engine
from distilclip.errors import InputError
from distilclip.scoring.pair_scores import clip_score
from distilclip.stages.balance import Config as BalanceConfig
from distilclip.stages.balance import main as balance
from distilclip.stages.select import Config, main
from tests.stages.conftest import contents, write_store


@pytest.fixture
def store(tmp_path: Path) -> tuple[str, np.ndarray]:
    path, _, valid = write_store(tmp_path / "store", text_noise=1.0)
    return path, valid


def kept(folder: str, num_shards: int = 3) -> np.ndarray:
    """Whether each valid row of all shards is kept."""
    return np.concatenate([read_groups(folder, shard).keep for shard in range(num_shards)])


def scores_of(path: str) -> np.ndarray:
    """The clip-score of every valid row."""
    opened = Store.open(path)
    parts = []
    for shard in range(opened.num_shards):
        valid = opened.rows(shard).valid
        parts.append(clip_score(opened.image(shard)[valid], opened.text(shard)[valid]))
    return np.concatenate(parts)


def test_the_pairs_with_the_highest_scores_are_kept(store: tuple[str, np.ndarray], tmp_path: Path) -> None:
    path, valid = store
    result = main(Config(store=path, out=str(tmp_path / "best"), score="clip-score", top=0.25, device="cpu"))
    scores = scores_of(path)
    assert result["num_scored"] == valid.sum() == len(scores)
    assert result["num_kept"] == round(0.25 * len(scores)) == kept(str(tmp_path / "best")).sum()
    np.testing.assert_array_equal(kept(str(tmp_path / "best")), scores >= np.float32(result["threshold"]))
    value = float(np.median(scores))
    half = main(Config(store=path, out=str(tmp_path / "half"), score="clip-score", at_least=value, device="cpu"))
    assert half["num_kept"] == (scores >= np.float32(value)).sum()
    nearest = half["borderline"]["kept"][0]
    assert nearest["score"] == scores[scores >= np.float32(value)].min()
    assert split_id(np.uint64(nearest["id"]))[0] < 3


def test_masks_combine_in_the_order_of_the_commands(store: tuple[str, np.ndarray], tmp_path: Path) -> None:
    path, _ = store
    groups, first, second = (str(tmp_path / name) for name in ("groups", "first", "second"))
    balanced = balance(BalanceConfig(store=path, out=groups, threshold=0.9, metric="euclidean", device="cpu"))
    one = main(Config(store=path, out=first, score="clip-score", top=0.5, groups=(groups,), device="cpu"))
    assert one["num_scored"] == balanced["num_kept"] < balanced["num_valid"]
    two = main(
        Config(store=path, out=second, score="neg-clip-loss", num_others=20, top=0.5, groups=(first,), device="cpu")
    )
    assert two["num_scored"] == one["num_kept"]
    assert not (kept(second) & ~kept(first)).any()
    assert not (kept(first) & ~kept(groups)).any()
    np.testing.assert_array_equal(read_groups(first, 0).group, read_groups(groups, 0).group)
    clusters = dc.stages.cluster(store=path, groups=second, num_centers=2, out=str(tmp_path / "clusters"), device="cpu")
    assert clusters["num_labelled"] == two["num_kept"]


def test_targets_and_own_values_are_scores(store: tuple[str, np.ndarray], tmp_path: Path) -> None:
    path, valid = store
    same = main(
        Config(store=path, out=str(tmp_path / "near"), score="norm-sim", targets=(path,), top=1.0, device="cpu")
    )
    assert same["threshold"] == pytest.approx(1.0, abs=1e-3)  # every picture is in the set
    values = np.arange(len(valid), dtype=np.float64) - 50  # negative ones too
    table = pa.table({"shard": np.repeat(np.arange(3), 40), "row": np.tile(np.arange(40), 3), "aesthetic": values})
    pq.write_table(table, tmp_path / "values.parquet")
    options: dict[str, Any] = {"score": "column", "values": str(tmp_path / "values.parquet"), "device": "cpu"}
    found = main(Config(store=path, out=str(tmp_path / "own"), column="aesthetic", at_least=0.0, **options))
    np.testing.assert_array_equal(kept(str(tmp_path / "own")), (values >= 0)[valid])
    assert found["num_kept"] == ((values >= 0) & valid).sum()
    pq.write_table(table.slice(0, 100), tmp_path / "values.parquet")
    with pytest.raises(InputError, match=r"values.parquet: row \d+ of shard 2 .* has no score"):
        main(Config(store=path, out=str(tmp_path / "short"), column="aesthetic", top=0.5, **options))
    with pytest.raises(InputError, match="has no column 'score'"):
        main(Config(store=path, out=str(tmp_path / "none"), top=0.5, **options))


def test_every_copy_of_a_picture_of_an_evaluation_set_is_found_and_removed(tmp_path: Path) -> None:
    """Ten training pictures are put into the evaluation set, five of them a little changed."""
    path, x, valid = write_store(tmp_path / "store", text_noise=1.0)
    taken = np.flatnonzero(valid)[3::11][:10]
    planted = x[taken].astype(np.float64)
    planted[::2] += 0.02 * np.random.default_rng(1).normal(size=planted[::2].shape)
    planted /= np.linalg.norm(planted, axis=1, keepdims=True)
    targets, _, _ = write_store(tmp_path / "targets", rows=10, shards=1, images=planted)
    out = str(tmp_path / "clean")
    options: dict[str, Any] = {"score": "norm-sim", "targets": (targets,), "below": 0.99, "device": "cpu"}
    result = main(Config(store=path, out=out, **options))
    stored = planted.astype(np.float16).astype(np.float64)
    near = (x.astype(np.float64) @ stored.T).max(axis=1) >= 0.99
    assert near[taken].all()
    np.testing.assert_array_equal(kept(out), ~near[valid])
    assert result["num_scored"] - result["num_kept"] == (near & valid).sum()
    assert cli.main(["verify", out]) == 0


def test_shares_of_the_same_pairs_are_combined(store: tuple[str, np.ndarray], tmp_path: Path) -> None:
    """The upper third by one score and 60 % by another, both of all pairs: what both keep, in either order."""
    path, _ = store
    images = Store.open(path).image(0)[:30]
    targets, _, _ = write_store(tmp_path / "targets", rows=20, shards=1, images=images[images.any(axis=1)][:20])
    one, two, both, other = (str(tmp_path / name) for name in ("one", "two", "both", "other"))
    common = ["--store", path, "--device", "cpu"]
    assert cli.main(["select", *common, "--out", one, "--score", "clip-score", "--top", "0.3"]) == 0
    assert cli.main(f"select --score norm-sim --targets {targets} --top 0.6 --out {two}".split() + common) == 0
    assert cli.main(["select", *common, "--out", both, "--groups", one, two]) == 0
    assert cli.main(["select", *common, "--out", other, "--groups", two, one]) == 0
    np.testing.assert_array_equal(kept(both), kept(one) & kept(two))
    np.testing.assert_array_equal(kept(other), kept(both))
    result = stage_folder.require(both, stage="select")
    assert (result["num_scored"], result["num_kept"]) == (kept(one).sum(), kept(both).sum())
    assert 0 < result["num_kept"] < min(kept(one).sum(), kept(two).sum())
    chained = main(Config(store=path, out=str(tmp_path / "third"), groups=(one, two), score="clip-score", top=1.0))
    assert chained["num_scored"] == result["num_kept"]
    assert [cli.main(["verify", folder]) for folder in (both, other)] == [0, 0]
    shutil.copy(Path(one) / "groups" / "000001.parquet", Path(both) / "groups" / "000001.parquet")
    (Path(both) / "result.json").write_text(json.dumps({**result, "digests": {}}))
    assert cli.main(["verify", both]) == 1
    none = str(tmp_path / "none")
    main(Config(store=path, out=none, score="clip-score", below=float(scores_of(path).min()) + 1e-6, device="cpu"))
    with pytest.raises(InputError, match="No pair is kept by all of"):
        main(Config(store=path, out=str(tmp_path / "empty"), groups=(one, none)))


def test_a_share_is_kept_of_every_folder_and_of_every_cluster(tmp_path: Path) -> None:
    path, _, valid = write_store(tmp_path / "store", text_noise=1.0, folders=["data/a", "data/b", "data/a"])
    scores, out = scores_of(path), str(tmp_path / "folders")
    shard = np.repeat([0, 1, 2], 40)[valid]
    result = main(Config(store=path, out=out, score="clip-score", top=0.3, within="folder", device="cpu"))
    expected = np.zeros(len(scores), bool)
    for shards in ([0, 2], [1]):
        rows = np.flatnonzero(np.isin(shard, shards))
        expected[rows[np.argsort(-scores[rows])[: round(0.3 * len(rows))]]] = True
    np.testing.assert_array_equal(kept(out), expected)
    counts = [(one["folder"], one["num_scored"], one["num_kept"]) for one in result["folders"]]
    parts = [("data/a", shard != 1), ("data/b", shard == 1)]
    assert counts == [(name, rows.sum(), (rows & expected).sum()) for name, rows in parts]
    assert result["threshold"] is None
    assert result["thresholds"]["smallest"] < result["thresholds"]["largest"]
    clusters, out = str(tmp_path / "clusters"), str(tmp_path / "of-clusters")
    dc.stages.cluster(store=path, out=clusters, num_centers=6, device="cpu")
    options: dict[str, Any] = {"store": path, "score": "clip-score", "within": "cluster", "device": "cpu"}
    best = main(Config(out=out, top=0.4, clusters=clusters, **options))
    label = np.concatenate([read_labels(clusters, number).cluster for number in range(3)])
    for cluster in np.unique(label):
        rows = np.flatnonzero(label == cluster)
        chosen = rows[np.argsort(-scores[rows])[: max(1, round(0.4 * len(rows)))]]
        np.testing.assert_array_equal(rows[kept(out)[rows]], np.sort(chosen))
    assert sum(bin["num_kept"] for bin in best["histogram"]) == best["num_kept"] == kept(out).sum()
    assert sum(bin["num_scored"] for bin in best["histogram"]) == len(scores)
    for folder, own in ((str(tmp_path / "folders"), result), (out, best)):
        assert cli.main(["verify", folder]) == 0
        name = Path(folder) / "groups" / "000001.parquet"
        shutil.copy(Path(folder) / "groups" / "000000.parquet", name)
        (Path(folder) / "result.json").write_text(json.dumps({**own, "digests": {}}))
        assert cli.main(["verify", folder]) == 1
    half = str(tmp_path / "half")
    main(Config(store=path, out=half, score="clip-score", top=0.5, device="cpu"))
    some = str(tmp_path / "some")
    dc.stages.cluster(store=path, groups=half, out=some, num_centers=3, device="cpu")
    with pytest.raises(InputError, match=r"some: row \d+ of shard 0 has no label. Cluster with the --groups"):
        main(Config(out=str(tmp_path / "wrong"), top=0.4, clusters=some, **options))
    again = main(Config(out=str(tmp_path / "right"), top=0.4, clusters=some, groups=(half,), **options))
    assert again["num_scored"] == kept(half).sum()


@pytest.mark.slow
def test_engines_and_kills_change_no_byte(store: tuple[str, np.ndarray], tmp_path: Path) -> None:
    path, _ = store
    options: dict[str, Any] = {"store": path, "score": "neg-clip-loss", "num_others": 30, "top": 0.5, "device": "cpu"}
    result = main(Config(out=str(tmp_path / "whole"), **options))
    engine = Engine(engine="processes", engine_workers=2)
    main(Config(out=str(tmp_path / "processes"), execution=engine, **options))
    assert contents(tmp_path / "processes") == contents(tmp_path / "whole")
    for name in ("result.json", "groups/000001.parquet", "scores/000002.parquet"):
        (tmp_path / "whole" / name).unlink()
        (tmp_path / "whole" / "result.json").unlink(missing_ok=True)
        assert main(Config(out=str(tmp_path / "whole"), **options)) == result
    assert contents(tmp_path / "processes") == contents(tmp_path / "whole")


def test_verify_finds_what_does_not_fit_and_select_makes_it_again(
    store: tuple[str, np.ndarray], tmp_path: Path
) -> None:
    path, _ = store
    out = str(tmp_path / "best")
    options: dict[str, Any] = {"store": path, "out": out, "score": "clip-score", "top": 0.5, "device": "cpu"}
    result = main(Config(**options))
    before = contents(Path(out))
    assert cli.main(["verify", out]) == 0
    name = Path(out) / "groups" / "000001.parquet"
    shutil.copy(Path(out) / "groups" / "000000.parquet", name)
    assert cli.main(["verify", out]) == 1
    assert cli.main(["verify", out, "--repair"]) == 0
    assert not name.exists()
    assert main(Config(**options)) == result
    assert contents(Path(out)) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score": "clip-score"}, "one of --top .*, --at-least and --below"),
        ({"groups": ("a",)}, "needs a --score .* or several --groups without"),
        ({"groups": ("a", "b"), "top": 0.5}, "needs a --score .* or several --groups without"),
        ({"score": "clip-score", "at_least": 0.2, "within": "folder"}, "--within folder .* needs --top"),
        ({"score": "clip-score", "top": 0.2, "within": "cluster"}, "--within cluster and --clusters FOLDER belong"),
        ({"score": "clip-score", "top": 1.5}, "a share above 0 and at most 1"),
        ({"score": "norm-sim", "top": 0.5}, "--score norm-sim needs --targets"),
        ({"score": "clip-score", "top": 0.5, "values": "x.npy"}, "--score clip-score has no use for --values"),
        ({"score": "neg-clip-loss", "top": 0.5, "num_others": 1}, "num_others"),
    ],
)
def test_options_that_do_not_fit_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Config(store="s", out="o", **options)
