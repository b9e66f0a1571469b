"""Readers of COCO and Flickr30k: Karpathy's test splits, in his own files or in CLIP_benchmark's."""

from __future__ import annotations

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
    annotations = json.loads(files.read_bytes(files.join(path, "coco_test_karpathy.json")))
    captions: dict[int, list[str]] = {}
    for annotation in annotations["annotations"]:
        captions.setdefault(annotation["image_id"], []).append(annotation["caption"])
    images = sorted(annotations["images"], key=lambda image: image["id"])
    return _place(path, [(image["file_name"], captions.get(image["id"], [])) for image in images])


def list_flickr30k(path: str) -> Captioned:
    """The 1,000 test images of Karpathy's split with the five captions of each."""
    if files.exists(files.join(path, "dataset_flickr30k.json")):
        return _karpathy(path, "dataset_flickr30k.json")
    captions: dict[str, list[str]] = {}
    for line in read_lines(files.join(path, "flickr30k_test_karpathy.txt"))[1:]:  # the first line is a header
        image, _, caption = line.partition(".jpg,")
        captions.setdefault(f"{image}.jpg", []).append(caption.strip('"'))
    return _place(path, list(captions.items()))


def _karpathy(path: str, name: str) -> Captioned:
    content = json.loads(files.read_bytes(files.join(path, name)))
    tested = [image for image in content["images"] if image["split"] == "test"]
    return _place(path, [(image["filename"], [s["raw"].strip() for s in image["sentences"]]) for image in tested])


def _place(path: str, rows: list[tuple[str, list[str]]]) -> Captioned:
    """Find the folder that the images lie in by the first of them."""
    if not rows:
        raise InputError(f"{path}: the list of test images is empty. Fetch it again.")
    first = rows[0][0]
    folder = next((f for f in _IMAGE_FOLDERS if files.exists(_inside(path, f, first))), None)
    if folder is None:
        places = ", ".join(_inside(path, f, first) for f in _IMAGE_FOLDERS[:3])
        raise InputError(f"{path} has captions, but not the image {first}; it was looked for as {places} and the like.")
    return [(ImageRef(uri=_inside(path, folder, name)), captions) for name, captions in rows]


def _inside(path: str, folder: str, name: str) -> str:
    return files.join(path, folder, name) if folder else files.join(path, name)
