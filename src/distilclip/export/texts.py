"""Captions and metadata of samples, read without their pictures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import UInt32, UInt64

from distilclip.data.pairs import assert_key
from distilclip.data.reader import Reader
from distilclip.data.samples import BadSample, clean_caption, decode_meta, decode_text
from distilclip.data.shards import open_shard
from distilclip.data.tars import CutError, walk
from distilclip.errors import InputError


@dataclass(frozen=True)
class Text:
    """What a sample says in words: its caption, and the object in its `json` (or its row of a table)."""

    caption: str | None
    meta: dict[str, Any]


def read_texts(
    uri: str, key: Sequence[str], offset: UInt64[np.ndarray, " n"], size: UInt32[np.ndarray, " n"]
) -> Iterator[Text]:
    """The texts of n samples of a shard, in order. Of a tar only headers and text members are read.

    Raises:
        InputError: a sample is not the one that was embedded: another key, or members that cannot be read.
    """
    places = zip(key, offset.tolist(), size.tolist(), strict=True)
    if not uri.lower().endswith(".tar"):
        shard = open_shard(uri)
        for name, start, length in places:
            sample = shard.read(start, length)
            assert_key(sample.key, name, uri=uri, row=start)
            yield Text(sample.caption, sample.meta)
        shard.close()
        return
    with Reader(uri, sequential=True) as reader:
        for name, start, length in places:
            try:
                yield _read_text(reader, name, start, length)
            except (BadSample, CutError) as error:
                raise InputError(
                    f"{uri}: {name} could be read when it was embedded, and now cannot ({error}). "
                    "Embed the data again, or give the files that were embedded."
                ) from error


def _read_text(reader: Reader, key: str, offset: int, size: int) -> Text:
    where = f"{reader.path}: {key}"
    caption: str | None = None
    meta: dict[str, Any] = {}
    for member in walk(lambda start, length: reader.read(offset + start, length), size):
        if not member.key:
            continue
        assert_key(member.key, key, uri=reader.path, row=offset)
        if member.extension == "txt":
            content = reader.read(offset + member.data, member.size)
            caption = clean_caption(decode_text(content, name="caption", where=where))
        elif member.extension == "json":
            meta = decode_meta(reader.read(offset + member.data, member.size), where=where)
    if caption is None:
        caption = clean_caption(meta.get("caption"), where=where)
    return Text(caption, meta)
