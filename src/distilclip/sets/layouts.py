"""Find the folders, shards and splits of an evaluation set by their names, on disk or at a URL."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Literal

from distilclip import files
from distilclip.errors import InputError

SplitName = Literal["train", "validation", "test"]

_SPLIT_WORDS: dict[str, SplitName] = {
    "train": "train",
    "training": "train",
    "trainval": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
}


def split_of(name: str) -> SplitName | None:
    """Return the split whose word a file or folder name begins with (`train-00000.tar`), if any."""
    return _SPLIT_WORDS.get(_first_word(name))


def is_folder(path: str) -> bool:
    """Return whether `path` is a folder; links are followed."""
    fs, inner = files.filesystem(path)
    return bool(fs.isdir(inner))


def check_data_root(path: str) -> None:
    """Raise `InputError` for a data root that is no folder: every set would only seem to be missing."""
    if not is_folder(path):
        raise InputError(
            f"--data-root {path} is not a folder, or does not exist. It is the folder that the published sets lie in."
        )


def folder_of(path: str) -> str:
    """Return the folder itself, or the one that a pattern's files lie in."""
    return path if is_folder(path) else path.rpartition("/")[0] or "."


def list_folder(path: str) -> tuple[list[str], list[str]]:
    """List the names of the folders and of the files in a folder, sorted, without hidden ones.

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
    """List all files below a folder with one of the suffixes (in any case), sorted, without hidden ones."""
    folders, names = list_folder(path)
    found = [files.join(path, name) for name in names if name.lower().endswith(tuple(suffixes))]
    return found + [place for folder in folders for place in find_files(files.join(path, folder), suffixes)]


def split_folders(path: str) -> dict[SplitName, str]:
    """Return the folders of a folder that are its splits, `train`, `val` and `test`; none if its folders are classes.

    A folder `train` beside others is a class like these, unless it holds folders itself. Raises `InputError` for splits
    that are not sorted into classes, folders beside splits, and two folders with the images of one split.
    """
    folders = list_folder(path)[0]
    named = [folder for folder in folders if split_of(folder)]
    unsorted = [folder for folder in named if not list_folder(files.join(path, folder))[0]]
    others = [folder for folder in folders if folder not in named]
    if not named or (others and len(unsorted) == len(named)):
        return {}
    if unsorted:
        raise InputError(
            f"{path}: the images in {', '.join(unsorted)} lie in no class folder. Sort them into a folder per class "
            "(those of ImageNet's val: torchvision.datasets.ImageNet does it, or the script valprep.sh), or move "
            "images without labels elsewhere."
        )
    if others:
        raise InputError(
            f"{path} has the folder {others[0]} beside {named[0]}, in which there are folders of classes. Move what is "
            f"no split elsewhere; if {named[0]} is itself a class, put its images right into it."
        )
    _check_overlap(named, where=path)
    return {_SPLIT_WORDS[_first_word(folder)]: folder for folder in named}


def shards_by_split(path: str, suffixes: Sequence[str]) -> dict[SplitName, list[str]]:
    """List shards by split: those in a folder, in its folders `train`, `val` and `test`, or those that match a pattern.

    A shard's split is the word that its name or else its folder's begins with; where no shard has such a word, all are
    tested. Raises `InputError` where there is no shard, for a shard without such a word beside one with it, and for
    `trainval` beside `train` or `val`.
    """
    found = _find_shards(path, suffixes)
    if not found:
        raise InputError(f"{path} holds no {' or '.join(suffixes)} file.")
    marked = {uri: word for uri, word in found.items() if word}
    unmarked = [uri for uri in found if uri not in marked]
    if not marked:
        return {"test": unmarked}
    if unmarked:
        raise InputError(
            f"{unmarked[0]} names no split, and {next(iter(marked))} beside it does: is it to be tested or trained on? "
            "Begin its name with train, val or test, or give a pattern of the shards that count."
        )
    _check_overlap(sorted(set(marked.values())), where=path)
    splits: dict[SplitName, list[str]] = {}
    for uri, word in marked.items():
        splits.setdefault(_SPLIT_WORDS[word], []).append(uri)
    return splits


def natural(name: str) -> list[tuple[int, str]]:
    """Return a key that sorts 2.tar before 10.tar."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def _first_word(name: str) -> str:
    """Return the word that a name begins with if it means a split, else nothing."""
    word = re.split(r"[^a-z]", name.lower(), maxsplit=1)[0]
    return word if word in _SPLIT_WORDS else ""


def _find_shards(path: str, suffixes: Sequence[str]) -> dict[str, str]:
    """Return the shards, each with the word of its split, if it has one."""
    if not is_folder(path):
        uris = files.expand(path)
        return {uri: _first_word(uri.split("/")[-1]) or _first_word("/".join(uri.split("/")[-2:-1])) for uri in uris}
    folders, names = list_folder(path)
    found = {files.join(path, name): _first_word(name) for name in names if name.lower().endswith(tuple(suffixes))}
    for folder in filter(split_of, folders):
        inside = list_folder(files.join(path, folder))[1]
        for name in sorted(inside, key=natural):
            if name.lower().endswith(tuple(suffixes)):
                found[files.join(path, folder, name)] = _first_word(name) or _first_word(folder)
    return found


def _check_overlap(names: Sequence[str], *, where: str) -> None:
    """Raise `InputError` where two names mean the same images; `trainval` is `train` and `val` together."""
    splits = [_SPLIT_WORDS[_first_word(name)] for name in names]
    if "trainval" in map(_first_word, names):
        splits.append("validation")
    if len(set(splits)) < len(splits):
        raise InputError(
            f"{where} has {', '.join(names)}, of which two hold images of the same split. Name those that count by a "
            "pattern, or move the others elsewhere."
        )
