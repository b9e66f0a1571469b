"""Read and write DataComp's names of samples (128-bit `uid`s) and its subset files (sorted lists of them).

Source: mlfoundations/datacomp, README ("Selecting samples in the filtering track") and resharder.py.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Bool, UInt32, UInt64

from distilclip import files
from distilclip.csv_rows import CsvColumns
from distilclip.data.shards import Text, read_texts
from distilclip.errors import InputError

UidKind = Literal["json", "md5", "key"]
UID_KINDS: tuple[UidKind, ...] = get_args(UidKind)
UID = np.dtype("u8,u8")
"""High and low 64 bits; numpy sorts by the first field, then the second."""


def read_uids(
    uri: str,
    key: Sequence[str],
    offset: UInt64[np.ndarray, " n"],
    size: UInt32[np.ndarray, " n"],
    *,
    kind: UidKind,
    columns: CsvColumns | None = None,
) -> np.ndarray:
    """Return the uids of n samples of a shard, in order, as a structured array of `UID`.

    Args:
        uri: the shard.
        key: the samples' keys.
        offset: their places in the shard.
        size: their sizes in the shard.
        kind: `json` reads the field `uid` of the sample's metadata, as in DataComp's pools. `md5` is for data without:
            MD5 over the UTF-8 of the field `url` (without one, the key), a line break, and the caption. `key` is the
            sample's key, as in stores imported from DataComp's metadata; nothing is read for it.

    Raises:
        InputError: a sample has no uid, or one that is no hexadecimal number of up to 128 bits.
    """
    uids = np.empty(len(key), UID)
    nothing = Text(None, {})
    texts = (
        itertools.repeat(nothing, len(key)) if kind == "key" else read_texts(uri, key, offset, size, columns=columns)
    )
    for i, (name, text) in enumerate(zip(key, texts, strict=True)):
        uids[i] = divmod(uid_of(name, text, kind=kind, where=f"{uri}: {name}"), 2**64)
    return uids


def uid_of(key: str, text: Text, *, kind: UidKind, where: str) -> int:
    """Return the uid of one sample as a number of 128 bits; as in `read_uids`, `where` names the sample."""
    if kind == "md5":
        return int(_md5(key, text), 16)
    value = key if kind == "key" else text.meta.get("uid")
    if isinstance(value, str) and re.fullmatch(r"[0-9a-fA-F]{1,32}", value):
        return int(value, 16)
    found = "has no `uid`" if value is None else f"has the uid {value!r}, no hexadecimal number of 128 bits"
    raise InputError(
        f"{where}: its {'key' if kind == 'key' else 'json'} {found}. DataComp's pools have them; for other data choose "
        "--uid md5, which makes uids from url (or key) and caption."
    )


def write_subset(path: str, uids: np.ndarray) -> int:
    """Write a subset file of these uids, sorted, each once; return their number.

    Each once, because DataComp's resharder writes a sample as often as its uid is listed.
    """
    unique = np.unique(uids)
    with files.atomic_write(path) as file:
        np.save(file, unique)
    return len(unique)


@lru_cache(maxsize=1)
def read_subset(path: str) -> np.ndarray:
    """Read the sorted uids of a subset file: `.npy`, or the bare memory of such an array. A local one stays on disk.

    Raises:
        InputError: the file is missing, has another dtype, or is not sorted.
    """
    if not files.exists(path):
        raise InputError(f"The subset file {path} does not exist.")
    with files.local_copy(path) as local:
        with open(local, "rb") as file:
            is_npy = file.read(6) == b"\x93NUMPY"
        try:
            subset: Any = np.load(local, mmap_mode="r") if is_npy else np.memmap(local, UID, mode="r")
        except (ValueError, EOFError) as error:
            raise InputError(f"{path} is no subset file ({error}): write it with numpy's `save`.") from error
        if files.is_url(path):
            subset = np.array(subset)
    if subset.dtype != UID or subset.ndim != 1:
        raise InputError(f"{path} holds {subset.dtype} of shape {subset.shape}; a subset file holds (u8, u8) pairs.")
    high, low = subset["f0"], subset["f1"]
    if not ((high[:-1] < high[1:]) | ((high[:-1] == high[1:]) & (low[:-1] <= low[1:]))).all():
        raise InputError(f"{path} is not sorted, as a subset file must be: sort it with numpy's `sort`.")
    return subset


def in_subset(uids: np.ndarray, subset: np.ndarray) -> Bool[np.ndarray, " n"]:
    """Return which of the uids are in a sorted subset."""
    return np.searchsorted(subset, uids, side="right") > np.searchsorted(subset, uids, side="left")


def _md5(key: str, text: Text) -> str:
    url = text.meta.get("url")
    name = f"{key if url is None else url}\n{text.caption or ''}"
    return hashlib.md5(name.encode(), usedforsecurity=False).hexdigest()
