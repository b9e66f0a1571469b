"""Readers of ImageNet and its five variants: folders named by WordNet id, by number, or by ObjectNet's own names."""

from __future__ import annotations

import dataclasses
import importlib.resources
import json
from collections.abc import Sequence
from functools import cache
from typing import Any

from open_clip import IMAGENET_CLASSNAMES
from timm.data import ImageNetInfo

from distilclip import files
from distilclip.errors import InputError, did_you_mean
from distilclip.sets.classes import read_lines
from distilclip.sets.labelled import Labelled, Listing, images_of
from distilclip.sets.layouts import SplitName, list_folder


@cache
def wordnet_ids() -> tuple[str, ...]:
    """The 1000 classes by WordNet id, in the order of their numbers; timm ships them."""
    return tuple(ImageNetInfo().label_names())


@cache
def names_by_id() -> dict[str, str]:
    """CLIP's name of every class by WordNet id; open_clip ships them."""
    return dict(zip(wordnet_ids(), IMAGENET_CLASSNAMES, strict=True))


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
    """ObjectNet's images of the 113 classes that it shares with ImageNet, told apart by its own names in lower case."""
    listing, _ = _shared_with_imagenet(path)
    names = tuple((label.lower(),) for label in listing.labels)
    return dataclasses.replace(listing, prompt_names=names, record={"classes": "ObjectNet's names"})


def list_objectnet_by_imagenet(path: str) -> Listing:
    """The same images, each class by the names of the ImageNet classes that it maps to, of which the nearest counts.

    That is how a classifier of ImageNet's classes is put to the test (Wortsman et al. 2022, WiSE-FT: `project_logits`):
    the choice is among the shared classes; ImageNet's others, where one of all 1000 could fall, take no part.
    Lines of `imagenet_to_label_2012_v2` are numbered by ILSVRC 2012, `pytorch_to_imagenet_2012_id.json` turns them
    into the usual numbers.
    """
    listing, shared = _shared_with_imagenet(path)
    folder = files.join(_inner(path, "objectnet-1.0"), "mappings")
    lines = read_lines(files.join(folder, "imagenet_to_label_2012_v2"))
    usual = {int(line): int(number) for number, line in _mapping(folder, "pytorch_to_imagenet_2012_id").items()}
    number_of = {label: usual[line] for line, label in enumerate(lines)}
    names = tuple(
        tuple(IMAGENET_CLASSNAMES[number_of[name]] for name in shared[label].split("; ")) for label in listing.labels
    )
    return dataclasses.replace(
        listing, prompt_names=names, record={"classes": "ImageNet's names of the shared classes"}
    )


def unknown_wordnet_id(label: str, ids: Sequence[str], *, where: str) -> InputError:
    """The error for a class that is none of a set's WordNet ids: what it is, or what may have been meant."""
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


def _shared_with_imagenet(path: str) -> tuple[Listing, dict[str, str]]:
    """ObjectNet's images of the shared classes by its labels, and what each shared label is called in ImageNet."""
    folder = _inner(path, "objectnet-1.0")
    by_folder = _mapping(files.join(folder, "mappings"), "folder_to_objectnet_label")
    shared = _mapping(files.join(folder, "mappings"), "objectnet_to_imagenet_1k")
    rows: Labelled = []
    labels = []
    for name, label in sorted(by_folder.items()):
        if label in shared:
            labels.append(label)
            rows += images_of(files.join(folder, "images", name), label)
    return Listing(splits={"test": rows}, labels=tuple(labels)), shared


def _mapping(folder: str, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(files.read_bytes(files.join(folder, f"{name}.json")))
    return found


def _by_wordnet_id(folder: str, ids: tuple[str, ...]) -> Labelled:
    """The images of every class folder; raises `InputError` for a folder too many or too few."""
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
    """The set's own folder in `path`, or `path` itself where that is it."""
    return files.join(path, name) if files.exists(files.join(path, name)) else path
