"""Class names and prompt templates of the published sets: found at run time, matched to a set's labels by name.

Tried in this order: openai/CLIP's prompts.md where the user names it; open_clip for ImageNet and its variants; the
package clip-benchmark where it is installed; else the set's own labels and "a photo of a {}.", which is said with the
score. Nothing of it is copied into this repository.
"""

from __future__ import annotations

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

from distilclip.errors import InputError, did_you_mean
from distilclip.evaluate.classes import DEFAULT_TEMPLATES
from distilclip.evaluate.imagenet import names_by_id, unknown_wordnet_id
from distilclip.evaluate.known_set import KnownSet
from distilclip.evaluate.prompts import prompts_of


@dataclass(frozen=True, kw_only=True)
class Wording:
    """Names and templates from one source. Without `names`, the labels themselves are the names.

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
        """The name of each label; see `match_names`. Raises `InputError` for a label that has none."""
        if self.by_label is not None:
            for label in labels:
                if label not in self.by_label:
                    raise unknown_wordnet_id(label, tuple(self.by_label), where=where)
            return tuple(self.by_label[label] for label in labels)
        if self.names is None:
            return tuple(readable(label, blanks=self.blanks) for label in labels)
        return match_names(labels, self.names, aliases=aliases, source=self.source, where=where)


def wording_of(known: KnownSet, *, prompts: str | None = None) -> Wording:
    """The best names and templates there are for a set; `prompts` is the path of openai/CLIP's prompts.md."""
    if known.group in ("robustness", "variant") or known.name == "imagenet":
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
    """The name that has the same words as each label, in any order and case, or as the label's alias.

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
    """A label as words, with a blank for any of `blanks`: `red_fox` becomes `red fox`."""
    return " ".join(re.sub(f"[{re.escape(blanks)}]", " ", label).split())


def _imagenet_wording(known: KnownSet) -> Wording:
    templates = tuple(template("{}") for template in OPENAI_IMAGENET_TEMPLATES)
    source = f"open_clip {metadata.version('open_clip_torch')}"
    if known.name.startswith("objectnet"):
        return Wording(templates=templates, source=f"{source}, with ObjectNet's own classes", is_clips=True)
    return Wording(templates=templates, by_label=names_by_id(), source=source, is_clips=True)


@cache
def _clip_benchmark() -> dict[str, dict[str, Any]]:
    """The English class names and templates that clip-benchmark ships as JSON; empty where it is not installed.

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
