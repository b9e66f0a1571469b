"""Read labelled images from folders and tars, and turn any listing of labelled images into a set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Int

from distilclip import files
from distilclip.data.samples import IMAGE_EXTENSIONS, BadSample, Sample
from distilclip.data.shards import TextReader, open_shard
from distilclip.errors import InputError
from distilclip.sets.catalogue import Metric
from distilclip.sets.classes import DEFAULT_TEMPLATES, Classes, assert_every_class, read_classes, read_templates
from distilclip.sets.dataset import ImageRef, LabelledSet, Split
from distilclip.sets.layouts import SplitName, find_files, folder_of, list_folder, shards_by_split, split_folders

Labelled = list[tuple[ImageRef, str]]
"""Images with the labels that the set itself writes, "" where an image is unusable."""

IMAGE_SUFFIXES = tuple(f".{extension}" for extension in sorted(IMAGE_EXTENSIONS))
TEMPLATE_FILES = ("templates.txt", "zeroshot_classification_templates.txt")


@dataclass(frozen=True, kw_only=True)
class Listing:
    """Hold a set before its labels have become class numbers.

    `labels` are all there are, in the set's own order (empty: those observed, sorted); `folds` are rows of the training
    split; `record` is what a score should remember of how the set was read. `names` are what prompts call each label,
    where the set itself says so.
    """

    splits: Mapping[SplitName, Labelled]
    labels: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    folds: tuple[Int[np.ndarray, " _"], ...] = ()
    record: dict[str, Any] = field(default_factory=dict)


def read_folder(name: str, path: str) -> LabelledSet:
    """Read PATH/CLASS/*.jpg, or PATH/train/CLASS/*.jpg beside PATH/test and PATH/val.

    Where there is no test folder, the validation folder is tested. Raises `InputError` for a folder without class
    folders, one that is neither split nor class, a class folder without images, or one that classnames.txt does not
    name.
    """
    return _own_set(name, path, list_images(path))


def read_tars(name: str, path: str) -> LabelledSet:
    """Read tars of `key.jpg` with a class's name or number (from 0): `key.cls`, or `label` or `cls` in `key.json`.

    Tars named train or trainval... or lying in train/ are for the probe, val or dev... to choose its penalty; without
    any such name all are tested. classnames.txt and templates.txt lie beside the tars. Raises `InputError` as
    `read_folder`.
    """
    return _own_set(name, folder_of(path), list_samples(path))


def list_images(path: str) -> Listing:
    """List the images of a folder of class folders, or of its split folders, labelled by the folders' names."""
    folders, _ = list_folder(path)
    if not folders:
        raise InputError(f"{path} has no subfolders; folder:PATH needs one folder of images per class.")
    found = split_folders(path)
    if not found:
        return Listing(splits={"test": images_by_class(path)})
    return Listing(splits={split: images_by_class(files.join(path, folder)) for split, folder in found.items()})


def list_samples(path: str) -> Listing:
    """List the samples of labelled tars, by split."""
    splits = shards_by_split(path, (".tar",))
    return Listing(splits={split: [row for uri in uris for row in _samples(uri)] for split, uris in splits.items()})


def build_set(
    name: str,
    listing: Listing,
    classes: Classes,
    *,
    templates: Sequence[str],
    where: str,
    metric: Metric = "top1",
    may_be_empty: bool = False,
) -> LabelledSet:
    """Number the labels by `classes` and check that the set holds together; `where` is its folder, for messages.

    Raises `InputError` for no test split, fewer than two classes, a label that is no class, and (unless
    `may_be_empty`) a class without an image.
    """
    splits = dict(listing.splits)
    if "test" not in splits and "validation" in splits:
        splits["test"] = splits.pop("validation")
    if "test" not in splits:
        raise InputError(f"{where} has training images only; the images to test on belong in test or test-*.tar.")
    if len(classes) < 2:
        raise InputError(f"{where} has a single class, {classes.names}: there is nothing to tell apart.")
    built = {}
    for split, rows in splits.items():
        built[split] = _split(rows, classes)
        if not may_be_empty:
            assert_every_class(classes, built[split].labels.tolist(), where=f"{where} ({split})")
    return LabelledSet(
        name=name,
        classes=classes,
        templates=tuple(templates),
        test=built["test"],
        train=built.get("train"),
        validation=built.get("validation"),
        metric=metric,
        folds=listing.folds,
        record=listing.record,
    )


def observed_labels(listing: Listing) -> set[str]:
    """Return every label that an image of the listing has."""
    return {label for rows in listing.splits.values() for _, label in rows if label}


def own_templates(folder: str) -> tuple[str, ...] | None:
    """Read the templates in a set's own folder, if it has any; `{c}` (CLIP_benchmark's way) counts as `{}`."""
    for name in TEMPLATE_FILES:
        if files.exists(path := files.join(folder, name)):
            return read_templates(path)
    return None


def images_by_class(path: str) -> Labelled:
    """List the images of every folder in a folder, labelled with the folder's name."""
    rows: Labelled = []
    for label in list_folder(path)[0]:
        rows += images_of(files.join(path, label), label)
    return rows


def images_of(folder: str, label: str) -> Labelled:
    """List the images of one class folder. Raises `InputError` where there are none."""
    found = find_files(folder, IMAGE_SUFFIXES)
    if not found:
        raise InputError(
            f"The class folder {folder} holds no image ({', '.join(IMAGE_SUFFIXES)}). Add some, or remove it."
        )
    return [(ImageRef(uri=place), label) for place in found]


def _own_set(name: str, folder: str, listing: Listing) -> LabelledSet:
    classes = read_classes(folder, observed_labels(listing))
    templates = own_templates(folder)
    return build_set(name, listing, classes, templates=templates or DEFAULT_TEMPLATES, where=folder)


def _split(rows: Labelled, classes: Classes) -> Split:
    index = {label: -1 if not label else None for _, label in rows}
    for image, label in rows:
        if index[label] is None:
            index[label] = classes.index(label, where=image.where)
    labels = np.array([index[label] for _, label in rows], dtype=np.int64)
    return Split(images=tuple(image for image, _ in rows), labels=labels)


def _samples(uri: str) -> Labelled:
    # One pass over the tar's headers and labels before any model runs, so that a wrong label is told in seconds.
    rows: Labelled = []
    texts = TextReader(uri)
    for entry in open_shard(uri).index():
        error, label = entry.error, ""
        if not error:
            try:
                label = _label(texts.read(entry.offset, entry.size), where=f"{uri}: {entry.key}")
            except BadSample as bad:
                error = bad.error
        image = ImageRef(uri=uri, key=entry.key, offset=entry.offset, size=entry.size, error=error)
        rows.append((image, label))
    texts.close()
    return rows


def _label(sample: Sample, *, where: str) -> str:
    for value in (sample.label, sample.meta.get("label"), sample.meta.get("cls")):
        if isinstance(value, (str, int)) and str(value).strip():
            return str(value).strip()
    raise InputError(
        f"{where} has no label. Add `{sample.key}.cls` with the class's name or number, or a `label` to its json; "
        "image-text pairs without labels are read with pairs:PATH."
    )
