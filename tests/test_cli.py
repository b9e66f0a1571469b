from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from distilclip import cli
from tests.stages.conftest import write_store


def test_usage_names_every_stage(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {stage} " in shown for stage in cli.STAGES)


def test_unknown_stage_gets_a_suggestion(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["ballance"]) == 2
    assert "Did you mean 'balance'" in capsys.readouterr().err


def test_bad_input_is_one_line_without_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "nowhere.toml"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("distilclip train: The recipe 'nowhere.toml' does not exist: it is no file, and none in ")
    assert error.count("\n") == 1


@pytest.mark.parametrize("stage", cli.STAGES)
def test_every_stage_has_help(stage: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([stage, "--help"])
    assert stop.value.code == 0
    assert "--out" in capsys.readouterr().out


BALANCE = ["balance", "--store", "STORE", "--out", "OUT", "--metric", "cosine"]
CLUSTER = ["cluster", "--store", "STORE", "--out", "OUT", "--num-centers"]
EMBED = ["embed", "--data", "DATA", "--model", "MODEL", "--out", "OUT", "--num-workers", "0", "--precision", "fp32"]


@pytest.mark.parametrize(
    ("right", "typos"),
    [
        (
            [*BALANCE, "--threshold", "0.1"],
            [{"cosine": "cosin"}, {"0.1": "0"}, {"STORE": "nowhere"}, {"cosine": "euclidean", "STORE": "nowhere"}],
        ),
        ([*CLUSTER, "4"], [{"STORE": "nowhere"}, {"4": "400000"}, {"4": "0"}]),
        (EMBED, [{"DATA": "nowhere/*.tar"}, {"MODEL": "ViT-B-33"}, {"fp32": "fp33"}]),
    ],
    ids=["balance", "cluster", "embed"],
)
def test_a_typo_does_not_poison_the_output_folder(
    right: list[str],
    typos: list[dict[str, str]],
    tmp_path: Path,
    pair_tars: Callable[..., list[str]],
    tiny_clip_folder: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The wrong commands first, one after the other, then the right one, all with the same --out."""
    places = {"STORE": write_store(tmp_path / "store")[0], "OUT": str(tmp_path / "out"), "MODEL": tiny_clip_folder}
    places["DATA"] = pair_tars(shards=1, rows=4)[0]
    for typo in typos:
        words = [typo.get(word, word) for word in right]
        try:
            code = cli.main([places.get(word, word) for word in words])
        except SystemExit as stop:  # a flag that tyro refuses
            code = stop.code
        assert code == 2
        assert "another configuration" not in capsys.readouterr().err
    assert cli.main([places.get(word, word) for word in right]) == 0
    assert json.loads((tmp_path / "out" / "result.json").read_text())["stage"] == right[0]
