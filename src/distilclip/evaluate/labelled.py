"""Readers of the user's own labelled sets: folders of images per class, and tars with labels."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from distilclip.data import files
from distilclip.data.samples import IMAGE_EXTENSIONS, BadSample, Sample
from distilclip.data.shards import open_shard
from distilclip.errors import InputError
from distilclip.evaluate.classes import (
    DEFAULT_TEMPLATES,
    Classes,
    assert_every_class,
    read_classes,
    read_templates,
)
from distilclip.evaluate.dataset import ImageRef, LabelledSet, Split
from distilclip.evaluate.layout import SplitName, expand_shards, find_files, folder_of, list_folder, split_of

Labelled = list[tuple[ImageRef, str]]  # an image and its label as the set writes it, "" where it is unusable

_IMAGE_SUFFIXES = tuple(f".{extension}" for extension in sorted(IMAGE_EXTENSIONS))


def read_folder(name: str, path: str) -> LabelledSet:
    """PATH/CLASS/*.jpg, or PATH/train/CLASS/*.jpg beside PATH/test and PATH/val.

    Where there is no test folder, the validation folder is tested. Raises `InputError` for a folder without class
    folders, a class folder without images, or one that classnames.txt does not name.
    """
    folders, _ = list_folder(path)
    if not folders:
        raise InputError(f"{path} has no subfolders; folder:PATH needs one folder of images per class.")
    found = {split_of(folder): folder for folder in folders}
    # A folder `testbed` among others is a class; `train` and `test` and nothing else are splits.
    if None in found or len(found) < len(folders):
        return _build(name, path, {"test": _images_by_class(path)})
    return _build(
        name, path, {split: _images_by_class(files.join(path, folder)) for split, folder in found.items() if split}
    )


def read_tars(name: str, path: str) -> LabelledSet:
    """Tars of `key.jpg` with `key.cls`, or with `label` or `cls` in `key.json`: a class's name or its number from 0.

    Tars named train... are for the probe, val... to choose its penalty; any other is tested. classnames.txt and
    templates.txt lie beside the tars. Raises `InputError` as `read_folder`.
    """
    splits: dict[SplitName, Labelled] = {}
    for uri in expand_shards(path, (".tar",)):
        splits.setdefault(split_of(uri.rpartition("/")[2]) or "test", []).extend(_labelled_samples(uri))
    return _build(name, folder_of(path), splits)


def _build(name: str, folder: str, found: Mapping[SplitName, Labelled]) -> LabelledSet:
    splits = dict(found)
    if "test" not in splits and "validation" in splits:
        splits["test"] = splits.pop("validation")
    if "test" not in splits:
        raise InputError(f"{folder} has training images only; the images to test on belong in test or test-*.tar.")
    classes = read_classes(folder, (label for rows in splits.values() for _, label in rows if label))
    if len(classes) < 2:
        raise InputError(f"{folder} has a single class, {classes.names}: there is nothing to tell apart.")
    templates_path = files.join(folder, "templates.txt")
    templates = read_templates(templates_path) if files.exists(templates_path) else DEFAULT_TEMPLATES
    built = {split: _split(rows, classes, where=f"{folder} ({split})") for split, rows in splits.items()}
    return LabelledSet(
        name=name,
        classes=classes,
        templates=templates,
        test=built["test"],
        train=built.get("train"),
        validation=built.get("validation"),
    )


def _split(rows: Labelled, classes: Classes, *, where: str) -> Split:
    index = {label: -1 if not label else None for _, label in rows}
    for image, label in rows:
        if index[label] is None:
            index[label] = classes.index(label, where=image.where)
    labels = np.array([index[label] for _, label in rows], dtype=np.int64)
    assert_every_class(classes, labels.tolist(), where=where)
    return Split(images=tuple(image for image, _ in rows), labels=labels)


def _images_by_class(path: str) -> Labelled:
    rows: Labelled = []
    folders, _ = list_folder(path)
    for label in folders:
        folder = files.join(path, label)
        found = find_files(folder, _IMAGE_SUFFIXES)
        if not found:
            raise InputError(
                f"The class folder {folder} holds no image ({', '.join(_IMAGE_SUFFIXES)}). Add some, or remove it."
            )
        rows += [(ImageRef(uri=place), label) for place in found]
    return rows


def _labelled_samples(uri: str) -> Labelled:
    # One pass over the tar before any model runs, so that a wrong label is told in seconds.
    rows: Labelled = []
    shard = open_shard(uri)
    for entry in shard.index():
        error, label = entry.error, ""
        if not error:
            try:
                label = _label(shard.read(entry.offset, entry.size), where=f"{uri}: {entry.key}")
            except BadSample as bad:
                error = bad.error
        image = ImageRef(uri=uri, key=entry.key, offset=entry.offset, size=entry.size, error=error)
        rows.append((image, label))
    shard.close()
    return rows


def _label(sample: Sample, *, where: str) -> str:
    for value in (sample.label, sample.meta.get("label"), sample.meta.get("cls")):
        if isinstance(value, (str, int)) and str(value).strip():
            return str(value).strip()
    raise InputError(
        f"{where} has no label. Add `{sample.key}.cls` with the class's name or number, or a `label` to its json; "
        "image-text pairs without labels are read with pairs:PATH."
    )
