"""The architecture as a test: imports point down, names are used once, and the command line is immediate."""

from __future__ import annotations

import ast
import importlib.metadata
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import pytest

from distilclip.cli import STAGES
from distilclip.stage_calls import module_of as module_of_stage

SOURCE = Path(__file__).parents[1] / "src" / "distilclip"

# From the ground up. What stands on a level imports from the levels below it, and from its own package.
LEVELS = [
    {
        "errors",
        "messages",
        "options",
        "methods",
        "devices",
        "files",
        "folder_lock",
        "termination",
        "launch",
        "failures",
        "step_references",
        "csv_rows",
        "digests",
        "stage_folder",
        "progress",
        "stage_calls",
        "mixture",
        "draws",
        "row_weights",
    },
    {"losses", "vectors", "measures", "data", "corpus", "plan"},
    {"grouping", "clustering", "scoring", "packs", "sets", "models"},
    {"train", "evaluate", "export", "intake", "report"},
    {"integrity"},
    {"configs"},
    {"stages"},
    {"cli"},
    {"commands", "__main__"},
]
# What runs a stage, for stages and the training loop only, with what it imports itself.
RUNNERS = {
    "config": {"errors", "files", "messages", "options", "stage_calls", "step_references"},
    "engine": {"errors", "options"},
    "distributed": {"errors", "devices", "losses"},  # of losses only the record of what is where
}
USERS_OF_RUNNERS = {
    "config": {"stages", "commands", "cli"},
    "engine": {"configs", "stages"},
    "distributed": {"stages", "train"},
}
FILES = [p for p in sorted(SOURCE.rglob("*.py")) if p.name != "__init__.py"]


def module_of(path: Path) -> str:
    """`data/store.py` as `data.store`."""
    return ".".join(path.relative_to(SOURCE).with_suffix("").parts)


MODULES = {module_of(path): path for path in FILES}


def imported_modules(path: Path) -> set[str]:
    """Modules and packages of distilclip that a file imports, also inside functions, without the leading name."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "distilclip":
            inner = node.module.removeprefix("distilclip").lstrip(".")
            for alias in node.names:
                full = f"{inner}.{alias.name}".lstrip(".")
                found.add(full if full in MODULES or not inner else inner)
        elif isinstance(node, ast.Import):
            found |= {a.name.removeprefix("distilclip.") for a in node.names if a.name.startswith("distilclip.")}
    return found


def package_of(module: str) -> str:
    return module.split(".")[0]


def level_of(package: str) -> int:
    return next(level for level, packages in enumerate(LEVELS) if package in packages)


def test_there_are_files_to_check() -> None:
    assert len(FILES) > 100
    assert {package_of(module) for module in MODULES} == set().union(*LEVELS) | set(RUNNERS)


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_imports_point_down(path: Path) -> None:
    package = package_of(module_of(path))
    for module in imported_modules(path):
        target = package_of(module)
        if target == package:
            continue
        if package == "__main__":
            assert target == "cli"
        elif package in RUNNERS:
            assert target in RUNNERS[package], f"{path} imports {module}"
        elif target in RUNNERS:
            assert package in USERS_OF_RUNNERS[target], f"{path} imports {module}"
        elif package in LEVELS[0]:
            assert target in {"errors", "messages", "options", "files", "folder_lock", "launch"}, (
                f"{path} imports {module}"
            )
        else:
            assert level_of(target) < level_of(package), f"{path} imports {module}"


def test_no_module_imports_itself_in_a_circle() -> None:
    imports = {module: imported_modules(path) & set(MODULES) for module, path in MODULES.items()}
    done: set[str] = set()
    while free := {module for module in imports if module not in done and imports[module] <= done}:
        done |= free
    assert set(imports) == done


def test_a_leading_underscore_keeps_other_packages_out() -> None:
    for module, path in MODULES.items():
        for imported in imported_modules(path):
            if any(part.startswith("_") for part in imported.split(".")):
                assert package_of(imported) == package_of(module), f"{module} imports {imported}"


def test_no_two_modules_and_no_two_public_classes_have_one_name() -> None:
    """A stage and its options are called as its command is; all others, and all public classes, have own names."""
    modules, classes = defaultdict(list), defaultdict(list)
    for module, path in MODULES.items():
        if package_of(module) in ("stages", "configs"):
            continue
        modules[module.split(".")[-1]].append(module)
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                classes[node.name].append(module)
    assert {name: where for name, where in modules.items() if len(where) > 1} == {}
    assert {name: where for name, where in classes.items() if len(where) > 1} == {}


def test_no_import_of_the_package_is_renamed() -> None:
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "distilclip":
                assert not [a for a in node.names if a.asname], f"{path}:{node.lineno}"


def test_no_folder_is_a_flat_hall() -> None:
    for folder in {path.parent for path in FILES if path.parent != SOURCE}:
        assert len([p for p in folder.glob("*.py") if p.name != "__init__.py"]) <= 20, folder


def test_functions_stay_under_60_lines() -> None:
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.body:
                own = node.body[1:] if ast.get_docstring(node) else node.body
                lines = own[-1].end_lineno - own[0].lineno + 1 if own and own[-1].end_lineno else 0
                assert lines < 60, f"{path}:{node.lineno} {node.name} has {lines} lines"


def test_only_cli_and_run_import_stages() -> None:
    for module, path in MODULES.items():
        if module not in ("cli", "stages.run", "stages.demo"):
            imported = {m for m in imported_modules(path) if package_of(m) == "stages"}
            assert all(m.startswith("stages._") and package_of(module) == "stages" for m in imported), module


def test_two_levels_deep() -> None:
    assert max(len(path.relative_to(SOURCE).parts) for path in FILES) == 2


def test_report_imports_no_torch() -> None:
    code = "import sys, distilclip.stages.report; assert 'torch' not in sys.modules, 'torch'"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_search_imports_no_torch() -> None:
    code = "import sys, distilclip.stages.search; assert 'torch' not in sys.modules, 'torch'"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("stage", STAGES)
def test_the_options_of_a_stage_import_nothing_heavy(stage: str) -> None:
    """So that its help, a mistyped flag and a refused value take less than half a second."""
    code = (
        f"import sys, distilclip.configs.{module_of_stage(stage)}; "
        "heavy = {'torch', 'numpy', 'pyarrow', 'fsspec', 'rich', 'jaxtyping', 'PIL'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
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


def test_the_version_is_that_of_the_installed_package_and_costs_nothing() -> None:
    code = (
        "import sys, distilclip; heavy = {'torch', 'numpy', 'importlib.metadata'} & set(sys.modules); "
        "assert not heavy, heavy; print(distilclip.__version__)"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", f"import sys; sys.path += {sys.path!r}; {code}"],
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == importlib.metadata.version("distilclip")


def test_public_names_exist_and_have_docstrings() -> None:
    import distilclip

    assert len(distilclip.__all__) >= 15
    for name in distilclip.__all__:
        assert getattr(distilclip, name).__doc__, name
