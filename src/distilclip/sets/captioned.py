"""Read images with any number of captions each, for retrieval: shards of pairs, and COCO and Flickr30k as published."""

from __future__ import annotations

import csv
import json
from typing import Any

import numpy as np

from distilclip import files
from distilclip.data.samples import BadSample, Sample
from distilclip.data.shards import TextReader, open_shard
from distilclip.errors import InputError
from distilclip.sets.classes import read_lines
from distilclip.sets.dataset import ImageRef, PairSet
from distilclip.sets.layouts import folder_of, shards_by_split

Captioned = list[tuple[ImageRef, list[str]]]
"""Images with all captions of each."""

_SUFFIXES = (".tar", ".parquet", ".csv", ".tsv")
_IMAGE_FOLDERS = ("val2014", "train2014", "flickr30k-images", "flickr30k_images", "images", "Images", "")


def read_pairs(name: str, path: str) -> PairSet:
    """Read shards of pairs, a pattern or a folder; where there are test shards, those of train and val are not read.

    An image's captions are its caption and the further ones in the list `captions` of its json; in a folder whose
    dataset_type.txt says `retrieval` (CLIP_benchmark's webdatasets), the lines of its txt. A sample without any is
    unusable.
    """
    splits = shards_by_split(path, _SUFFIXES)
    uris = splits.get("test") or splits.get("validation") or splits["train"]
    by_line = is_retrieval_folder(folder_of(path))
    rows: Captioned = [row for uri in uris for row in _samples(uri, by_line=by_line)]
    if not any(captions for _, captions in rows):
        raise InputError(f"{path} has no image with a caption (key.txt, or `caption` or `captions` in key.json).")
    return build_pairs(name, rows)


def build_pairs(name: str, rows: Captioned, *, record: dict[str, Any] | None = None) -> PairSet:
    """Make a set of images and captions, each caption with the number of its image."""
    captions = [caption for _, own in rows for caption in own]
    image_of_text = np.repeat(np.arange(len(rows)), [len(own) for _, own in rows])
    return PairSet(
        name=name,
        images=tuple(image for image, _ in rows),
        captions=tuple(captions),
        image_of_text=image_of_text,
        record=record or {},
    )


def is_retrieval_folder(folder: str) -> bool:
    """Return whether a folder in CLIP_benchmark's webdataset layout holds pairs."""
    path = files.join(folder, "dataset_type.txt")
    return files.exists(path) and files.read_bytes(path).decode().strip().lower() == "retrieval"


def _samples(uri: str, *, by_line: bool) -> Captioned:
    rows: Captioned = []
    shard, texts = open_shard(uri), TextReader(uri)
    for entry in shard.index():
        error, own = entry.error, []
        if not error:
            try:
                own = _captions(texts.read(entry.offset, entry.size), by_line=by_line)
            except BadSample as bad:
                error = bad.error
        rows.append((ImageRef(uri=uri, key=entry.key, offset=entry.offset, size=entry.size, error=error), own))
    shard.close()
    texts.close()
    return rows


def _captions(sample: Sample, *, by_line: bool) -> list[str]:
    if by_line and sample.caption is not None:
        return [line.strip() for line in sample.caption.splitlines() if line.strip()]
    captions = sample.captions
    if not captions:
        raise BadSample("no caption")
    return captions


def list_coco(path: str) -> Captioned:
    """List the 5,000 test images of Karpathy's split with all captions of each, five or a few more."""
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
    """List the 1,000 test images of Karpathy's split with the five captions of each."""
    if files.exists(files.join(path, "dataset_flickr30k.json")):
        return _karpathy(path, "dataset_flickr30k.json")
    name = "flickr30k_test_karpathy.txt"
    captions: dict[str, list[str]] = {}
    for line in read_lines(files.join(path, name))[1:]:  # the first line is a header
        image, _, caption = line.partition(".jpg,")
        captions.setdefault(f"{image}.jpg", []).append(_unquote(caption))
    return _place(path, name, list(captions.items()))


def _unquote(field: str) -> str:
    """Return the last field of a line of CSV, whose writer may have left a comma in it unquoted."""
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
    """Find the images of a list, with their captions; the first one shows which folder they lie in."""
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
