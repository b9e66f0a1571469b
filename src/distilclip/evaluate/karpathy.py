"""Readers of COCO and Flickr30k: Karpathy's test splits, in his own files or in CLIP_benchmark's."""

from __future__ import annotations

import csv
import json

from distilclip.data import files
from distilclip.errors import InputError
from distilclip.evaluate.classes import read_lines
from distilclip.evaluate.dataset import ImageRef
from distilclip.evaluate.paired import Captioned

_IMAGE_FOLDERS = ("val2014", "train2014", "flickr30k-images", "flickr30k_images", "images", "Images", "")


def list_coco(path: str) -> Captioned:
    """The 5,000 test images of Karpathy's split with all captions of each, five or a few more."""
    if files.exists(files.join(path, "dataset_coco.json")):
        return _karpathy(path, "dataset_coco.json")
    name = "coco_test_karpathy.json"
    annotations = json.loads(files.read_bytes(files.join(path, name)))
    captions: dict[int, list[str]] = {}
    for annotation in annotations["annotations"]:
        captions.setdefault(annotation["image_id"], []).append(annotation["caption"])
    images = sorted(annotations["images"], key=lambda image: image["id"])
    return _place(path, name, [(image["file_name"], captions.get(image["id"], [])) for image in images])


def list_flickr30k(path: str) -> Captioned:
    """The 1,000 test images of Karpathy's split with the five captions of each."""
    if files.exists(files.join(path, "dataset_flickr30k.json")):
        return _karpathy(path, "dataset_flickr30k.json")
    name = "flickr30k_test_karpathy.txt"
    captions: dict[str, list[str]] = {}
    for line in read_lines(files.join(path, name))[1:]:  # the first line is a header
        image, _, caption = line.partition(".jpg,")
        captions.setdefault(f"{image}.jpg", []).append(_unquoted(caption))
    return _place(path, name, list(captions.items()))


def _unquoted(field: str) -> str:
    """The last field of a line of CSV, whose writer may have left a comma in it unquoted."""
    try:
        found = next(csv.reader([field], strict=True))
    except csv.Error:  # it begins with a quotation mark of its own
        return field
    return found[0] if len(found) == 1 else field


def _karpathy(path: str, name: str) -> Captioned:
    content = json.loads(files.read_bytes(files.join(path, name)))
    tested = [image for image in content["images"] if image["split"] == "test"]
    return _place(path, name, [(image["filename"], [s["raw"] for s in image["sentences"]]) for image in tested])


def _place(path: str, source: str, captions: list[tuple[str, list[str]]]) -> Captioned:
    """The images of a list with their captions; the folder that they lie in is found by the first of them."""
    if not captions:
        raise InputError(f"{files.join(path, source)} lists no test image. Fetch it again.")
    rows = [(name, [text.strip() for text in several if text.strip()]) for name, several in captions]
    bare = next((name for name, several in rows if not several), None)
    if bare is not None:
        raise InputError(f"{files.join(path, source)} has no caption for the image {bare}. Fetch it again.")
    first = rows[0][0]
    folder = next((f for f in _IMAGE_FOLDERS if files.exists(_inside(path, f, first))), None)
    if folder is None:
        places = ", ".join(_inside(path, f, first) for f in _IMAGE_FOLDERS[:3])
        raise InputError(f"{path} has captions, but not the image {first}; it was looked for as {places} and the like.")
    return [(ImageRef(uri=_inside(path, folder, name)), several) for name, several in rows]


def _inside(path: str, folder: str, name: str) -> str:
    return files.join(path, folder, name) if folder else files.join(path, name)
