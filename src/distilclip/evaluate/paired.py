"""Reader of image-text pairs for retrieval, with any number of captions per image."""

from __future__ import annotations

from typing import Any

import numpy as np

from distilclip.data import files
from distilclip.data.samples import BadSample, Sample
from distilclip.data.shards import open_shard
from distilclip.data.texts import TextReader
from distilclip.errors import InputError
from distilclip.evaluate.dataset import ImageRef, PairSet
from distilclip.evaluate.folders import folder_of, shards_by_split

Captioned = list[tuple[ImageRef, list[str]]]
"""Images with all captions of each."""

_SUFFIXES = (".tar", ".parquet", ".csv", ".tsv")


def read_pairs(name: str, path: str) -> PairSet:
    """Shards of pairs, a pattern or a folder; where there are shards to test, those of train and val are passed over.

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
    """Images and captions as a set, each caption with the number of its image."""
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
    """Whether a folder in CLIP_benchmark's webdataset layout holds pairs."""
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
