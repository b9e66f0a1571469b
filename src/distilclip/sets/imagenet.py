"""Read ImageNet and its five variants: folders named by WordNet id, by number, or by ObjectNet's own names."""

from __future__ import annotations

import importlib.resources
import json
from collections.abc import Sequence
from functools import cache
from typing import Any

from open_clip import IMAGENET_CLASSNAMES
from timm.data import ImageNetInfo

from distilclip import files
from distilclip.errors import InputError, did_you_mean
from distilclip.sets.labelled import Labelled, Listing, images_of
from distilclip.sets.layouts import SplitName, list_folder


@cache
def wordnet_ids() -> tuple[str, ...]:
    """Return the 1000 classes by WordNet id, in the order of their numbers; timm ships them."""
    return tuple(ImageNetInfo().label_names())


@cache
def names_by_id() -> dict[str, str]:
    """Return CLIP's name of every class by WordNet id; open_clip ships them."""
    return dict(zip(wordnet_ids(), IMAGENET_CLASSNAMES, strict=True))


@cache
def subset_ids(variant: str) -> tuple[str, ...]:
    """Return the 200 classes of ImageNet-A (`a`) or ImageNet-R (`r`), in the same order; timm ships them."""
    text = importlib.resources.files("timm.data").joinpath(f"_info/imagenet_{variant}_synsets.txt").read_text()
    chosen = set(text.split())
    return tuple(label for label in wordnet_ids() if label in chosen)


def list_imagenet(path: str) -> Listing:
    """List ImageNet-1k as torchvision.datasets.ImageNet unpacks it: val/ is tested, train/ (if there) trained on."""
    splits: dict[SplitName, Labelled] = {"test": _by_wordnet_id(files.join(path, "val"), wordnet_ids())}
    if files.exists(files.join(path, "train")):
        splits["train"] = _by_wordnet_id(files.join(path, "train"), wordnet_ids())
    return Listing(splits=splits, labels=wordnet_ids())


def list_imagenet_v2(path: str) -> Listing:
    """List ImageNet-V2, matched frequency: folders are named by class number, and do not sort as numbers do."""
    names = ("imagenetv2-matched-frequency-format-val", "ImageNetV2-matched-frequency")
    folder = next(files.join(path, name) for name in names if files.exists(files.join(path, name)))
    rows: Labelled = []
    for name in list_folder(folder)[0]:
        if not name.isdecimal() or int(name) >= len(wordnet_ids()):
            raise InputError(f"{folder}: the folder {name!r} is no class number from 0 to 999. Unpack the set again.")
        rows += images_of(files.join(folder, name), wordnet_ids()[int(name)])
    return Listing(splits={"test": rows}, labels=wordnet_ids())


def list_imagenet_a(path: str) -> Listing:
    """List ImageNet-A: only its 200 classes are candidates."""
    ids = subset_ids("a")
    return Listing(splits={"test": _by_wordnet_id(_inner(path, "imagenet-a"), ids)}, labels=ids)


def list_imagenet_r(path: str) -> Listing:
    """List ImageNet-R: only its 200 classes are candidates."""
    ids = subset_ids("r")
    return Listing(splits={"test": _by_wordnet_id(_inner(path, "imagenet-r"), ids)}, labels=ids)


def list_imagenet_sketch(path: str) -> Listing:
    """List ImageNet-Sketch: all 1000 classes."""
    return Listing(splits={"test": _by_wordnet_id(_inner(path, "sketch"), wordnet_ids())}, labels=wordnet_ids())


def list_objectnet(path: str) -> Listing:
    """List ObjectNet's images of the 113 classes that it shares with ImageNet, by ObjectNet's names in lower case."""
    folder = _inner(path, "objectnet-1.0")
    by_folder = _mapping(files.join(folder, "mappings"), "folder_to_objectnet_label")
    shared = _mapping(files.join(folder, "mappings"), "objectnet_to_imagenet_1k")
    chosen = [(name, label) for name, label in sorted(by_folder.items()) if label in shared]
    return Listing(
        splits={
            "test": [row for name, label in chosen for row in images_of(files.join(folder, "images", name), label)]
        },
        labels=tuple(label for _, label in chosen),
        names=tuple(label.lower() for _, label in chosen),
        record={"classes": "ObjectNet's names"},
    )


def unknown_wordnet_id(label: str, ids: Sequence[str], *, where: str) -> InputError:
    """Make the error for a class that is none of a set's WordNet ids: it says what may have been meant."""
    names = names_by_id()
    said = f"{where}: the class {label!r} is none of the {len(ids)} WordNet ids of this set."
    if label in names:
        return InputError(f"{said} It is ImageNet's class {names[label]!r}: is this the folder of another set?")
    if label.isdecimal():
        return InputError(f"{said} Numbers need classnames.txt beside them, with a class a line.")
    called = [known for known in ids if names[known].casefold() == label.replace("_", " ").casefold()]
    if called:
        return InputError(f"{said} Rename it: {label!r} has the id {' or '.join(map(repr, called))}.")
    return InputError(f"{said} {did_you_mean(label, ids)}")


def _mapping(folder: str, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(files.read_bytes(files.join(folder, f"{name}.json")))
    return found


def _by_wordnet_id(folder: str, ids: tuple[str, ...]) -> Labelled:
    """List the images of every class folder; raises `InputError` for a folder too many or too few."""
    found = list_folder(folder)[0]
    unknown = sorted(set(found) - set(ids))
    if unknown:
        raise unknown_wordnet_id(unknown[0], ids, where=folder)
    missing = [label for label in ids if label not in set(found)]
    if missing:
        raise InputError(
            f"{folder}: {len(missing)} of {len(ids)} class folders are missing, first {missing[0]}. Unpack it again."
        )
    return [row for label in ids for row in images_of(files.join(folder, label), label)]


def _inner(path: str, name: str) -> str:
    """Return the set's own folder in `path`, or `path` itself where that is it."""
    return files.join(path, name) if files.exists(files.join(path, name)) else path
