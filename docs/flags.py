"""Write the manual's pages of flags, one for each stage, from what `distilclip STAGE --help` says of them."""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from pathlib import Path
from typing import Any

from distilclip.cli import STAGES
from distilclip.config import config_type_of, positional_names
from distilclip.options import option_fields, option_types
from distilclip.stage_calls import describe_options

INDEX = """# Every flag

One page for each stage, made from the options that the stage declares. `distilclip STAGE --help` says the same.
A flag with several values takes them one after the other: `--sets a b c`. In recipes and in Python the names have
underscores: `num_steps`.

Every stage also takes `--log-level debug|info|warning|error`, `--quiet` and `--log-format json`.

```{{toctree}}
:maxdepth: 1

{names}
```
"""
PLAIN = {str: "TEXT", int: "WHOLE NUMBER", float: "NUMBER", bool: "True or False"}


def write_flags(folder: Path) -> None:
    """Write a page for each stage, and the list of the pages."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "index.md").write_text(INDEX.format(names="\n".join(STAGES)), encoding="utf-8")
    for stage in STAGES:
        (folder / f"{stage}.md").write_text(flags_page(stage), encoding="utf-8")


def flags_page(stage: str) -> str:
    """Return the page of a stage: every option with its values, its default and its sentence."""
    options = config_type_of(stage)
    sentences, kinds, first = describe_options(options), option_types(options), positional_names(options)
    lines = [f"# {stage}", "", f"{escape(STAGES[stage])}.", ""]
    if first:
        lines += [f"Also without flags, in this order: `distilclip {stage} {' '.join(first).upper()}`.", ""]
    for field in option_fields(options):
        flag = f"`--{field.name.replace('_', '-')}` {describe_kind(kinds[field.name])}{describe_default(field)}"
        lines += [flag, f": {escape(' '.join(sentences[field.name].split()))}", ""]
    return "\n".join(lines)


def describe_kind(kind: Any) -> str:
    """Say which values an option takes."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return describe_kind(next(one for one in inner if one is not types.NoneType))
    if origin is typing.Literal:
        return " or ".join(f"`{value}`" for value in inner)
    if origin is tuple:
        return f"{describe_kind(inner[0])} ..."
    if origin is dict:
        return f"{describe_kind(inner[0])} {describe_kind(inner[1])} ..."
    return PLAIN[kind]


def describe_default(field: dataclasses.Field[Any]) -> str:
    """Say what an option is where it is not given; nothing where the sentence below says it."""
    has_factory = field.default_factory is not dataclasses.MISSING
    if field.default is dataclasses.MISSING and not has_factory:
        return ", required"
    return "" if has_factory or field.default in (None, (), "") else f", default `{field.default}`"


def escape(text: str) -> str:
    """Keep Markdown from reading what a sentence means as it stands; set flags as code."""
    parts = re.split(r"(`[^`]*`|--[a-z][a-z-]*)", text)
    return "".join(
        part
        if part.startswith("`")
        else f"`{part}`"
        if part.startswith("--")
        else re.sub(r"([\\*_<>\[\]|$#])", r"\\\1", part)
        for part in parts
    )
