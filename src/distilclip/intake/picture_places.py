"""Find for every sample of the pairs the embedding that was made of it, by the key of either."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import xxhash
from jaxtyping import Int32, Int64, UInt8, UInt32, UInt64

from distilclip.data.samples import BadSample, Entry
from distilclip.data.shards import open_shard
from distilclip.errors import InputError
from distilclip.intake.embedding_files import EmbeddingPart
from distilclip.intake.row_names import read_row_names

SAMPLE_KEYS = ("__key__", "key", "image_path")
"""Columns of keys that are those of the samples. Another one, such as `uid`, is a field of a sample's json."""
NOT_FOUND = "no embedding"
AMBIGUOUS = "several embeddings of one key"


@dataclass(frozen=True, kw_only=True)
class FoundSamples:
    """The n samples of a shard of pairs, and the part and row of the embedding of each; -1 where there is none.

    `errors` says why there is none, or what else is wrong with the sample.
    """

    entries: list[Entry]
    image_sha256: UInt8[np.ndarray, "n 32"]
    part: Int32[np.ndarray, " n"]
    row: Int64[np.ndarray, " n"]
    errors: list[str]
    truncated: bool


@dataclass(frozen=True, kw_only=True)
class KeyIndex:
    """Where the embedding of every key lies: 24 bytes of memory for each row, sorted by a hash of its key.

    The hash has 128 bits, in two halves: by chance, two of a billion keys have the same with a probability of 1e-21.

    `json_field` is the field of a sample's json that the keys are of; None where they are keys of samples.
    """

    parts: tuple[EmbeddingPart, ...]
    hashes: UInt64[np.ndarray, " n"]
    halves: UInt64[np.ndarray, " n"]
    part: Int32[np.ndarray, " n"]
    row: UInt32[np.ndarray, " n"]
    json_field: str | None

    @classmethod
    def build(cls, parts: Sequence[EmbeddingPart]) -> KeyIndex:
        """Read the keys of all parts.

        Raises:
            InputError: a part has no keys, or parts have keys of different columns.
        """
        hashes, numbers, rows, columns = [], [], [], {}
        for number, part in enumerate(parts):
            names = read_row_names(part)
            num_rows = len(names.key)
            if names.column is None:
                raise InputError(
                    f"{part.image} has no keys to find its pictures in --data by. Give a table with a column key, uid "
                    "or image_path (--tables for .npy), or leave out --data."
                )
            columns[names.column] = part
            hashes.append(_hash(names.key))
            numbers.append(np.full(num_rows, number, np.int32))
            rows.append(np.arange(num_rows, dtype=np.uint32))
        if len(columns) > 1:
            said = ", ".join(f"{part.table} by {column}" for column, part in columns.items())
            raise InputError(f"The rows are not named alike: {said}. Import these files one by one.")
        joined = np.concatenate(hashes)
        order = np.argsort(joined[:, 0], kind="stable")
        column = next(iter(columns))
        return cls(
            parts=tuple(parts),
            hashes=joined[order, 0],
            halves=joined[order, 1],
            part=np.concatenate(numbers)[order],
            row=np.concatenate(rows)[order],
            json_field=None if column in SAMPLE_KEYS else column,
        )

    def find_samples(self, uri: str, path: str, *, number: int, needs_caption: bool) -> FoundSamples:
        """Read every sample of a shard of pairs, which lies at `path` now, and find its embedding.

        `number` is that of the shard: of several embeddings of a key, the one in the part of the same number counts.

        Raises:
            InputError: the shard cannot be read.
        """
        shard = open_shard(path)
        entries = shard.index()
        digests = np.zeros((len(entries), 32), np.uint8)
        names, errors = [], []
        for entry, digest in zip(entries, digests, strict=True):
            name, error = "", entry.error
            if not error:
                try:
                    sample = shard.read(entry.offset, entry.size)
                    found = sample.key if self.json_field is None else sample.meta.get(self.json_field)
                    if sample.image is None:
                        raise BadSample("no image")
                    digest[:] = np.frombuffer(hashlib.sha256(sample.image).digest(), np.uint8)
                    if found is None:
                        raise BadSample(NOT_FOUND, detail=f"no {self.json_field}")
                    if needs_caption and sample.caption is None:
                        raise BadSample("no caption")
                    name = str(found)
                except BadSample as bad:
                    error = bad.error
            names.append(name)
            errors.append(error)
        shard.close()
        part, row = self._look_up(names, errors, number)
        return FoundSamples(
            entries=entries,
            image_sha256=digests,
            part=part,
            row=row,
            errors=errors,
            truncated=shard.truncated,
        )

    def _look_up(
        self, names: list[str], errors: list[str], number: int
    ) -> tuple[Int32[np.ndarray, " n"], Int64[np.ndarray, " n"]]:
        """Return part and row of every name; adds to `errors` where there is none."""
        part, row = np.full(len(names), -1, np.int32), np.full(len(names), -1, np.int64)
        hashes = _hash(names)
        first, after = (np.searchsorted(self.hashes, hashes[:, 0], side) for side in ("left", "right"))
        for i in range(len(names)):
            if errors[i]:
                continue
            places = [at for at in range(first[i], after[i]) if self.halves[at] == hashes[i, 1]]
            if len(places) > 1:
                places = [at for at in places if self.part[at] == number] or places
            if len(places) == 1:
                part[i], row[i] = self.part[places[0]], self.row[places[0]]
            else:
                errors[i] = AMBIGUOUS if places else NOT_FOUND
        return part, row


def _hash(keys: Sequence[str]) -> UInt64[np.ndarray, "n 2"]:
    """Return a hash of 128 bits of every key, in two halves."""
    digests = b"".join(xxhash.xxh3_128_digest(key.encode("utf-8", "surrogatepass")) for key in keys)
    return np.frombuffer(digests, ">u8").reshape(-1, 2).astype(np.uint64)
