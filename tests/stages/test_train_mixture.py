"""Training on a mixture and on weighed rows, through the command line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distilclip import cli, stage_folder
from distilclip.data.side_files import WeightedRows, write_weights
from distilclip.errors import InputError
from distilclip.stages import embed, train
from tests.conftest import write_tar
from tests.stages.made_training import config, contents, final_digest, steady_metrics


@pytest.fixture
def tars(pair_tars: Callable[..., list[str]]) -> list[str]:
    """Two tars of twelve pairs."""
    return pair_tars(shards=2, rows=12)


def run(out: Path, architecture: str, *flags: str) -> int:
    sizes = "--batch-size 8 --num-steps 4 --warmup-steps 1 --checkpoint-every 2 --precision fp32 --num-workers 0"
    common = ["--student", architecture, "--keep-checkpoints", "9", "--max-bad-ratio", "0", *sizes.split()]
    return cli.main(["train", "--out", str(out), *common, *flags])


def result(out: Path) -> dict[str, Any]:
    return json.loads((out / "result.json").read_text())


def weights_by_key(path: Path, weights: np.ndarray) -> str:
    pq.write_table(pa.table({"key": [f"{row:05d}" for row in range(len(weights))], "quality": weights}), path)
    return str(path)


def test_a_part_of_weight_0_is_never_seen(
    tars: list[str], tiny_clip_json: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its pictures are none, which would stop the training at the first that is read."""
    members = [(f"x{row}.{kind}", b"no image") for row in range(12) for kind in ("jpg", "txt")]
    unseen = write_tar(tmp_path / "unseen.tar", members)
    assert run(tmp_path / "mixed", tiny_clip_json, "--data", f"{tars[0]}=0.25", f"{tars[1]}=0.75", f"{unseen}=0") == 0
    found = result(tmp_path / "mixed")
    assert (found["num_rows"], found["num_unusable"]) == (24, 0)
    assert found["mixture"] == {
        "parts": [
            {"data": tars[0], "share": 0.25, "num_rows": 12},
            {"data": tars[1], "share": 0.75, "num_rows": 12},
            {"data": unseen, "share": 0.0, "num_rows": 0},
        ],
        "effective_rows": pytest.approx(24**2 / (12 * 0.5**2 + 12 * 1.5**2), abs=0.1),
        "most_often": pytest.approx(1.5),
    }
    said = capsys.readouterr().err
    assert f"24 pairs are drawn by weight; 25.0% {tars[0]} (12); 75.0% {tars[1]} (12); 0.0% {unseen} (0)." in said
    assert run(tmp_path / "both", tiny_clip_json, "--data", f"{tars[0]}=1", f"{unseen}=1") == 2
    assert "not an image" in capsys.readouterr().err


def test_equal_shares_train_as_plain_data_does(tars: list[str], tiny_clip_json: str, tmp_path: Path) -> None:
    assert run(tmp_path / "plain", tiny_clip_json, "--data", *tars) == 0
    assert run(tmp_path / "equal", tiny_clip_json, "--data", *(f"{uri}=0.3" for uri in tars)) == 0
    assert contents(tmp_path / "plain/checkpoints") == contents(tmp_path / "equal/checkpoints")
    assert steady_metrics(tmp_path / "plain") == steady_metrics(tmp_path / "equal")
    assert "mixture" not in result(tmp_path / "plain")


def test_weighed_rows_go_on_after_a_kill_bit_for_bit_and_a_changed_file_is_noticed(
    tars: list[str], tiny_clip_json: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = weights_by_key(tmp_path / "weights.parquet", np.arange(24) / 10)
    flags = ["--data", *tars, "--row-weights", weights, "--row-weights-column", "quality"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert run(whole, tiny_clip_json, *flags) == 0
    assert result(whole)["num_rows"] == 23
    assert result(whole)["mixture"]["most_often"] == pytest.approx(23 * 23 / (23 * 12))
    shutil.copytree(whole, killed)
    (killed / "result.json").unlink()
    (killed / "checkpoints/step-000004/state.json").unlink()
    assert run(killed, tiny_clip_json, *flags) == 0
    assert contents(whole / "checkpoints") == contents(killed / "checkpoints")
    (killed / "result.json").unlink()
    weights_by_key(tmp_path / "weights.parquet", np.arange(24) / 9)
    capsys.readouterr()
    assert run(killed, tiny_clip_json, *flags) == 2
    assert "side files came, went or changed" in capsys.readouterr().err
    assert run(whole, tiny_clip_json, "--data", *tars) == 2  # other options, too
    assert "row_weights was" in capsys.readouterr().err


def test_weights_that_are_no_weights_are_refused_in_one_line(
    tars: list[str], tiny_clip_json: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = weights_by_key(tmp_path / "weights.parquet", np.array([1.0, -2.0, *[1.0] * 22]))
    cases = {
        "parquet has no column 'weight'": ["--row-weights", weights],
        "row 1 of shard 0 (00001) has the weight -2": ["--row-weights", weights, "--row-weights-column", "quality"],
        "none.npy does not exist": ["--row-weights", str(tmp_path / "none.npy")],
    }
    for said, flags in cases.items():
        assert run(tmp_path / "out", tiny_clip_json, "--data", *tars, *flags) == 2
        found = capsys.readouterr().err
        assert said in found
        assert len(found.strip().splitlines()) == 1
    with pytest.raises(InputError, match=r"has no weight, and .* has one"):
        config(tmp_path / "out", tiny_clip_json, data=(tars[0], f"{tars[1]}=0.5"))


def test_a_stage_s_folder_of_weights_belongs_to_its_store(
    tars: list[str], tiny_clip_folder: str, tiny_clip_json: str, tmp_path: Path
) -> None:
    """As a stage of curation writes it: a file for each shard of the store, and result.json."""
    for name, data in (("store", tars), ("other", tars[::-1])):
        embed.main(embed.Config(data=tuple(data), out=str(tmp_path / name), model=tiny_clip_folder, num_workers=0))
    curated = tmp_path / "curated"
    for shard in range(2):
        rows = np.arange(12, dtype=np.uint32)
        write_weights(str(curated), shard, WeightedRows(rows, (rows % 3 + shard).astype(np.float64)))
    digest = stage_folder.result_digest(str(tmp_path / "store"))
    for name, values in (("config", {}), ("result", {}), ("inputs", {"embed": digest})):
        stage_folder.write_json(str(curated / f"{name}.json"), {"stage": "balance", **values})
    common = {"objective": "clip-kd", "row_weights": str(curated)}
    train.main(config(tmp_path / "out", tiny_clip_json, store=str(tmp_path / "store"), **common))
    assert result(tmp_path / "out")["num_rows"] == 24 - 4
    inputs = json.loads((tmp_path / "out/inputs.json").read_text())
    assert inputs == {"embed": digest, "balance": stage_folder.result_digest(str(curated))}
    parts = tuple(f"{uri}={weight}" for uri, weight in zip(tars[::-1], (0.25, 0.75), strict=True))
    train.main(config(tmp_path / "parts", tiny_clip_json, store=str(tmp_path / "store"), data=parts, **common))
    assert [part["share"] for part in result(tmp_path / "parts")["mixture"]["parts"]] == [0.25, 0.75]
    assert final_digest(tmp_path / "parts") != final_digest(tmp_path / "out")
    with pytest.raises(InputError, match=r"curated was made from another store"):
        train.main(config(tmp_path / "wrong", tiny_clip_json, store=str(tmp_path / "other"), **common))
