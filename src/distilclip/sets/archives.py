"""Read the papers' sets as their publishers packed them and torchvision unpacks them.

torchvision's own readers are used where they can be asked for paths (`loader=str`) or check digests before they
unpickle. The rest is read here: torchvision has no split of SUN397, EuroSAT and Caltech101, drops a class of the last,
decodes every picture of the pets, and hashes 2.7 GB of STL-10 that nothing needs.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torchvision import datasets as torchvision

from distilclip import files
from distilclip.errors import InputError
from distilclip.sets.classes import read_lines
from distilclip.sets.dataset import ImageRef
from distilclip.sets.labelled import Labelled, Listing, images_of
from distilclip.sets.layouts import SplitName, list_folder

STL_SIDE = 96  # pixels
STL_FOLDS = 10


def list_food101(path: str) -> Listing:
    """List Food-101: the lists in meta/."""
    return _from_torchvision(torchvision.Food101, path, {"train": "train", "test": "test"})


def list_cifar10(path: str) -> Listing:
    """List CIFAR-10: the Python batches."""
    return _cifar(torchvision.CIFAR10, path)


def list_cifar100(path: str) -> Listing:
    """List CIFAR-100: the Python batches, fine labels."""
    return _cifar(torchvision.CIFAR100, path)


def list_birdsnap(path: str) -> Listing:
    """List Birdsnap: species.txt, images.txt and test_images.txt; images that could not be fetched are left out."""
    species = {row[0]: row[1] for row in _columns(files.join(path, "species.txt"), "id", "dir")}
    tested = {row[0] for row in _columns(files.join(path, "test_images.txt"), "path")}
    folder = next((f for f in ("download/images", "images") if files.exists(files.join(path, f))), None)
    if folder is None:
        raise InputError(f"{path} has no download/images: fetch the photographs with the set's own script first.")
    splits: dict[SplitName, Labelled] = {"train": [], "test": []}
    for name, number in _columns(files.join(path, "images.txt"), "path", "species_id"):
        place = files.join(path, folder, name)
        if files.exists(place):
            splits["test" if name in tested else "train"].append((ImageRef(uri=place), species[number]))
    return Listing(splits=splits, labels=tuple(species.values()))


def list_sun397(path: str) -> Listing:
    """List SUN397: the first of its ten partitions, Training_01.txt and Testing_01.txt."""
    folder = path if files.exists(files.join(path, "ClassName.txt")) else files.join(path, "SUN397")
    splits: dict[SplitName, Labelled] = {}
    names: tuple[tuple[SplitName, str], ...] = (("train", "Training_01.txt"), ("test", "Testing_01.txt"))
    for split, name in names:
        found = [
            p for base in (folder, path) for sub in ("", "Partitions/") if files.exists(p := f"{base}/{sub}{name}")
        ]
        if not found:
            raise InputError(f"{folder} lacks {name}: unpack the set's Partitions.zip into it.")
        lines = read_lines(found[0])
        splits[split] = [(ImageRef(uri=folder + line), _sun_label(line.rpartition("/")[0])) for line in lines]
    labels = tuple(_sun_label(line) for line in read_lines(files.join(folder, "ClassName.txt")))
    return Listing(splits=splits, labels=labels, record={"partition": 1})


def list_cars(path: str) -> Listing:
    """List Stanford Cars: the devkit's .mat files."""
    return _from_torchvision(torchvision.StanfordCars, path, {"train": "train", "test": "test"})


def list_aircraft(path: str) -> Listing:
    """List FGVC Aircraft: variants, with the official validation split."""
    splits: dict[SplitName, str] = {"train": "train", "validation": "val", "test": "test"}
    return _from_torchvision(torchvision.FGVCAircraft, path, splits, annotation_level="variant")


def list_dtd(path: str) -> Listing:
    """List Describable textures: the first of its ten partitions, with the official validation split."""
    splits: dict[SplitName, str] = {"train": "train", "validation": "val", "test": "test"}
    return _from_torchvision(torchvision.DTD, path, splits, partition=1, record={"partition": 1})


def list_pets(path: str) -> Listing:
    """List Oxford-IIIT pets: annotations/trainval.txt and test.txt, labelled by breed."""
    folder = files.join(path, "oxford-iiit-pet")
    splits: dict[SplitName, Labelled] = {}
    numbered: dict[int, str] = {}
    names: tuple[tuple[SplitName, str], ...] = (("train", "trainval.txt"), ("test", "test.txt"))
    for split, name in names:
        rows: Labelled = []
        for line in read_lines(files.join(folder, "annotations", name)):
            image, number = line.split()[:2]
            breed = image.rpartition("_")[0]
            numbered[int(number)] = breed
            rows.append((ImageRef(uri=files.join(folder, "images", f"{image}.jpg")), breed))
        splits[split] = rows
    return Listing(splits=splits, labels=tuple(numbered[number] for number in sorted(numbered)))


def list_caltech101(path: str) -> Listing:
    """List Caltech-101 with its background class, 30 images of each class to train on, the others to test.

    No draw was ever published: this one takes the first 30 by the SHA-256 of `class/file`, and records its digest.
    """
    nested = files.join(path, "caltech101", "101_ObjectCategories")
    folder = nested if files.exists(nested) else files.join(path, "101_ObjectCategories")
    return draw_splits(folder, num_train=30, num_test=None)


def list_flowers102(path: str) -> Listing:
    """List Flowers-102: setid.mat and imagelabels.mat, with the official validation split."""
    splits: dict[SplitName, str] = {"train": "train", "validation": "val", "test": "test"}
    return _from_torchvision(torchvision.Flowers102, path, splits)


