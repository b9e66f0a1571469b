"""Every published set in its real layout on disk, made of a few small pictures.

`write(name, root)` writes the original archive as torchvision unpacks it; what each reader must find in it is returned
as the labels of the test split, in the set's own order.
"""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torchvision.datasets as torchvision
from scipy.io import savemat

from distilclip.sets.imagenet import subset_ids, wordnet_ids
from tests.conftest import encoded, picture, write_tar

_SMALL = encoded(picture(0, (16, 16)))


def write_picture(path: Path, number: int = 0, format: str = "JPEG") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(picture(number, (24, 24)), format))


def write_lines(path: Path, lines: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def write_food101(root: Path, classes: list[str]) -> None:
    base = root / "food-101"
    for split, count in (("train", 2), ("test", 1)):
        listed = {c: [f"{c}/{split}{i}" for i in range(count)] for c in classes}
        write_lines(base / "meta" / f"{split}.json", [json.dumps(listed)])
        for number, name in enumerate(name for names in listed.values() for name in names):
            write_picture(base / "images" / f"{name}.jpg", number)


def write_cifar(root: Path, reader: Any, classes: list[str], patch: pytest.MonkeyPatch) -> None:
    """The pickled batches; torchvision knows the real ones by their MD5, so it is told these."""
    base = root / reader.base_folder
    base.mkdir(parents=True)
    key = "labels" if reader is torchvision.CIFAR10 else "fine_labels"

    def write(name: str, value: Any) -> list[str]:
        (base / name).write_bytes(pickle.dumps(value))
        return [name, hashlib.md5((base / name).read_bytes()).hexdigest()]

    def batch(name: str, seed: int) -> list[str]:
        labels = list(range(len(classes)))
        data = np.random.default_rng(seed).integers(0, 256, (len(labels), 3 * 32 * 32), dtype=np.uint8)
        return write(name, {"data": data, key: labels})

    patch.setattr(reader, "train_list", [batch(name, 1) for name, _ in reader.train_list])
    patch.setattr(reader, "test_list", [batch(name, 2) for name, _ in reader.test_list])
    name, md5 = write(reader.meta["filename"], {reader.meta["key"]: classes})
    patch.setattr(reader, "meta", {**reader.meta, "md5": md5})
    assert name == reader.meta["filename"]


def write_birdsnap(root: Path, classes: list[str]) -> None:
    base = root / "birdsnap"
    folders = [name.replace(" ", "_") for name in classes]
    species = [f"{i + 1}\t{name}\tAvis {i}\t{folders[i]}" for i, name in enumerate(classes)]
    write_lines(base / "species.txt", ["id\tcommon\tscientific\tdir", *species])
    images = [(f"{folder}/{kind}.jpg", i + 1) for i, folder in enumerate(folders) for kind in ("train", "test", "gone")]
    lines = [f"http://x/{path}\t0\t{path}\t{number}\t0" for path, number in images]
    write_lines(base / "images.txt", ["url\tmd5\tpath\tspecies_id\tbb_x1", *lines])
    write_lines(base / "test_images.txt", ["path", *(path for path, _ in images if "test" in path)])
    for path, number in images:
        if "gone" not in path and not (number == len(classes) and "test" in path):  # the last has no test image left
            write_picture(base / "download" / "images" / path, number)


def write_sun397(root: Path, classes: list[str]) -> None:
    base = root / "SUN397"
    names = [f"/{name[0]}/{name}" for name in classes]
    write_lines(base / "ClassName.txt", names)
    for split in ("Training", "Testing"):
        lines = [f"{name}/sun_{split.lower()}.jpg" for name in names]
        write_lines(base / f"{split}_01.txt", lines)
        for number, line in enumerate(lines):
            write_picture(base / line[1:], number)


def write_cars(root: Path, classes: list[str]) -> None:
    base = root / "stanford_cars"
    (base / "devkit").mkdir(parents=True)
    savemat(base / "devkit" / "cars_meta.mat", {"class_names": np.array(classes, dtype=object)})
    dtype = [("fname", object), ("class", object)]
    for split, path in (("train", "devkit/cars_train_annos.mat"), ("test", "cars_test_annos_withlabels.mat")):
        order = list(range(len(classes)))[:: 1 if split == "train" else -1]
        rows = np.array([(f"{i:05}.jpg", label + 1) for i, label in enumerate(order)], dtype=dtype)
        savemat(base / path, {"annotations": rows})
        for number in range(len(order)):
            write_picture(base / f"cars_{split}" / f"{number:05}.jpg", number)


def write_aircraft(root: Path, classes: list[str]) -> None:
    base = root / "fgvc-aircraft-2013b" / "data"
    write_lines(base / "variants.txt", classes)
    for offset, split in enumerate(("train", "val", "test")):
        names = [f"{100 * offset + i:07}" for i in range(len(classes))]
        lines = [f"{name} {variant}" for name, variant in zip(names, classes, strict=True)]
        write_lines(base / f"images_variant_{split}.txt", lines)
        for number, name in enumerate(names):
            write_picture(base / "images" / f"{name}.jpg", number)


def write_dtd(root: Path, classes: list[str]) -> None:
    base = root / "dtd" / "dtd"
    for split in ("train", "val", "test"):
        lines = [f"{name}/{name}_{split}.jpg" for name in classes]
        write_lines(base / "labels" / f"{split}1.txt", lines)
        for number, line in enumerate(lines):
            write_picture(base / "images" / line, number)


def write_pets(root: Path, classes: list[str]) -> None:
    base = root / "oxford-iiit-pet"
    for split in ("trainval", "test"):
        lines = [f"{name}_{split}1 {i + 1} 1 1" for i, name in enumerate(classes)]
        write_lines(base / "annotations" / f"{split}.txt", lines)
        for number, line in enumerate(lines):
            write_picture(base / "images" / f"{line.split()[0]}.jpg", number)


def write_class_folders(folder: Path, classes: list[str], *, count: int, suffix: str = "jpg") -> None:
    for number, name in enumerate(classes):
        for image in range(1, count + 1):
            path = folder / name / f"image_{image:04}.{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(_SMALL if len(classes) > 200 else encoded(picture(number * count + image, (16, 16))))


def write_flowers102(root: Path, num_classes: int, patch: pytest.MonkeyPatch) -> None:
    base = root / "flowers-102"
    base.mkdir(parents=True)
    ids = np.arange(1, 3 * num_classes + 1)
    savemat(base / "imagelabels.mat", {"labels": (ids - 1) % num_classes + 1})
    parts = ids.reshape(3, num_classes)
    savemat(base / "setid.mat", {"trnid": parts[0], "valid": parts[1], "tstid": parts[2]})
    known = dict(torchvision.Flowers102._file_dict)
    for name in ("label", "setid"):
        file = known[name][0]
        known[name] = (file, hashlib.md5((base / file).read_bytes()).hexdigest())
    patch.setattr(torchvision.Flowers102, "_file_dict", known)
    for number in ids:
        write_picture(base / "jpg" / f"image_{number:05}.jpg", int(number))


def write_stl10(root: Path, classes: list[str], patch: pytest.MonkeyPatch) -> None:
    base = root / "stl10_binary"
    base.mkdir(parents=True)
    random = np.random.default_rng(0)

    def write(name: str, content: bytes) -> list[str]:
        (base / name).write_bytes(content)
        return [name, hashlib.md5(content).hexdigest()]

    def images(count: int) -> bytes:
        return random.integers(0, 256, (count, 3, 96, 96), dtype=np.uint8).tobytes()

    labels = np.arange(1, len(classes) + 1, dtype=np.uint8)
    train = [write("train_X.bin", images(2 * len(classes))), write("train_y.bin", np.tile(labels, 2).tobytes())]
    test = [write("test_X.bin", images(len(classes))), write("test_y.bin", labels[::-1].tobytes())]
    patch.setattr(torchvision.STL10, "train_list", [*train, write("unlabeled_X.bin", images(1))])
    patch.setattr(torchvision.STL10, "test_list", test)
    write_lines(base / "class_names.txt", classes)
    # Five folds of the first half and five of the second, each with every class.
    folds = [np.arange(len(classes)) + (fold % 2) * len(classes) for fold in range(10)]
    write_lines(base / "fold_indices.txt", [" ".join(map(str, fold)) for fold in folds])


def write_imagenet_v2(root: Path) -> None:
    names = [str(number) for number in range(1000)]
    write_class_folders(root / "imagenetv2-matched-frequency-format-val", names, count=1, suffix="jpeg")


def write_objectnet(root: Path) -> None:
    base = root / "objectnet-1.0"
    folders = {"air_freshener": "Air freshener", "alarm_clock": "Alarm clock", "banana": "Banana"}
    shared = {"Alarm clock": "analog clock; digital clock", "Banana": "banana"}
    write_class_folders(base / "images", list(folders), count=2, suffix="png")
    (base / "mappings").mkdir()
    (base / "mappings" / "folder_to_objectnet_label.json").write_text(json.dumps(folders))
    (base / "mappings" / "objectnet_to_imagenet_1k.json").write_text(json.dumps(shared))
    # The real list has a line for each of ImageNet's classes, in an order of its own; these numbers are the usual ones.
    write_lines(base / "mappings" / "imagenet_to_label_2012_v2", ["banana", "digital clock", "analog clock"])
    usual = {"954": 0, "530": 1, "409": 2}
    (base / "mappings" / "pytorch_to_imagenet_2012_id.json").write_text(json.dumps(usual))


def write_karpathy(root: Path, name: str, folder: str) -> None:
    """Karpathy's own JSON: three test images, one to train on."""
    images = []
    for number, split in enumerate(("test", "train", "test", "test")):
        sentences = [{"raw": f"caption {k} of picture {number} "} for k in range(5)]
        images.append({"filename": f"{number}.jpg", "filepath": folder, "split": split, "sentences": sentences})
        write_picture(root / name / folder / f"{number}.jpg", number)
    (root / name / f"dataset_{name}.json").write_text(json.dumps({"images": images}))


def write_webdataset(folder: Path, classes: list[str], templates: list[str], *, count: int = 2) -> None:
    """CLIP_benchmark's layout: test/ and train/ with shards, the names and templates beside them."""
    for split in ("train", "test"):
        members = []
        for number in range(count * len(classes)):
            members += [(f"s{number:07}.cls", str(number % len(classes)).encode())]
            members += [(f"s{number:07}.webp", encoded(picture(number, (24, 24)), "WEBP"))]
        write_tar(folder / split / "0.tar", members)
        (folder / split / "nshards.txt").write_text("1\n")
    write_lines(folder / "classnames.txt", classes)
    write_lines(folder / "zeroshot_classification_templates.txt", templates)


def write_retrieval_webdataset(folder: Path, captions: list[list[str]]) -> None:
    members = []
    for number, own in enumerate(captions):
        members += [(f"s{number:07}.txt", "\n".join(own).encode())]
        members += [(f"s{number:07}.webp", encoded(picture(number, (24, 24)), "WEBP"))]
    write_tar(folder / "test" / "0.tar", members)
    write_lines(folder / "test" / "nshards.txt", ["1"])
    write_lines(folder / "dataset_type.txt", ["retrieval"])


FOODS = ["apple_pie", "cheese_plate", "cheesecake"]
EUROSAT = ["AnnualCrop", "Forest", "HerbaceousVegetation", "Highway", "Industrial", "Pasture", "PermanentCrop"]
EUROSAT += ["Residential", "River", "SeaLake"]

WRITERS: dict[str, Callable[[Path, pytest.MonkeyPatch], Any]] = {
    "food101": lambda root, _: write_food101(root, FOODS),
    "cifar10": lambda root, patch: write_cifar(root, torchvision.CIFAR10, ["airplane", "automobile", "bird"], patch),
    "cifar100": lambda root, patch: write_cifar(root, torchvision.CIFAR100, ["apple", "aquarium_fish"], patch),
    "birdsnap": lambda root, _: write_birdsnap(root, ["Acadian Flycatcher", "Blue Jay", "Cactus Wren"]),
    "sun397": lambda root, _: write_sun397(root, ["abbey", "church/indoor", "church/outdoor"]),
    "cars": lambda root, _: write_cars(root, ["AM General Hummer SUV 2000", "Acura RL Sedan 2012", "smart fortwo"]),
    "aircraft": lambda root, _: write_aircraft(root, ["707-320", "F/A-18", "F-16A/B"]),
    "dtd": lambda root, _: write_dtd(root, ["banded", "blotchy", "zigzagged"]),
    "pets": lambda root, _: write_pets(root, ["Abyssinian", "american_bulldog", "Bengal"]),
    "caltech101": lambda root, _: write_class_folders(
        root / "caltech101" / "101_ObjectCategories", ["BACKGROUND_Google", "Faces", "accordion"], count=32
    ),
    "flowers102": lambda root, patch: write_flowers102(root, 102, patch),
    "stl10": lambda root, patch: write_stl10(root, ["airplane", "bird", "car"], patch),
    "eurosat": lambda root, _: write_class_folders(root / "eurosat" / "2750", EUROSAT, count=3),
    "imagenet": lambda root, _: write_class_folders(root / "imagenet" / "val", list(wordnet_ids()), count=1),
    "imagenet-v2": lambda root, _: write_imagenet_v2(root),
    "imagenet-a": lambda root, _: write_class_folders(root / "imagenet-a", list(subset_ids("a")), count=1),
    "imagenet-r": lambda root, _: write_class_folders(root / "imagenet-r", list(subset_ids("r")), count=1),
    "imagenet-sketch": lambda root, _: write_class_folders(root / "sketch", list(wordnet_ids()), count=1),
    "objectnet": lambda root, _: write_objectnet(root),
    "coco": lambda root, _: write_karpathy(root, "coco", "val2014"),
    "flickr30k": lambda root, _: write_karpathy(root, "flickr30k", "flickr30k-images"),
}


def write(name: str, root: Path, patch: pytest.MonkeyPatch) -> None:
    """Write the set's original layout under a data root."""
    WRITERS[name](root, patch)
