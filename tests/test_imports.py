"""The architecture as a test: imports point down, and the command line is immediate."""

from __future__ import annotations

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "distilclip"

# What each part may import from the package; data/files.py and errors.py are the ground everything stands on.
GROUND = {"errors", "data.files", "devices", "options"}
ALLOWED = {
    "ops": {"ops"},
    "data": {"data", "ops", "progress"},
    "corpus": {"corpus", "data"},
    "models": {"models", "data", "ops"},
    "train": {"train", "models", "data", "ops", "losses", "progress", "run", "distributed"},
    "evaluate": {"evaluate", "models", "data", "ops", "progress"},
    "report": {"report", "data", "ops", "run", "evaluate.headings"},
    "export": {"export", "models", "data"},
    "stages": {
        "stages",
        "train",
        "evaluate",
        "report",
        "export",
        "models",
        "data",
        "corpus",
        "ops",
        "losses",
        "progress",
    }
    | {"config", "run", "engine", "distributed", "plan"},
    "plan": {"plan"},
    "__main__": {"cli"},
    "cli": {"stages", "config"},
    "config": set(),
    "run": set(),
    "engine": set(),
    "distributed": set(),
    "losses": {"ops"},
    "progress": set(),
    "errors": set(),
    "devices": set(),
    "options": set(),
}


def imported_modules(path: Path) -> set[str]:
    """Modules of the package that a file imports, without the leading `distilclip.`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "distilclip":
            inner = node.module.removeprefix("distilclip").lstrip(".")
            found |= {f"{inner}.{alias.name}".lstrip(".") for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name.removeprefix("distilclip.") for a in node.names if a.name.startswith("distilclip.")}
    return found


FILES = [p for p in sorted(SOURCE.rglob("*.py")) if p != SOURCE / "__init__.py"]


def test_there_are_files_to_check() -> None:
    assert len(FILES) > 30


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_point_down(path: Path) -> None:
    relative = path.relative_to(SOURCE)
    part = relative.parts[0].removesuffix(".py")
    for module in imported_modules(path):
        on_ground = any(module == g or module.startswith(f"{g}.") for g in GROUND)
        assert on_ground or any(f"{module}.".startswith(f"{a}.") for a in ALLOWED[part]), f"{relative} imports {module}"


def test_only_cli_and_run_import_stages() -> None:
    for path in FILES:
        relative = str(path.relative_to(SOURCE))
        if relative not in ("cli.py", "stages/run.py", "stages/demo.py"):
            assert not any(m.split(".")[0] == "stages" for m in imported_modules(path)), relative


def test_two_levels_deep() -> None:
    assert max(len(path.relative_to(SOURCE).parts) for path in FILES) == 2


def test_report_imports_no_torch() -> None:
    code = "import sys, distilclip.stages.report; assert 'torch' not in sys.modules, 'torch'"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_search_imports_no_torch() -> None:
    code = "import sys, distilclip.stages.search, distilclip.export.runtime; assert 'torch' not in sys.modules, 'torch'"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from distilclip.cli import main; main(['--help']); "
        "heavy = {'torch', 'numpy', 'tyro', 'fsspec', 'rich'} & set(sys.modules); assert not heavy, heavy"
    )
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "balance" in done.stdout
    assert time.perf_counter() - started < 5  # the set of modules above is the real check; this catches a hang


def test_public_names_exist_and_have_docstrings() -> None:
    import distilclip

    assert len(distilclip.__all__) >= 15
    for name in distilclip.__all__:
        assert getattr(distilclip, name).__doc__, name
