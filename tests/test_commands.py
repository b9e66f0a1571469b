from __future__ import annotations

import subprocess
import tomllib
from pathlib import Path

import pytest

from distilclip import cli, config
from distilclip.configs import train

RECIPES = Path(__file__).parents[1] / "recipes"


def test_recipes_are_listed_and_copied_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["recipes"]) == 0
    listed = capsys.readouterr().out
    for path in RECIPES.glob("*.toml"):
        assert f"  {path.stem} " in listed
        assert cli.main(["recipes", path.stem]) == 0
        assert tomllib.loads(capsys.readouterr().out) == tomllib.loads(path.read_text())
    assert cli.main(["recipes", "dem"]) == 2
    assert "Did you mean 'demo'?" in capsys.readouterr().err


def test_run_takes_a_recipe_of_the_package_by_its_name(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["run", "demo", "--out", str(tmp_path / "out"), "--dry-run"]) == 0
    assert "train/teacher: to do" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    assert cli.main(["run", "demoo", "--out", str(tmp_path / "out")]) == 2
    assert "no file, and none in the package. Did you mean 'demo'?" in capsys.readouterr().err


def test_a_folder_called_as_a_recipe_does_not_hide_it(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "demo").mkdir()
    monkeypatch.chdir(tmp_path)
    assert cli.main(["run", "demo", "--out", "out", "--dry-run"]) == 0
    assert "train/teacher: to do" in capsys.readouterr().out


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_one_completion_script_knows_every_stage_and_flag(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["completion", shell]) == 0
    script = capsys.readouterr().out
    for word in (*cli.STAGES, "--learning-rate", "--threshold", "clip-cid", "sqeuclidean"):
        assert word in script
    if shell == "bash":
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)
        ask = f"{script}\nCOMP_WORDS=(distilclip balance --me); COMP_CWORD=2; _shtab_distilclip; echo ${{COMPREPLY[@]}}"
        done = subprocess.run(["bash", "-c", ask], capture_output=True, text=True, check=True)
        assert set(done.stdout.split()) == {"--metric", "--memory-gb"}


def test_completion_without_a_shell_says_which_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["completion"]) == 2
    assert "distilclip completion bash" in capsys.readouterr().err


def test_flags_of_other_tools_are_understood_and_named(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--student", "s", "--out", "o", "--lr", "0.5", "--wd=0.1", "--workers", "0", "--train-data", "a.tar"]
    values = config.parse(train.Config, [*words, "--report-to", "tensorboard", "--epochs", "3"], stage="train")
    assert values.optimization.learning_rate == 0.5
    assert values.optimization.weight_decay == 0.1
    assert values.num_epochs == 3
    assert (values.num_workers, values.track, values.data) == (0, ("tensorboard",), ("a.tar",))
    said = capsys.readouterr().err
    assert "--lr is called --learning-rate here" in said
    assert "--wd is called --weight-decay here" in said


@pytest.mark.parametrize(
    ("flag", "message"),
    [("--batch-size-per-gpu", "over all processes"), ("--accum-freq", "--micro-batch"), ("--pretrained", "--init")],
)
def test_flags_without_an_equal_are_explained(flag: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--student", "s", flag, "3"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


@pytest.mark.parametrize("stage", cli.STAGES)
def test_every_help_names_the_recipe_and_the_messages(stage: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        cli.main([stage, "--help"])
    assert done.value.code == 0
    shown = capsys.readouterr().out
    assert "--log-format json" in shown
    assert "RECIPE" in shown
