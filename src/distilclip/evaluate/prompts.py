"""Class names and templates from openai/CLIP's `data/prompts.md`, which the user has fetched."""

from __future__ import annotations

import ast
import hashlib
import re
from dataclasses import dataclass

from distilclip.data import files
from distilclip.errors import InputError, did_you_mean

SHA256 = "f98d2d25e78cc1fee650240b519f7cb58a83cfcc5aa538cde52514809cf4a1c9"

_SECTION = re.compile(r"^## (\S+)\s*$(.*?)(?=^## |\Z)", re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"^```\w*\s*$(.*?)^```\s*$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class PromptSet:
    """A set's classes, in the order of its labels at OpenAI, and its templates. A class may have several names."""

    classes: tuple[str | tuple[str, ...], ...]
    templates: tuple[str, ...]


def read_prompts(path: str) -> dict[str, PromptSet]:
    """Every set in the file, by OpenAI's name for it.

    Raises `InputError` where the file is missing or is not the one whose SHA-256 is known.
    """
    if not files.exists(path):
        raise InputError(f"{path} does not exist. It is data/prompts.md of the repository openai/CLIP: fetch it once.")
    content = files.read_bytes(path)
    found = hashlib.sha256(content).hexdigest()
    if found != SHA256:
        raise InputError(
            f"{path} has SHA-256 {found[:12]}..., not {SHA256[:12]}...: it was edited, or cut on the way. "
            "Fetch data/prompts.md of openai/CLIP again; your own templates go into a text file, one a line."
        )
    return parse_prompts(content.decode(), source=path)


def prompts_of(path: str, name: str) -> PromptSet:
    """One set of the file; `InputError` with near names where it has none of that name."""
    known = read_prompts(path)
    if name not in known:
        raise InputError(f"{path} has no set {name!r}. {did_you_mean(name, known)}")
    return known[name]


def parse_prompts(text: str, *, source: str) -> dict[str, PromptSet]:
    """The lists `classes` and `templates` of every section: Python literals, evaluated as literals only."""
    sets = {}
    for name, body in _SECTION.findall(text):
        lists = {}
        for code in _CODE.findall(body):
            for statement in ast.parse(code).body:
                if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
                    lists[statement.targets[0].id] = ast.literal_eval(statement.value)
        if not {"classes", "templates"} <= set(lists):
            raise InputError(f"{source}: the section {name!r} lacks the list `classes` or `templates`.")
        classes = tuple(tuple(c) if isinstance(c, list) else c for c in lists["classes"])
        sets[name] = PromptSet(classes, tuple(lists["templates"]))
    return sets
