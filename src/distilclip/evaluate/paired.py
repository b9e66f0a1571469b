"""Reader of image-text pairs for retrieval, with any number of captions per image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from distilclip.data import files
from distilclip.data.samples import BadSample, Sample, clean_caption
from distilclip.data.shards import open_shard
from distilclip.errors import InputError
from distilclip.evaluate.dataset import ImageRef, PairSet
from distilclip.evaluate.folders import folder_of, shards_by_split

Captioned = list[tuple[ImageRef, list[str]]]
"""Images with all captions of each."""

_SUFFIXES = (".tar", ".parquet", ".csv", ".tsv")


def read_pairs(name: str, path: str) -> PairSet:
    """Shards of pairs, a pattern or a folder; in a folder, those of train and val are passed over.

    An image's captions are the list `captions` of its json, else its one caption; in a folder whose dataset_type.txt
    says `retrieval` (CLIP_benchmark's webdatasets), every line of its txt. A sample without any is unusable.
    """
    splits = shards_by_split(path, _SUFFIXES)
    uris = splits.get("test") or [uri for found in splits.values() for uri in found]
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
    shard = open_shard(uri)
    for entry in shard.index():
        error, own = entry.error, []
        if not error:
            try:
                own = _captions(shard.read(entry.offset, entry.size), where=f"{uri}: {entry.key}", by_line=by_line)
            except BadSample as bad:
                error = bad.error
        rows.append((ImageRef(uri=uri, key=entry.key, offset=entry.offset, size=entry.size, error=error), own))
    shard.close()
    return rows


def _captions(sample: Sample, *, where: str, by_line: bool) -> list[str]:
    several = sample.meta.get("captions")
    found: Sequence[Any] = several if isinstance(several, list) else [sample.caption]
    if by_line and sample.caption is not None:
        found = sample.caption.splitlines()
    captions = [caption for text in found if (caption := clean_caption(text, where=where)) is not None]
    if not captions:
        raise BadSample("no caption", where=where)
    return captions
