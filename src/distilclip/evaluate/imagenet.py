"""Readers of ImageNet and its five variants: folders named by WordNet id, by number, or by ObjectNet's own names."""

from __future__ import annotations

import importlib.resources
import json
from functools import cache

from timm.data import ImageNetInfo

from distilclip.data import files
from distilclip.errors import InputError
from distilclip.evaluate.dataset import ImageRef
from distilclip.evaluate.folders import SplitName, list_folder
from distilclip.evaluate.labelled import Labelled, Listing, images_of

OBJECTNET_BORDER = 2  # pixels of red frame on each side


@cache
def wordnet_ids() -> tuple[str, ...]:
    """The 1000 classes by WordNet id, in the order of their numbers; timm ships them."""
    return tuple(ImageNetInfo().label_names())


@cache
def subset_ids(variant: str) -> tuple[str, ...]:
    """The 200 classes of ImageNet-A (`a`) or ImageNet-R (`r`), in the same order; timm ships them."""
    text = importlib.resources.files("timm.data").joinpath(f"_info/imagenet_{variant}_synsets.txt").read_text()
    chosen = set(text.split())
    return tuple(label for label in wordnet_ids() if label in chosen)


def list_imagenet(path: str) -> Listing:
    """ImageNet-1k as torchvision.datasets.ImageNet unpacks it: val/ is tested, train/ (if there) trained on."""
    splits: dict[SplitName, Labelled] = {"test": _by_wordnet_id(files.join(path, "val"), wordnet_ids())}
    if files.exists(files.join(path, "train")):
        splits["train"] = _by_wordnet_id(files.join(path, "train"), wordnet_ids())
    return Listing(splits=splits, labels=wordnet_ids())


def list_imagenet_v2(path: str) -> Listing:
    """ImageNet-V2, matched frequency: the folders' names are class numbers, which sort as text in another order."""
    names = ("imagenetv2-matched-frequency-format-val", "ImageNetV2-matched-frequency")
    folder = next(files.join(path, name) for name in names if files.exists(files.join(path, name)))
    rows: Labelled = []
    for name in list_folder(folder)[0]:
        if not name.isdecimal() or int(name) >= len(wordnet_ids()):
            raise InputError(f"{folder}: the folder {name!r} is no class number from 0 to 999. Unpack the set again.")
        rows += images_of(files.join(folder, name), wordnet_ids()[int(name)])
    return Listing(splits={"test": rows}, labels=wordnet_ids())


def list_imagenet_a(path: str) -> Listing:
    """ImageNet-A: 200 classes, told apart among themselves."""
    ids = subset_ids("a")
    return Listing(splits={"test": _by_wordnet_id(_inner(path, "imagenet-a"), ids)}, labels=ids)


def list_imagenet_r(path: str) -> Listing:
    """ImageNet-R: 200 classes, told apart among themselves."""
    ids = subset_ids("r")
    return Listing(splits={"test": _by_wordnet_id(_inner(path, "imagenet-r"), ids)}, labels=ids)


def list_imagenet_sketch(path: str) -> Listing:
    """ImageNet-Sketch: all 1000 classes."""
    return Listing(splits={"test": _by_wordnet_id(_inner(path, "sketch"), wordnet_ids())}, labels=wordnet_ids())


def list_objectnet(path: str) -> Listing:
    """ObjectNet's images of the classes that it shares with ImageNet, told apart among themselves by its own names.

    A frame of two pixels is cut off, as its authors ask.
    """
    folder = _inner(path, "objectnet-1.0")
    by_folder = json.loads(files.read_bytes(files.join(folder, "mappings", "folder_to_objectnet_label.json")))
    shared = json.loads(files.read_bytes(files.join(folder, "mappings", "objectnet_to_imagenet_1k.json")))
    rows: Labelled = []
    labels = []
    for name, label in sorted(by_folder.items()):
        if label in shared:
            labels.append(label)
            found = images_of(files.join(folder, "images", name), label)
            rows += [(ImageRef(uri=image.uri, border=OBJECTNET_BORDER), label) for image, label in found]
    record = {"border": OBJECTNET_BORDER, "classes": "those shared with ImageNet, by ObjectNet's names"}
    return Listing(splits={"test": rows}, labels=tuple(labels), record=record)


def _by_wordnet_id(folder: str, ids: tuple[str, ...]) -> Labelled:
    """The images of every class folder; raises `InputError` for a folder too many or too few."""
    found = list_folder(folder)[0]
    unknown = sorted(set(found) - set(ids))
    if unknown:
        raise InputError(
            f"{folder}: the folder {unknown[0]!r} is none of its {len(ids)} classes. Unpack the set again."
        )
    missing = [label for label in ids if label not in set(found)]
    if missing:
        raise InputError(
            f"{folder}: {len(missing)} of {len(ids)} class folders are missing, first {missing[0]}. Unpack it again."
        )
    return [row for label in ids for row in images_of(files.join(folder, label), label)]


def _inner(path: str, name: str) -> str:
    """The set's own folder in `path`, or `path` itself where that is it."""
    return files.join(path, name) if files.exists(files.join(path, name)) else path
