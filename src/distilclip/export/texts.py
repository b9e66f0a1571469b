"""Captions and metadata of samples, read without their pictures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import UInt32, UInt64

from distilclip.data.pairs import assert_key
from distilclip.data.samples import BadSample
from distilclip.data.tars import CutError
from distilclip.data.texts import TextReader
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
    texts = TextReader(uri)
    for name, start, length in zip(key, offset.tolist(), size.tolist(), strict=True):
        try:
            sample = texts.read(start, length)
        except (BadSample, CutError) as error:
            raise InputError(
                f"{uri}: {name} could be read when it was embedded, and now cannot ({error}). "
                "Embed the data again, or give the files that were embedded."
            ) from error
        assert_key(sample.key, name, uri=uri, row=start)
        yield Text(sample.caption, sample.meta)
    texts.close()
