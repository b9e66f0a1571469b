"""Measure the layout of src/ and write the list of files in ARCHITECTURE.md.

python -m tests.layout            # print the measurements
python -m tests.layout --write    # bring ARCHITECTURE.md up to date
"""

from __future__ import annotations

import ast
import io
import statistics
import sys
import tokenize
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "distilclip"
BEGIN, END = "<!-- files: begin -->", "<!-- files: end -->"
NUMERIC = ("losses", "grouping", "clustering", "vectors", "measures")


def modules() -> dict[str, Path]:
    """Every module by its dotted name without the leading `distilclip.`, packages' `__init__` left out."""
    paths = sorted(p for p in SOURCE.rglob("*.py") if p.name != "__init__.py")
    return {".".join(p.relative_to(SOURCE).with_suffix("").parts): p for p in paths}


def imports_of(path: Path) -> set[str]:
    """Modules of the package that a file imports, also inside functions."""
    names = modules()
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "distilclip":
            inner = (node.module or "").removeprefix("distilclip").lstrip(".")
            for alias in node.names:
                full = f"{inner}.{alias.name}".lstrip(".")
                found.add(full if full in names else inner)
    return found


def first_line(path: Path) -> str:
    """The first line of a module's docstring."""
    return (ast.get_docstring(ast.parse(path.read_text())) or "").split("\n")[0]


def listing() -> str:
    """One line for every file, grouped by folder: its name and what it does."""
    lines: list[str] = []
    folders = [SOURCE, *sorted(p for p in SOURCE.iterdir() if (p / "__init__.py").exists())]
    for folder in folders:
        title = "src/distilclip/" if folder == SOURCE else f"{folder.name}/"
        lines += ["", f"**{title}** {first_line(folder / '__init__.py')}", ""]
        files = [p for p in sorted(folder.glob("*.py")) if p.name not in ("__init__.py", "__main__.py")]
        lines += [f"- `{path.name}` {first_line(path)}" for path in files]
    return "\n".join(lines[1:])


def functions() -> Iterator[tuple[str, int, int]]:
    """Name, lines of the body and number of parameters of every function."""
    for module, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                lines = (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0
                arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                yield f"{module}.{node.name}", lines, len([a for a in arguments if a.arg not in ("self", "cls", "ctx")])


def num_comments(path: Path) -> int:
    """Comments of a file, those of tools left out."""
    tokens = tokenize.generate_tokens(io.StringIO(path.read_text()).readline)
    texts = [token.string for token in tokens if token.type == tokenize.COMMENT]
    return len([text for text in texts if not text.startswith(("# type:", "# noqa"))])


def num_levels() -> int:
    """Levels of packages: the longest chain of imports from package to package, single modules left out."""
    packages = {name.split(".")[0] for name in modules() if "." in name}
    below: dict[str, set[str]] = {name: set() for name in packages}
    for name, path in modules().items():
        if "." in name:
            below[name.split(".")[0]] |= {m.split(".")[0] for m in imports_of(path)} & packages - {name.split(".")[0]}
    levels: dict[str, int] = {}
    while len(levels) < len(below):
        free = [name for name in below if name not in levels and below[name] <= set(levels)]
        if not free:
            raise ValueError(f"packages import one another in a circle: {sorted(set(below) - set(levels))}")
        for name in free:
            levels[name] = 1 + max((levels[other] for other in below[name]), default=0)
    return max(levels.values())


def measure() -> dict[str, str]:
    """The figures of the layout, by name."""
    names = modules()
    sizes = {name: len(path.read_text().splitlines()) for name, path in names.items()}
    clients = Counter(module for path in names.values() for module in imports_of(path))
    per_folder = Counter(name.split(".")[0] for name in names if "." in name)
    repeated = Counter(name.split(".")[-1] for name in names if not name.startswith(("stages.", "configs.")))
    _, bodies, parameters = zip(*functions(), strict=True)
    numeric = [path for name, path in names.items() if name.split(".")[0] in NUMERIC]
    comments = sum(map(num_comments, names.values()))
    numeric_lines = sum(len(path.read_text().splitlines()) for path in numeric)
    total = sum(len(path.read_text().splitlines()) for path in SOURCE.rglob("*.py"))
    tests = sum(len(path.read_text().splitlines()) for path in (ROOT / "tests").rglob("*.py"))

    def spread(values: tuple[int, ...]) -> str:
        return f"{statistics.median(values):.0f} / {statistics.quantiles(values, n=20)[-1]:.0f} / {max(values)}"

    return {
        "lines of source, files": f"{total:,} in {len(names)}",
        "function lines p50 / p95 / max": spread(bodies),
        "parameters p50 / p95 / max": spread(parameters),
        "levels of packages": str(num_levels()),
        "modules in the largest folder": "{} ({})".format(*reversed(per_folder.most_common(1)[0])),
        "median file, lines": f"{statistics.median(sizes.values()):.0f}",
        "modules with exactly one client": f"{sum(clients[name] == 1 for name in names)} of {len(names)}",
        "module names that occur twice (stages and configs aside)": str(sum(count > 1 for count in repeated.values())),
        "comments per 100 lines": f"{100 * comments / total:.1f}",
        "comments per 100 lines, numeric modules": f"{100 * sum(map(num_comments, numeric)) / numeric_lines:.1f}",
        "test lines per source line": f"{tests / total:.2f}",
    }


def write_listing() -> None:
    """Replace the list of files in ARCHITECTURE.md."""
    path = ROOT / "ARCHITECTURE.md"
    before, rest = path.read_text().split(BEGIN)
    path.write_text(f"{before}{BEGIN}\n{listing()}\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    if "--write" in sys.argv[1:]:
        write_listing()
    for name, value in measure().items():
        print(f"{name:48} {value}")
