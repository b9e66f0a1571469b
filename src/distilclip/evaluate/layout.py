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


def expand_shards(path: str, suffixes: Sequence[str]) -> list[str]:
    """The shards right in a folder, or those that a pattern names; `InputError` where there are none."""
    if not is_folder(path):
        return files.expand(path)
    _, names = list_folder(path)
    found = [files.join(path, name) for name in names if name.lower().endswith(tuple(suffixes))]
    if not found:
        raise InputError(f"{path} holds no {' or '.join(suffixes)} file.")
    return found
