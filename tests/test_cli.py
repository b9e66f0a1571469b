from __future__ import annotations

import pytest

from distilclip import cli


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
    assert error == "distilclip train: The recipe 'nowhere.toml' does not exist.\n"


@pytest.mark.parametrize("stage", cli.STAGES)
def test_every_stage_has_help(stage: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([stage, "--help"])
    assert stop.value.code == 0
    assert "--out" in capsys.readouterr().out
