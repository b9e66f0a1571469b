"""What the pages promise is run: the README's Python, its commands' flags, every recipe."""

from __future__ import annotations

import fnmatch
import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch

from distilclip import cli, config
from distilclip.configs import evaluate, report
from distilclip.models.clip import create_clip
from distilclip.options import option_types
from distilclip.stages import run as run_stage
from tests.conftest import encoded, picture, write_tar

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
RECIPES = sorted((ROOT / "recipes").glob("*.toml"))


def commands() -> list[list[str]]:
    """The `distilclip ...` lines of the README's indented blocks, continuation lines joined."""
    text = README.replace("\\\n", " ")
    return [shlex.split(line)[1:] for line in re.findall(r"^    (distilclip .*)$", text, flags=re.MULTILINE)]


def test_readme_python_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) == 1
    scope: dict[str, object] = {}
    exec(blocks[0], scope)
    assert scope["balance"].removed_ratio == 0.5  # type: ignore[attr-defined]


def test_readme_has_commands() -> None:
    assert {argv[0] for argv in commands()} >= {"embed", "select", "balance", "cluster", "train", "evaluate", "report"}


@pytest.mark.parametrize("argv", commands(), ids=lambda argv: argv[0])
def test_readme_commands_parse(argv: list[str]) -> None:
    import importlib

    stage = importlib.import_module(f"distilclip.stages.{argv[0]}")
    assert config.parse(stage.Config, argv[1:], stage=argv[0]).out


SMALLER = {
    "ViT-B-32": "TINY",
    "0.07": "1e-6",  # an untrained teacher puts all images close together
    "10000": "4",
    "30000": "100",
    "1024": "8",
    "pairs/{00000..00123}.tar": "pairs/{00000..00001}.tar",
}


def test_readme_commands_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_clip_json: str, pair_tars: Callable[..., list[str]]
) -> None:
    """The README's own session on tiny pairs: only sizes and architectures are made smaller."""
    teacher = json.loads(tiny_clip_json)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("open_clip.list_models", lambda: ["ViT-L-14-quickgelu"])
    monkeypatch.setattr("open_clip.get_model_config", lambda name: teacher)
    safetensors.torch.save_file(create_clip("ViT-L-14-quickgelu", seed=0).model.state_dict(), "l14.safetensors")
    pair_tars(shards=2, rows=12)
    (tmp_path / "my-labelled-set").mkdir()
    (tmp_path / "my-labelled-set/classnames.txt").write_text("cat\ndog\n")
    for split in ("train", "test"):
        members = [(f"{i}.{kind}", content) for i in range(8) for kind, content in labelled(i)]
        write_tar(tmp_path / f"my-labelled-set/{split}-00000.tar", members)
    shutil.copy("pairs/00000.tar", "my-test.tar")
    for argv in commands():
        replaced = [SMALLER.get(word, word) for word in argv]
        assert cli.main([tiny_clip_json if word == "TINY" else word for word in replaced]) == 0, argv
    assert (tmp_path / "page/index.html").exists()


def labelled(number: int) -> list[tuple[str, bytes]]:
    """Members of one labelled sample."""
    return [("jpg", encoded(picture(number))), ("cls", str(number % 2).encode())]


def test_readme_names_every_stage() -> None:
    for stage in cli.STAGES:
        assert f"| `{stage}` |" in README


def test_every_recipe_is_checked() -> None:
    assert len(RECIPES) >= 1


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_parse(path: Path) -> None:
    steps = run_stage.read_steps(config.read_recipe(str(path)), out="out", seed=None, source=str(path))
    assert len(steps) >= 3


def recipes_section() -> str:
    """The README's section about recipes, in one line."""
    return " ".join(README.partition("\n## Recipes\n")[2].partition("\n## ")[0].split())


def head_of(recipe: str) -> str:
    """The comment at the head of a recipe, in one line."""
    return (ROOT / f"recipes/{recipe}.toml").read_text().partition("\n[")[0].replace("\n# ", " ").replace("\n#", "")


def test_recipes_that_the_readme_names_exist_and_it_names_all() -> None:
    words = {word for code in re.findall(r"`([^`]+)`", recipes_section()) for word in code.split()}
    named = {word for word in words if re.fullmatch(r"(demo|clip|ablation)[\w*-]*", word)}
    names = {path.stem for path in RECIPES}
    assert {pattern for pattern in named if not fnmatch.filter(names, pattern)} == set()
    assert {name for name in names if not any(fnmatch.fnmatch(name, pattern) for pattern in named)} == set()


def test_recipes_that_hold_the_papers_settings_say_what_is_left_open() -> None:
    sentences = re.findall(r"([^.:]*) hold the papers' settings", recipes_section())
    assert len(sentences) == 1
    named = re.findall(r"`([\w-]+)`", sentences[0])
    assert set(named) == {path.stem for path in RECIPES if path.stem.startswith("clip-")}
    assert all("what we chose" in head_of(name) for name in named)


def test_ablations_are_those_of_the_tables_that_the_readme_names() -> None:
    first, last = re.findall(r"CLIP-CID's Tab\. (\d) to (\d)", recipes_section())[0]
    heads = [head_of(path.stem) for path in RECIPES if path.stem.startswith("ablation-")]
    for number in range(int(first), int(last) + 1):
        assert sum(f"CLIP-CID, Tab. {number}:" in head for head in heads) == 1
    for subject in ("second teacher", "views bound", "inherited layers", "each of its six terms"):
        assert sum(subject in head for head in heads) == 1, subject


def test_commands_and_flags_of_the_readmes_recipes_exist() -> None:
    codes = re.findall(r"`([^`]+)`", recipes_section())
    flags = {word for code in codes for word in code.split() if word.startswith("--")}
    options = {name for stage in (run_stage, evaluate, report) for name in option_types(stage.Config)}
    known = {f"--{name.replace('_', '-')}" for name in options}
    assert flags
    assert flags <= known
    runs = [shlex.split(code)[2:] for code in codes if code.startswith("distilclip run ")]
    for argv in runs:
        given = config.parse(run_stage.Config, argv, stage="run")
        assert {given.recipe, *given.other_recipes} <= {"my.toml", *config.packaged_recipes()}
    assert runs


def test_makefile_targets_of_the_pages_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for page in ("README.md", "CONTRIBUTING.md"):
        for target in re.findall(r"^    make ([\w-]+)", (ROOT / page).read_text(), flags=re.MULTILINE):
            assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_no_registry_host_and_no_path_of_a_machine_in_the_constraints() -> None:
    text = (ROOT / "constraints.txt").read_text()
    assert "://" not in text
    assert all("==" in line for line in text.splitlines() if line.strip())
