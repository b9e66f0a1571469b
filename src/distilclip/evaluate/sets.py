"""How `[NAME=]KIND:PATH` leads to an evaluation set."""

from __future__ import annotations

import re
from collections.abc import Callable

from distilclip.errors import InputError, did_you_mean
from distilclip.evaluate.dataset import LabelledSet, PairSet
from distilclip.evaluate.labelled import read_folder, read_tars
from distilclip.evaluate.paired import read_pairs

KINDS: dict[str, Callable[[str, str], LabelledSet | PairSet]] = {
    "folder": read_folder,
    "tar": read_tars,
    "pairs": read_pairs,
}
"""Readers by kind; each takes the set's name and path."""


def load_set(spec: str) -> LabelledSet | PairSet:
    """The set that `[NAME=]KIND:PATH` means.

    - `folder:PATH`: a folder of images per class, in PATH or in PATH/train, PATH/val and PATH/test;
    - `tar:PATH`: tars with `key.cls` or a `label` in `key.json`, a pattern or a folder of them;
    - `pairs:PATH`: image-text shards as for training, a pattern or a folder of them.

    Raises `InputError` for a set that is not there or does not hold together: a label that is no class or out of
    range, a class without images, a template without `{}`.
    """
    name, kind, path = parse_spec(spec)
    return KINDS[kind](name, path)


def parse_spec(spec: str) -> tuple[str, str, str]:
    """Name, kind and path of a set; nothing is read. The name is the path's last part that is no pattern."""
    match = re.fullmatch(r"(?:([\w.+-]+)=)?([\w-]+):(?!//)(.+)", spec)
    if not match:
        raise InputError(
            f"The evaluation set {spec!r} does not say of what kind it is. Write folder:PATH, tar:PATH or pairs:PATH."
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
