"""The manual is true: each page's commands and examples are run in their order, and what they print is compared."""

from __future__ import annotations

import contextlib
import io
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import distilclip as dc
from distilclip import cli, config
from distilclip.configs.export import What
from distilclip.losses.terms import COMPUTE
from distilclip.methods import METHODS, TERMS
from distilclip.options import option_types
from docs import flags

ROOT = Path(__file__).parents[1]
GUIDE = ROOT / "docs/guide"
API = ROOT / "docs/api.md"
PAGES = sorted([*GUIDE.glob("*.md"), API])
START = GUIDE / "start.md"
QUICK = {"balance", "kmeans"}
"""Pages that `make test` runs; the others need the folder of the first page, and `make test-slow` runs them."""
EXACT = {"balance", "kmeans", "api"}
"""Pages whose output has no numbers that a machine may change."""


@dataclass(frozen=True)
class Block:
    """A fenced block of a page, or a hidden `set-up`. `name` is the file that it is written to."""

    language: str
    text: str
    where: str
    name: str = ""


def blocks_of(page: Path) -> list[Block]:
    """The blocks of a page in order."""
    text = page.read_text()
    pattern = r"^```(?:\{code-block\} )?(\w+)\n(?::caption: ([^\n]*)\n\n)?(.*?)^```$|^<!-- (set-up)\n(.*?)^-->$"
    found = []
    for match in re.finditer(pattern, text, flags=re.MULTILINE | re.DOTALL):
        language, name, content, hidden, code = match.groups()
        where = f"{page.relative_to(ROOT)}:{text[: match.start()].count(chr(10)) + 1}"
        found.append(Block("python", code, where) if hidden else Block(language, content, where, name or ""))
    return found


def commands_of(block: Block) -> list[str]:
    """The lines of a block of commands, continued lines joined."""
    return [line for line in block.text.replace("\\\n", " ").splitlines() if line.strip()]


def stages_of(line: str) -> tuple[str, list[str]] | None:
    """The stage that a command calls, and its words."""
    words = shlex.split(line, comments=True)
    if "distilclip" not in words:
        return None
    name, *rest = words[words.index("distilclip") + 1 :]
    return (name, rest[: rest.index(">")] if ">" in rest else rest) if name in cli.STAGES else None


def run_page(page: Path, folder: Path) -> None:
    """Run all blocks of a page in a folder."""
    scope: dict[str, Any] = {"__name__": "manual"}
    known = dict(TERMS), dict(COMPUTE)
    printed = ""
    try:
        for block in blocks_of(page):
            if block.name:
                (folder / block.name).write_text(block.text)
            elif block.language == "text":
                compare(block, printed, exact=page.stem in EXACT)
            elif block.language in ("bash", "python"):
                with listening() as heard:
                    run_block(block, scope)
                printed = heard.getvalue()
    finally:
        for table, before in zip((TERMS, COMPUTE), known, strict=True):
            table.clear()
            table.update(before)  # type: ignore[arg-type]


@contextlib.contextmanager
def listening() -> Iterator[io.StringIO]:
    """What is printed in the block; shown where the block fails."""
    heard = io.StringIO()
    with contextlib.redirect_stdout(heard), contextlib.redirect_stderr(heard):
        try:
            yield heard
        except BaseException:
            sys.__stderr__ and print(heard.getvalue(), file=sys.__stderr__)
            raise


def run_block(block: Block, scope: dict[str, Any]) -> None:
    if block.language == "python":
        exec(compile(block.text, block.where, "exec"), scope)
        return
    for line in commands_of(block):
        expected = re.search(r"# exit code (\d)", line)
        code = run_line(shlex.split(line, comments=True))
        assert code == int(expected[1] if expected else 0), f"{block.where}: {line}"


def run_line(words: list[str]) -> int:
    """Run one command in this process, with no further processes to read; its exit code."""
    words, target = (words[:-2], words[-1]) if words[-2:-1] == [">"] else (words, None)
    if words[0] == "distilclip":
        text = io.StringIO()
        with contextlib.redirect_stdout(text) if target else contextlib.nullcontext():
            code = cli.main(alone(words[1], words[1:]))
        if target:
            Path(target).write_text(text.getvalue())
        return code
    assert words[0] == "python", words
    script = ROOT / words[1]
    here = ["--num-workers", "0"] if "--num-workers" in script.read_text() else []
    before, sys.argv = sys.argv, [*words[1:], *here]
    try:
        runpy.run_path(str(script), run_name="__main__")
    finally:
        sys.argv = before
    return 0


def alone(stage: str, words: list[str]) -> list[str]:
    """Words that let this process read and decode: loader processes take seconds to start."""
    if stage == "run" and "--dry-run" not in words:
        return [*words, "--overrides", "embed.num_workers=0", "train.num_workers=0"]
    if stage in cli.STAGES and "num_workers" in option_types(config.config_type_of(stage)):
        return [*words, "--num-workers", "0"]
    return words


