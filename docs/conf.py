"""Build the manual: `make docs`. It reads the pages here, the docstrings and the options of the stages; no network."""

from __future__ import annotations

import importlib.metadata
import re
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from flags import write_flags  # noqa: E402 - beside this file

project = "distilclip"
author = "the distilclip maintainers"
release = importlib.metadata.version("distilclip")
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["log.md", "results.md", "benchmarks.md", "reliability.md", "leaderboard.md"]
myst_enable_extensions = ["deflist"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = "distilclip"
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
python_maximum_signature_line_length = 88


def read_docstring(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Let Sphinx read our docstrings, which are plain text: a block that stands in by four is a formula or code."""
    is_block = False
    for place, line in enumerate(lines):
        begins = line.startswith("    ") and not lines[place - 1].strip() and bool(lines[place - 2 : place - 1])
        if begins and not is_block and not re.fullmatch(r"\w+:", lines[place - 2].strip()):
            is_block = True
            lines[place - 1] = "::\n"
        is_block = is_block and (line.startswith("    ") or not line.strip())
        if not is_block:
            parts = re.split(r"(`[^`]*`)", line)
            lines[place] = "".join(
                p if p.startswith("`") else re.sub(r"([*|]|(?<=\w)_(?!\w))", r"\\\1", p) for p in parts
            )
    lines[:] = "\n".join(lines).split("\n")


def setup(app: Any) -> None:
    """Write the generated pages, and see every docstring before Sphinx does."""
    write_flags(HERE / "generated" / "flags")
    app.connect("autodoc-process-docstring", read_docstring, priority=400)