def list_stl10(path: str) -> Listing:
    """List STL-10: the binary files; the ten predefined folds of 1,000 training images each."""
    folder = files.join(path, "stl10_binary")
    names = read_lines(files.join(folder, "class_names.txt"))
    splits: dict[SplitName, Labelled] = {}
    for split in ("train", "test"):
        uri = files.join(folder, f"{split}_X.bin")
        # Stored by channel, column by column.
        pixels = np.fromfile(uri, np.uint8).reshape(-1, 3, STL_SIDE, STL_SIDE).transpose(0, 3, 2, 1)
        labels = np.fromfile(files.join(folder, f"{split}_y.bin"), np.uint8)
        splits[split] = [
            (array_ref(uri, i, pixels[i]), label_at(names, int(number) - 1, where=f"{uri}, image {i}"))
            for i, number in enumerate(labels)
        ]
    folds = tuple(np.array(line.split(), np.int64) for line in read_lines(files.join(folder, "fold_indices.txt")))
    if len(folds) != STL_FOLDS:
        raise InputError(f"{folder}/fold_indices.txt has {len(folds)} folds, not {STL_FOLDS}. Unpack the set again.")
    return Listing(splits=splits, labels=names, folds=folds)


def list_eurosat(path: str) -> Listing:
    """List EuroSAT (RGB): 1,000 images of each class to train on and 500 to test.

    CLIP's draw was not published: this one goes by the SHA-256 of `class/file`, and records its digest.
    """
    nested = files.join(path, "eurosat", "2750")
    folder = nested if files.exists(nested) else files.join(path, "2750")
    return draw_splits(folder, num_train=1000, num_test=500)


def draw_splits(folder: str, *, num_train: int, num_test: int | None) -> Listing:
    """Draw from each class folder `num_train` images to train on and the next `num_test` (None: all) to test.

    The order is that of the SHA-256 of `class/file`, so it depends on nothing but the names. A class with fewer images
    than both together gives the same share of them to training, and at least one to each.
    """
    train: Labelled = []
    test: Labelled = []
    digest = hashlib.sha256()
    labels = list_folder(folder)[0]
    for label in labels:
        rows = images_of(files.join(folder, label), label)
        rows.sort(key=lambda row: hashlib.sha256(_short(row).encode()).digest())
        wanted = num_train + (num_test or 1)
        first = num_train if len(rows) >= wanted else max(1, len(rows) * num_train // wanted)
        last = len(rows) if num_test is None else first + num_test
        train += rows[:first]
        test += rows[first:last]
    for split, chosen in (("train", train), ("test", test)):
        digest.update("".join(f"{split} {_short(row)}\n" for row in chosen).encode())
    record = {"drawn_split_sha256": digest.hexdigest()}
    return Listing(splits={"train": train, "test": test}, labels=tuple(labels), record=record)


def array_ref(uri: str, row: int, pixels: np.ndarray) -> ImageRef:
    """Return a reference to a row of an array of images; `uri` is the file that it comes from."""
    return ImageRef(uri=uri, key=f"{row:06}", pixels=np.ascontiguousarray(pixels))


def label_at(labels: Sequence[str], number: int, *, where: str) -> str:
    """Return the label of a class number; `InputError` for one out of range (-1 would count from the end)."""
    if not 0 <= number < len(labels):
        raise InputError(f"{where}: the class number {number} is out of range: the set has {len(labels)} classes.")
    return labels[number]


def _from_torchvision(
    reader: Callable[..., Any],
    path: str,
    splits: dict[SplitName, str],
    *,
    record: dict[str, Any] | None = None,
    **options: Any,
) -> Listing:
    """List a torchvision set whose reader takes a `loader`: with `str` as loader, images stay paths."""
    found: dict[SplitName, Labelled] = {}
    labels: list[str] = []
    for split, name in splits.items():
        dataset = reader(path, split=name, loader=str, **options)
        labels = [str(label) for label in dataset.classes]
        rows = (dataset[i] for i in range(len(dataset)))
        found[split] = [
            (ImageRef(uri=os.fspath(place)), label_at(labels, number, where=os.fspath(place))) for place, number in rows
        ]
    return Listing(splits=found, labels=tuple(labels), record=record or {})


def _cifar(reader: Callable[..., Any], path: str) -> Listing:
    splits: dict[SplitName, Labelled] = {}
    labels: list[str] = []
    parts: tuple[tuple[SplitName, bool], ...] = (("train", True), ("test", False))
    for split, is_train in parts:
        dataset = reader(path, train=is_train)
        labels = list(dataset.classes)
        uri = files.join(path, dataset.base_folder, split)
        splits[split] = [
            (array_ref(uri, row, pixels), label_at(labels, number, where=f"{uri}, image {row}"))
            for row, (pixels, number) in enumerate(zip(dataset.data, dataset.targets, strict=True))
        ]
    return Listing(splits=splits, labels=tuple(labels))


def _sun_label(line: str) -> str:
    """Turn `/a/airplane_cabin` into `airplane_cabin`; the letter is only a folder of the archive."""
    return line.strip("/").partition("/")[2]


def _columns(path: str, *names: str) -> list[tuple[str, ...]]:
    """Read some columns of a file with tabs and a header line."""
    header, *lines = (line.split("\t") for line in read_lines(path))
    try:
        places = [header.index(name) for name in names]
    except ValueError as error:
        raise InputError(f"{path} has no column like {names} (it has {header}). Unpack the set again.") from error
    return [tuple(line[place] for place in places) for line in lines]


def _short(row: tuple[ImageRef, str]) -> str:
    return f"{row[1]}/{row[0].uri.rpartition('/')[2]}"