def compare(block: Block, printed: str, *, exact: bool) -> None:
    """Each line must have been printed, in this order; `...` stands for any lines. Numbers count only where `exact`."""

    def masked(line: str) -> str:
        line = " ".join(re.sub(r"^\d\d:\d\d:\d\d ", "", line).split())  # the time, which log files have
        return line if exact else re.sub(r"\d[\d.,]*|#", "#", line)

    lines = iter([masked(line) for line in printed.splitlines()])
    for wanted in block.text.splitlines():
        assert wanted == "..." or masked(wanted) in lines, f"{block.where}: {wanted!r} was not printed in:\n{printed}"


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the first page was run."""
    folder = tmp_path_factory.mktemp("manual")
    with contextlib.chdir(folder):
        run_page(START, folder)
    return folder


@pytest.mark.parametrize("page", [page for page in PAGES if page.stem in QUICK], ids=lambda page: page.stem)
def test_the_page_is_true(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_page(page, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if page.stem not in QUICK], ids=lambda page: page.stem)
def test_the_page_is_true_in_the_folder_of_the_first(
    page: Path, started: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if page == START:
        assert (started / "page/index.html").exists()
        return
    folder = Path(shutil.copytree(started, tmp_path / "work"))
    monkeypatch.chdir(folder)
    run_page(page, folder)


def all_commands() -> list[tuple[Block, str, list[str]]]:
    found = []
    for page in PAGES:
        for block in blocks_of(page):
            for line in commands_of(block) if block.language in ("bash", "shell") else []:
                if (stage := stages_of(line)) is not None:
                    found.append((block, *stage))
    return found


def test_every_flag_of_every_command_exists() -> None:
    """Also of those for machines that are not here."""
    found = all_commands()
    assert {stage for _, stage, _ in found} >= set(cli.STAGES) - {"demo"}
    for block, stage, words in found:
        names = {word[2:].split("=")[0].replace("-", "_") for word in words if word.startswith("--")}
        assert names <= {*option_types(config.config_type_of(stage))}, block.where


ELSEWHERE = [(stage, words) for block, stage, words in all_commands() if block.language == "shell"]


@pytest.mark.parametrize(("stage", "words"), ELSEWHERE, ids=[" ".join([s, *w])[:60] for s, w in ELSEWHERE])
def test_commands_for_other_machines_parse(stage: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert config.parse(config.config_type_of(stage), words, stage=stage).out != ""


def test_files_and_sections_that_pages_link_to_exist() -> None:
    generated = {f"docs/generated/flags/{name}.md" for name in [*cli.STAGES, "index"]}
    num_links = 0
    for page in [*PAGES, ROOT / "docs/index.md"]:
        for target in re.findall(r"\]\((?!https?://)([^)#]+)", page.read_text()):
            path = os.path.relpath(page.parent / target, ROOT)
            assert path in generated or (ROOT / path).exists(), f"{page.name}: {target}"
            num_links += 1
    assert num_links > 20


def test_the_tables_of_losses_and_exports_are_complete() -> None:
    losses, export = (GUIDE / "losses.md").read_text(), (GUIDE / "export.md").read_text()
    assert {name for name in TERMS if not re.search(rf"^\| `{name}`", losses, flags=re.MULTILINE)} == set()
    assert {name for name in METHODS if not re.search(rf"^\| `{name}`", losses, flags=re.MULTILINE)} == set()
    for name, weights in METHODS.items():
        line = next(line for line in losses.splitlines() if line.startswith(f"| `{name}`"))
        assert name == "clip-cid-kd" or all(f"{term} {weight:g}" in line for term, weight in weights.items())
    assert {name for name in typing.get_args(What) if f"`{name}`" not in export} == set()


def test_the_page_of_the_api_has_every_public_name() -> None:
    documented = set(re.findall(r"^\.\. auto\w+:: distilclip\.([\w.]+)$", API.read_text(), flags=re.MULTILINE))
    public = {*dc.__all__, *(f"losses.{name}" for name in dc.losses.__all__)} - {"losses", "stages"}
    assert documented == public


@pytest.mark.parametrize("stage", cli.STAGES)
def test_every_flag_has_its_line_with_words(stage: str) -> None:
    page = flags.flags_page(stage)
    for name in option_types(config.config_type_of(stage)):
        assert re.search(rf"^`--{name.replace('_', '-')}` .*\n: \S", page, flags=re.MULTILINE), name


@pytest.mark.slow
def test_the_manual_is_built_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("sphinx", reason="`make docs` installs Sphinx")
    words = ["-q", "-W", "--keep-going", "-E", "-b", "html", str(ROOT / "docs"), str(tmp_path)]
    built = subprocess.run([sys.executable, "-m", "sphinx", *words], capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    page = (tmp_path / "api.html").read_text()
    assert 'id="distilclip.balance"' in page
    assert 'id="distilclip.losses.contrastive"' in page
    assert "target-removed" in (tmp_path / "generated/flags/balance.html").read_text()
