"""Choose class names and prompt templates for a published set, from openai/CLIP's prompts.md or other sources."""

from __future__ import annotations

import ast
import hashlib
import importlib.resources
import importlib.util
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from typing import Any

from open_clip import OPENAI_IMAGENET_TEMPLATES

from distilclip import files
from distilclip.errors import InputError, did_you_mean
from distilclip.sets.catalogue import KnownSet
from distilclip.sets.classes import DEFAULT_TEMPLATES
from distilclip.sets.imagenet import names_by_id, unknown_wordnet_id

SHA256 = "f98d2d25e78cc1fee650240b519f7cb58a83cfcc5aa538cde52514809cf4a1c9"

_SECTION = re.compile(r"^## (\S+)\s*$(.*?)(?=^## |\Z)", re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"^```\w*\s*$(.*?)^```\s*$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class PromptSet:
    """Hold a set's classes, in the order of its labels at OpenAI, and its templates. A class may have several names."""

    classes: tuple[str | tuple[str, ...], ...]
    templates: tuple[str, ...]


def read_prompts(path: str) -> dict[str, PromptSet]:
    """Read every set in prompts.md, by OpenAI's name for it.

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
    """Read one set of the file; `InputError` with near names where it has none of that name."""
    known = read_prompts(path)
    if name not in known:
        raise InputError(f"{path} has no set {name!r}. {did_you_mean(name, known)}")
    return known[name]


def parse_prompts(text: str, *, source: str) -> dict[str, PromptSet]:
    """Parse the lists `classes` and `templates` of every section: Python literals, evaluated as literals only."""
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


@dataclass(frozen=True, kw_only=True)
class Wording:
    """Hold names and templates from one source. Without `names`, the labels themselves are the names.

    `names` may be in any order. `by_label` is given where the source names labels outright. `is_clips` says whether
    these are the prompts that CLIP was measured with. Labels that are names themselves get blanks for `blanks`.
    """

    templates: tuple[str, ...]
    source: str
    is_clips: bool
    names: tuple[str, ...] | None = None
    by_label: Mapping[str, str] | None = None
    blanks: str = "_"

    def names_of(self, labels: Sequence[str], *, aliases: Mapping[str, str], where: str) -> tuple[str, ...]:
        """Return the name of each label; see `match_names`. Raises `InputError` for a label that has none."""
        if self.by_label is not None:
            for label in labels:
                if label not in self.by_label:
                    raise unknown_wordnet_id(label, tuple(self.by_label), where=where)
            return tuple(self.by_label[label] for label in labels)
        if self.names is None:
            return tuple(readable(label, blanks=self.blanks) for label in labels)
        return match_names(labels, self.names, aliases=aliases, source=self.source, where=where)


def wording_of(known: KnownSet, *, prompts: str | None = None) -> Wording:
    """Return the best known names and templates for a set; `prompts` is the path of openai/CLIP's prompts.md."""
    if known.group == "robustness" or known.name == "imagenet":
        return _imagenet_wording(known)
    if prompts is not None:
        found = prompts_of(prompts, known.prompts)
        names = tuple(name if isinstance(name, str) else name[0] for name in found.classes)
        return Wording(templates=found.templates, names=names, source="openai/CLIP prompts.md", is_clips=True)
    shipped = _clip_benchmark()
    if known.benchmark in shipped["templates"]:
        listed = shipped["names"].get(known.benchmark)
        version = metadata.version("clip-benchmark")
        return Wording(
            templates=tuple(template.replace("{c}", "{}") for template in shipped["templates"][known.benchmark]),
            names=tuple(listed) if listed else None,
            source=f"clip-benchmark {version}"
            if listed
            else f"clip-benchmark {version}, class names of the set itself",
            is_clips=True,
            blanks=known.blanks,
        )
    return Wording(templates=DEFAULT_TEMPLATES, source="the set's own labels", is_clips=False, blanks=known.blanks)


def match_names(
    labels: Sequence[str], names: Sequence[str], *, aliases: Mapping[str, str], source: str, where: str
) -> tuple[str, ...]:
    """Return the name that has the same words as each label, in any order and case, or as the label's alias.

    By position they would be wrong: the lists of Oxford pets and EuroSAT are in another order than the labels. Raises
    `InputError` for a label without a name, for one name of two labels, and for a name that no label bears.
    """
    by_words = {_words(name): name for name in names}
    aliased = {_words(label): _words(name) for label, name in aliases.items()}
    found: dict[str, str] = {}
    for label in labels:
        words = _words(label)
        match = by_words.get(aliased.get(words, words)) or by_words.get(words)
        if match is None:
            raise InputError(
                f"{where}: the class {label!r} has no name in {source}. {did_you_mean(readable(label), names)}"
            )
        if match in found:
            raise InputError(f"{where}: the classes {found[match]!r} and {label!r} are both {match!r} in {source}.")
        found[match] = label
    unused = [name for name in names if name not in found]
    if unused:
        raise InputError(
            f"{where}: {len(unused)} of {len(names)} classes in {source} are not there, first {unused[0]!r}. "
            f"{did_you_mean(unused[0], [readable(label) for label in labels])}"
        )
    return tuple(found)


def readable(label: str, *, blanks: str = "_") -> str:
    """Return a label as words, with a blank for any of `blanks`: `red_fox` becomes `red fox`."""
    return " ".join(re.sub(f"[{re.escape(blanks)}]", " ", label).split())


def _imagenet_wording(known: KnownSet) -> Wording:
    templates = tuple(template("{}") for template in OPENAI_IMAGENET_TEMPLATES)
    source = f"open_clip {metadata.version('open_clip_torch')}"
    if known.name == "objectnet":
        return Wording(templates=templates, source=f"{source}, with ObjectNet's own classes", is_clips=True)
    return Wording(templates=templates, by_label=names_by_id(), source=source, is_clips=True)


@cache
def _clip_benchmark() -> dict[str, dict[str, Any]]:
    """Read the English class names and templates that clip-benchmark ships as JSON; empty if it is not installed.

    Its Python modules are not imported: with today's numpy and without its other dependencies they fail.
    """
    if importlib.util.find_spec("clip_benchmark") is None:
        return {"names": {}, "templates": {}}
    folder = importlib.resources.files("clip_benchmark") / "datasets"
    return {
        "names": json.loads((folder / "en_classnames.json").read_text()),
        "templates": json.loads((folder / "en_zeroshot_classification_templates.json").read_text()),
    }


def _words(name: str) -> tuple[str, ...]:
    return tuple(sorted(re.findall(r"[a-z0-9.]+", re.sub(r"['\N{RIGHT SINGLE QUOTATION MARK}]", "", name.casefold()))))
