"""How evaluation sets lie on disk: folders, shards and the splits that their names tell. Local paths and URLs alike."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Literal

from distilclip.data import files
from distilclip.errors import InputError

SplitName = Literal["train", "validation", "test"]

_SPLIT_WORDS: dict[str, SplitName] = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "test": "test",
    "testing": "test",
}


def split_of(name: str) -> SplitName | None:
    """The split whose word a file or folder name begins with (`train-00000.tar`), if any."""
    word = re.match(r"[a-z]*", name.lower())
    return _SPLIT_WORDS.get(word[0]) if word else None


def is_folder(path: str) -> bool:
    """Whether `path` is a folder; links are followed."""
    fs, inner = files.filesystem(path)
    return bool(fs.isdir(inner))


def check_data_root(path: str) -> None:
    """Raise `InputError` for a data root that is no folder: every set would only seem to be missing."""
    if not is_folder(path):
        raise InputError(
            f"--data-root {path} is not a folder, or does not exist. It is the folder that the published sets lie in."
        )


def folder_of(path: str) -> str:
    """The folder itself, or the one that a pattern's files lie in."""
    return path if is_folder(path) else path.rpartition("/")[0] or "."


def list_folder(path: str) -> tuple[list[str], list[str]]:
    """Names of the folders and of the files in a folder, sorted, hidden ones left out.

    Raises `InputError` where there is no such folder.
    """
    if not is_folder(path):
        raise InputError(f"{path} is not a folder, or does not exist. Check the path.")
    if files.is_url(path):
        fs, inner = files.filesystem(path)
        entries = [(entry["name"].rstrip("/"), entry["type"] == "directory") for entry in fs.ls(inner, detail=True)]
    else:
        entries = [(entry.name, entry.is_dir()) for entry in os.scandir(path)]
    named = sorted((name.rsplit("/", 1)[-1], folder) for name, folder in entries)
    shown = [(name, folder) for name, folder in named if not name.startswith(".")]
    return [name for name, folder in shown if folder], [name for name, folder in shown if not folder]


def find_files(path: str, suffixes: Sequence[str]) -> list[str]:
    """All files below a folder whose names end so (in any case), sorted; hidden ones left out."""
    folders, names = list_folder(path)
    found = [files.join(path, name) for name in names if name.lower().endswith(tuple(suffixes))]
    return found + [place for folder in folders for place in find_files(files.join(path, folder), suffixes)]


def shards_by_split(path: str, suffixes: Sequence[str]) -> dict[SplitName, list[str]]:
    """The shards in a folder, in its folders `train`, `val` and `test`, or those that a pattern names, by split.

    A shard's split is the word that its name or its folder's begins with; one without such a word is tested. Raises
    `InputError` where there is no shard.
    """
    splits: dict[SplitName, list[str]] = {}
    if not is_folder(path):
        for uri in files.expand(path):
            splits.setdefault(_split_of_shard(uri), []).append(uri)
        return splits
    folders, names = list_folder(path)
    for name in names:
        if name.lower().endswith(tuple(suffixes)):
            splits.setdefault(split_of(name) or "test", []).append(files.join(path, name))
    for folder in folders:
        split = split_of(folder)
        inside = list_folder(files.join(path, folder))[1] if split else []
        found = [files.join(path, folder, name) for name in inside if name.lower().endswith(tuple(suffixes))]
        if split and found:
            splits.setdefault(split, []).extend(sorted(found, key=natural))
    if not splits:
        raise InputError(f"{path} holds no {' or '.join(suffixes)} file.")
    return splits


def natural(name: str) -> list[tuple[int, str]]:
    """A key that sorts 2.tar before 10.tar."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def _split_of_shard(uri: str) -> SplitName:
    parts = uri.split("/")
    return split_of(parts[-1]) or (split_of(parts[-2]) if len(parts) > 1 else None) or "test"
