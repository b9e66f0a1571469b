"""Open an evaluation set by its spec: the name of a published set, or the kind and path of the user's own."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from scipy.io.matlab import MatReadError

from distilclip import files
from distilclip.errors import InputError
from distilclip.sets import archives, captioned, imagenet
from distilclip.sets.captioned import Captioned, build_pairs, read_pairs
from distilclip.sets.catalogue import CATALOGUE, KnownSet
from distilclip.sets.classes import CLASSNAMES_FILE, Classes, read_classes
from distilclip.sets.dataset import EvaluationSet, LabelledSet, MissingSet, PairSet
from distilclip.sets.labelled import (
    Labelled,
    Listing,
    build_set,
    list_images,
    list_samples,
    observed_labels,
    own_templates,
    read_folder,
    read_tars,
)
from distilclip.sets.layouts import SplitName, check_data_root
from distilclip.sets.locate import Layout, SetPlace, locate
from distilclip.sets.prompts import wording_of
from distilclip.sets.specs import parse_spec

READERS: dict[str, Callable[[str, str], LabelledSet | PairSet]] = {
    "folder": read_folder,
    "tar": read_tars,
    "pairs": read_pairs,
}
"""Readers of the user's own sets by kind; each takes the set's name and path."""

LISTINGS: dict[str, Callable[[str], Listing]] = {
    "food101": archives.list_food101,
    "cifar10": archives.list_cifar10,
    "cifar100": archives.list_cifar100,
    "birdsnap": archives.list_birdsnap,
    "sun397": archives.list_sun397,
    "cars": archives.list_cars,
    "aircraft": archives.list_aircraft,
    "dtd": archives.list_dtd,
    "pets": archives.list_pets,
    "caltech101": archives.list_caltech101,
    "flowers102": archives.list_flowers102,
    "stl10": archives.list_stl10,
    "eurosat": archives.list_eurosat,
    "imagenet": imagenet.list_imagenet,
    "imagenet-v2": imagenet.list_imagenet_v2,
    "imagenet-a": imagenet.list_imagenet_a,
    "imagenet-r": imagenet.list_imagenet_r,
    "imagenet-sketch": imagenet.list_imagenet_sketch,
    "objectnet": imagenet.list_objectnet,
}
CAPTIONED: dict[str, Callable[[str], Captioned]] = {"coco": captioned.list_coco, "flickr30k": captioned.list_flickr30k}
"""Readers of the original layouts by set, of labelled images and of captions."""

_DAMAGE = (
    *(RuntimeError, OSError, LookupError, TypeError, ValueError, AttributeError, StopIteration),
    *(MatReadError, zlib.error),
)
"""What the readers of torchvision, scipy and json raise on files that are cut or of another kind."""


# Specs


def load_set(spec: str, *, data_root: str | None = None, prompts: str | None = None) -> EvaluationSet:
    """Read the set that a spec means.

    - `food101` and the other names of the catalogue: read from `data_root`, a `MissingSet` where it is not there;
    - `folder:PATH`: a folder of images per class, in PATH or in PATH/train, PATH/val and PATH/test;
    - `tar:PATH`: tars with `key.cls` or a `label` in `key.json`, a pattern or a folder of them;
    - `pairs:PATH`: image-text shards as for training, a pattern or a folder of them.

    `prompts` is openai/CLIP's prompts.md, for the published sets. Raises `InputError` for a set of one's own that is
    not there, and for any that does not hold together: a label that is no class or out of range, a class without
    images, a template without `{}`.
    """
    name, kind, path = parse_spec(spec)
    if kind in READERS:
        return READERS[kind](name, path)
    if data_root is None:
        raise InputError(f"The set {name!r} is read from a data root: give --data-root, or name its own folder.")
    check_data_root(data_root)
    return load_known_set(CATALOGUE[path], data_root=data_root, prompts=prompts)


# Published sets


def load_known_set(
    known: KnownSet, *, data_root: str, prompts: str | None = None
) -> LabelledSet | PairSet | MissingSet:
    """Read a published set from a data root; `prompts` is openai/CLIP's prompts.md, for its names and templates.

    A set that is not there is a `MissingSet`. Raises `InputError` for one that is there and does not hold together.
    """
    place = locate(known, data_root)
    if place is None:
        # Images alone are not enough for retrieval: its captions and split come in a file of their own.
        needed = f" with its {' or '.join(known.inner)}" if known.group == "retrieval" else ""
        reason = (
            f"not found under {data_root}{needed}: `distilclip evaluate --list --data-root {data_root}` says "
            "what was looked for, and how to get it"
        )
        kind: Literal["pairs", "labelled"] = "pairs" if known.group == "retrieval" else "labelled"
        return MissingSet(name=known.name, reason=reason, kind=kind, has_train=known.num_train > 0)
    record = {"layout": place.layout, "published_num_test": known.num_test}
    try:
        if known.group == "retrieval":
            return _load_pairs(known, place, record)
        return _load_labelled(known, place, record, prompts)
    except _DAMAGE as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{known.name} in {place.path} cannot be read: {error!r}. Get it again: {known.source}."
        ) from error


def _load_pairs(known: KnownSet, place: SetPlace, record: dict[str, Any]) -> PairSet:
    if place.layout == "archive":
        return build_pairs(known.name, CAPTIONED[known.name](place.path), record=record)
    return dataclasses.replace(read_pairs(known.name, place.path), record=record)


def _load_labelled(known: KnownSet, place: SetPlace, record: dict[str, Any], prompts: str | None) -> LabelledSet:
    readers: dict[Layout, Callable[[str], Listing]] = {
        "archive": LISTINGS.get(known.name, list_images),
        "webdataset": list_samples,
        "folder": list_images,
    }
    listing = readers[place.layout](place.path)
    if known.border:
        listing = _cut_border(listing, known.border)
    worded = _choose_words(known, place, listing, prompts)
    record = {**record, **listing.record, "prompts": worded.source, "clips_prompts": worded.is_clips}
    return build_set(
        known.name,
        dataclasses.replace(listing, record=record),
        worded.classes,
        templates=worded.templates,
        where=place.path,
        metric=known.metric,
        may_be_empty=known.may_be_empty,
    )


def _cut_border(listing: Listing, border: int) -> Listing:
    splits: dict[SplitName, Labelled] = {
        split: [(dataclasses.replace(image, border=border), label) for image, label in rows]
        for split, rows in listing.splits.items()
    }
    return dataclasses.replace(listing, splits=splits, record={**listing.record, "border": border})


@dataclass(frozen=True)
class _Words:
    """Hold classes in the order of the set's labels, with the templates; `is_clips` None: only the folder can know."""

    classes: Classes
    templates: tuple[str, ...]
    source: str
    is_clips: bool | None


def _choose_words(known: KnownSet, place: SetPlace, listing: Listing, prompts: str | None) -> _Words:
    """Choose names and templates: the folder's own where it has both and no --prompts is given, else the best known."""
    wording = wording_of(known, prompts=prompts)
    if listing.names:
        classes = Classes(listing.labels, listing.names, place.path)
        return _Words(classes, wording.templates, wording.source, wording.is_clips)
    own, templates = None, None
    if place.layout != "archive":
        templates = own_templates(place.path)
        if files.exists(files.join(place.path, CLASSNAMES_FILE)):
            own = read_classes(place.path, observed_labels(listing))
    if own is not None and templates is not None and prompts is None:
        return _Words(own, templates, f"classnames.txt and templates in {place.path}", None)
    if own is not None and wording.by_label is not None:  # ImageNet's names are not unique: the folder's order stands
        return _Words(own, wording.templates, f"classnames.txt in {place.path}, templates of {wording.source}", None)
    labels = own.labels if own else listing.labels or tuple(sorted(observed_labels(listing)))
    names = wording.names_of(own.names if own else labels, aliases=known.aliases, where=place.path)
    return _Words(Classes(labels, names, place.path), wording.templates, wording.source, wording.is_clips)
