"""How a set's spec leads to the set: the name of a published one, or `[NAME=]KIND:PATH` for one's own."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from distilclip.errors import InputError, did_you_mean
from distilclip.evaluate.catalogue import CATALOGUE, GROUPS
from distilclip.evaluate.dataset import EvaluationSet, LabelledSet, PairSet
from distilclip.evaluate.folders import check_data_root
from distilclip.evaluate.known_sets import load_known_set
from distilclip.evaluate.labelled import read_folder, read_tars
from distilclip.evaluate.paired import read_pairs

KINDS: dict[str, Callable[[str, str], LabelledSet | PairSet]] = {
    "folder": read_folder,
    "tar": read_tars,
    "pairs": read_pairs,
}
"""Readers by kind; each takes the set's name and path."""


def load_set(spec: str, *, data_root: str | None = None, prompts: str | None = None) -> EvaluationSet:
    """The set that a spec means.

    - `food101` and the other names of the catalogue: read from `data_root`, a `MissingSet` where it is not there;
    - `folder:PATH`: a folder of images per class, in PATH or in PATH/train, PATH/val and PATH/test;
    - `tar:PATH`: tars with `key.cls` or a `label` in `key.json`, a pattern or a folder of them;
    - `pairs:PATH`: image-text shards as for training, a pattern or a folder of them.

    `prompts` is openai/CLIP's prompts.md, for the published sets. Raises `InputError` for a set of one's own that is
    not there, and for any that does not hold together: a label that is no class or out of range, a class without
    images, a template without `{}`.
    """
    name, kind, path = parse_spec(spec)
    if kind in KINDS:
        return KINDS[kind](name, path)
    if data_root is None:
        raise InputError(f"The set {name!r} is read from a data root: give --data-root, or name its own folder.")
    check_data_root(data_root)
    return load_known_set(CATALOGUE[path], data_root=data_root, prompts=prompts)


def expand_groups(specs: Sequence[str]) -> tuple[str, ...]:
    """The specs with `paper`, `robustness` and `retrieval` replaced by the sets that they stand for, each once."""
    return tuple(dict.fromkeys(name for spec in specs for name in GROUPS.get(spec, (spec,))))


def parse_spec(spec: str) -> tuple[str, str, str]:
    """Name, kind and path of a set; nothing is read. A published set is of kind `known`, its path its name.

    The name of one's own set is the path's last part that is no pattern.
    """
    if spec in CATALOGUE:
        return spec, "known", spec
    match = re.fullmatch(r"(?:([\w.+-]+)=)?([\w-]+):(?!//)(.+)", spec)
    if not match:
        raise InputError(
            f"The evaluation set {spec!r} does not say of what kind it is. Write folder:PATH, tar:PATH or pairs:PATH, "
            f"or the name of a published set (--list shows them). {did_you_mean(spec, [*CATALOGUE, *GROUPS])}"
        )
    name, kind, path = match.groups()
    if kind not in KINDS:
        raise InputError(f"The evaluation set {spec!r} is of no known kind. {did_you_mean(kind, KINDS)}")
    path = path.rstrip("/")
    return name or _name_of(path), kind, path


def _name_of(path: str) -> str:
    is_pattern = re.compile(r"[*?\[{]|\.(tar|parquet|csv|tsv)$")
    parts = [part for part in path.split("/") if part.strip(".") and not is_pattern.search(part)]
    return parts[-1] if parts else "set"
