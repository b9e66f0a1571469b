from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from distilclip import config, stage_folder
from distilclip.errors import InputError
from distilclip.options import changeable


@dataclass(frozen=True, kw_only=True)
class Saving:
    save_every: int = 10
    """steps"""
    keep: int = changeable(2)
    """how many"""


@dataclass(frozen=True, kw_only=True)
class Config:
    out: str
    """folder"""
    data: tuple[str, ...] = ()
    """patterns"""
    learning_rate: float = 1e-3
    """peak"""
    terms: dict[str, float] = field(default_factory=dict)
    """weights"""
    student: str | None = None
    """architecture"""
    order: Literal["sorted", "shuffled"] = "sorted"
    """of rows"""
    saving: Saving = field(default_factory=Saving)


def recipe(tmp_path: Path, text: str) -> str:
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    return str(path)


def test_flags_win_over_the_recipe(tmp_path: Path) -> None:
    path = recipe(tmp_path, '[train]\nout = "a"\nlearning_rate = 1e-4\ndata = ["x", "y"]\n')
    parsed = config.parse(Config, [path, "--learning-rate", "0.5", "--data", "z"], stage="train")
    assert parsed == Config(out="a", learning_rate=0.5, data=("z",))


def test_exponents_are_numbers_not_strings(tmp_path: Path) -> None:
    parsed = config.parse(Config, [recipe(tmp_path, '[train]\nout = "a"\nlearning_rate = 1e-3\n')], stage="train")
    assert parsed.learning_rate == 0.001


def test_tables_become_dicts_and_json(tmp_path: Path) -> None:
    text = '[train]\nout = "a"\nterms = {feature = 2000, alpha = 0.9}\nstudent = {embed_dim = 4, text_cfg = {}}\n'
    parsed = config.parse(Config, [recipe(tmp_path, text)], stage="train")
    assert parsed.terms == {"feature": 2000.0, "alpha": 0.9}
    assert parsed.student == '{"embed_dim": 4, "text_cfg": {}}'


def test_named_step_overlays_the_stage_table(tmp_path: Path) -> None:
    path = recipe(tmp_path, '[train]\nout = "a"\nlearning_rate = 0.1\n[train.small]\norder = "shuffled"\n')
    parsed = config.parse(Config, [f"{path}#small"], stage="train")
    assert parsed == Config(out="a", learning_rate=0.1, order="shuffled")


def test_a_config_json_is_a_recipe(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"stage": "train", "out": "a", "student": null, "order": "shuffled"}')
    assert config.parse(Config, [str(path)], stage="train") == Config(out="a", order="shuffled")


def test_options_of_a_group_are_flags_like_any_other(tmp_path: Path) -> None:
    path = recipe(tmp_path, '[train]\nout = "a"\nsave_every = 3\n')
    parsed = config.parse(Config, [path, "--keep", "5"], stage="train")
    assert parsed == Config(out="a", saving=Saving(save_every=3, keep=5))
    assert stage_folder.config_values(parsed)["save_every"] == 3
    assert config.build(Config, stage_folder.config_values(parsed), stage="train") == parsed


def test_options_of_a_group_are_compared_unless_they_say_how(tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    stage_folder.open_folder(out, stage="train", config=Config(out=out))
    stage_folder.open_folder(out, stage="train", config=Config(out=out, saving=Saving(keep=5)))
    (tmp_path / "out" / "metrics.jsonl").write_text("")
    with pytest.raises(InputError, match="save_every was 10, now 3"):
        stage_folder.open_folder(out, stage="train", config=Config(out=out, saving=Saving(save_every=3)))


@pytest.mark.parametrize(
    ("text", "argument", "message"),
    [
        ('[train]\nout = "a"\nlerning_rate = 1\n', "", "unknown key 'lerning_rate'. Did you mean 'learning_rate'"),
        ('[trian]\nout = "a"\n', "", r"no \[train\] table. Did you mean 'trian'"),
        ('[train]\nout = "a"\n[train.x]\n[train.y]\n', "", r"choose one as .*#NAME, NAME one of \['x', 'y'\]"),
        ('[train]\nout = "a"\n[train.small]\n', "#smal", r"no \[train.smal\] table. Did you mean 'small'"),
        ("[train\n", "", "cannot be read"),
    ],
)
def test_bad_recipes_name_the_fault(tmp_path: Path, text: str, argument: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        config.parse(Config, [recipe(tmp_path, text) + argument], stage="train")


def test_missing_recipe_is_named() -> None:
    with pytest.raises(InputError, match=r"'nowhere\.toml' does not exist"):
        config.parse(Config, ["nowhere.toml"], stage="train")


def test_bad_flag_exits_with_a_message(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        config.parse(Config, ["--out", "a", "--order", "reversed"], stage="train")
    assert stop.value.code == 2
    assert "reversed" in capsys.readouterr().err
