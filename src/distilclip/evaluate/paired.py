"""Reader of image-text pairs for retrieval, with any number of captions per image."""

from __future__ import annotations

import numpy as np

from distilclip.data.samples import BadSample, Sample, clean_caption
from distilclip.data.shards import open_shard
from distilclip.errors import InputError
from distilclip.evaluate.dataset import ImageRef, PairSet
from distilclip.evaluate.layout import expand_shards, split_of

_SUFFIXES = (".tar", ".parquet", ".csv", ".tsv")


def read_pairs(name: str, path: str) -> PairSet:
    """Shards of pairs, a pattern or a folder; in a folder, files named train... or val... are passed over.

    An image's captions are the list `captions` of its json, else its one caption. A sample without any is unusable.
    """
    uris = expand_shards(path, _SUFFIXES)
    tested = [uri for uri in uris if split_of(uri.rpartition("/")[2]) in ("test", None)]
    images: list[ImageRef] = []
    captions: list[str] = []
    image_of_text: list[int] = []
    for uri in tested or uris:
        shard = open_shard(uri)
        for entry in shard.index():
            error, own = entry.error, []
            if not error:
                try:
                    own = _captions(shard.read(entry.offset, entry.size), where=f"{uri}: {entry.key}")
                except BadSample as bad:
                    error = bad.error
            image_of_text += [len(images)] * len(own)
            captions += own
            images.append(ImageRef(uri=uri, key=entry.key, offset=entry.offset, size=entry.size, error=error))
        shard.close()
    if not captions:
        raise InputError(f"{path} has no image with a caption (key.txt, or `caption` or `captions` in key.json).")
    return PairSet(
        name=name,
        images=tuple(images),
        captions=tuple(captions),
        image_of_text=np.array(image_of_text, dtype=np.int64),
    )


def _captions(sample: Sample, *, where: str) -> list[str]:
    several = sample.meta.get("captions")
    found = several if isinstance(several, list) else [sample.caption]
    captions = [caption for text in found if (caption := clean_caption(text, where=where)) is not None]
    if not captions:
        raise BadSample("no caption", where=where)
    return captions
