"""Which samples are kept, as text: for other tools, and for the eye."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt64

from distilclip import files
from distilclip.export.selection import Selection


@dataclass(frozen=True, kw_only=True)
class Keys:
    """`num_ambiguous` counts the selected rows whose key some other row of the store has too."""

    num_keys: int
    num_ambiguous: int
    plain: bool


def write_keys(selection: Selection, folder: str) -> Keys:
    """Write `keys.tsv`, and `keys.txt` where keys alone name samples.

    `keys.tsv` has a header line, then `uri`, `row` and `key` of every selected row, tabs between (a value with a tab,
    a quote or a line break is quoted, as in CSV). `keys.txt` is one key per line; it is left out where a selected key
    occurs a second time in the store (keys are not unique across a crawl's tars) or contains a line break.
    """
    store = selection.store
    every: list[UInt64[np.ndarray, " r"]] = []
    chosen: list[UInt64[np.ndarray, " n"]] = []
    plain = True
    with contextlib.ExitStack() as stack:
        table = stack.enter_context(files.atomic_write(files.join(folder, "keys.tsv")))
        lines = io.TextIOWrapper(table, "utf-8", newline="", write_through=True)
        writer = csv.writer(lines, delimiter="\t", lineterminator="\n")
        writer.writerow(["uri", "row", "key"])
        for shard in range(store.num_shards):
            rows, selected = store.rows(shard), selection.rows(shard)
            every.append(_digests(rows.key))
            chosen.append(every[-1][selected.row])
            plain = plain and not any(set("\r\n") & set(key) for key in selected.key)
            writer.writerows((selected.uri, row, key) for row, key in zip(selected.row, selected.key, strict=True))
        lines.detach()
    num_ambiguous = _num_repeated(np.concatenate(chosen), np.concatenate(every))
    plain = plain and num_ambiguous == 0
    if plain:
        _write_plain(folder)
    return Keys(num_keys=sum(map(len, chosen)), num_ambiguous=num_ambiguous, plain=plain)


def _write_plain(folder: str) -> None:
    """`keys.txt` from `keys.tsv`: no shard is read a second time."""
    with (
        files.open_read(files.join(folder, "keys.tsv")) as table,
        files.atomic_write(files.join(folder, "keys.txt")) as file,
    ):
        for line in csv.DictReader(io.TextIOWrapper(table, "utf-8", newline=""), delimiter="\t"):
            file.write(f"{line['key']}\n".encode())


def _digests(keys: list[str]) -> UInt64[np.ndarray, " r"]:
    """64 bits a key: 8 bytes instead of a Python string each. Of 10^9 keys, two collide with a chance of 3 %."""
    digests = b"".join(hashlib.blake2b(key.encode(), digest_size=8).digest() for key in keys)
    return np.frombuffer(digests, np.uint64)


def _num_repeated(chosen: UInt64[np.ndarray, " n"], every: UInt64[np.ndarray, " r"]) -> int:
    values, counts = np.unique(every, return_counts=True)
    return int(np.isin(chosen, values[counts > 1]).sum())
