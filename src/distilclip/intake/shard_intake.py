"""Make the shards of a store of embeddings that were found: one for each part, or one for each shard of pairs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Bool, Float16

from distilclip import files
from distilclip.data.limits import Side
from distilclip.data.shards import source_size
from distilclip.data.store import Rows, SourceFile, write_shard
from distilclip.data.tabular import PictureFolder
from distilclip.errors import InputError
from distilclip.intake.embedding_files import EmbeddingPart
from distilclip.intake.foreign_vectors import OpenVectors, VectorPlace, open_vectors, read_vector_header
from distilclip.intake.picture_places import FoundSamples, KeyIndex
from distilclip.intake.row_names import read_row_names
from distilclip.intake.unit_rows import UnitRows, to_unit_rows

NOT_UNIT = "embedding is no finite unit vector"


@dataclass(frozen=True, kw_only=True)
class ShardIntake:
    """Writes shards into a folder, each by its number; travels to workers. `data` are the shards of pairs, if any.

    `may_lack` is what a row may lack and be valid; where there are no text embeddings at all, a caption too.
    """

    folder: str
    parts: tuple[EmbeddingPart, ...]
    data: tuple[str, ...]
    teacher: Mapping[str, Any]
    dim: int
    may_lack: tuple[Side, ...] = ()

    @property
    def num_shards(self) -> int:
        """Number of shards that the store will have."""
        return len(self.data or self.parts)

    @property
    def has_texts(self) -> bool:
        """Whether there are text embeddings."""
        return self.parts[0].text is not None

    def prepare(self) -> Callable[[int], int]:
        """In a worker: read the keys, where pictures are looked for; return what writes a shard and counts its rows."""
        if not self.data:
            return self._write_from_part
        return partial(self._write_from_pairs, KeyIndex.build(self.parts), OpenVectors())

    def _write_from_part(self, shard: int) -> int:
        part = self.parts[shard]
        with open_vectors(part.image) as vectors:
            image = to_unit_rows(vectors)
            if part.text is None:
                return self._write_part(shard, image, _nothing(len(image.rows), self.dim))
            with open_vectors(part.text) as others:
                return self._write_part(shard, image, to_unit_rows(others))

    def _write_part(self, shard: int, image: UnitRows, text: UnitRows) -> int:
        part, num_rows = self.parts[shard], len(image.rows)
        names = read_row_names(part, num_rows)
        valid = self._judge(image, text)
        rows = Rows(
            key=names.key,
            offset=np.arange(num_rows, dtype=np.uint64),
            size=np.zeros(num_rows, np.uint32),
            valid=valid,
            error=["" if good else NOT_UNIT for good in valid.tolist()],
            image_sha256=names.image_sha256,
            has_image=valid & image.usable,
            has_text=valid & text.usable,
        )
        source = SourceFile(
            uri=part.uri,
            num_bytes=files.size(part.uri),
            sha256=files.sha256(part.uri),
            notes={"num_normalised": str(image.num_normalised + text.num_normalised)},
        )
        self._write(shard, rows, image, text, source)
        return num_rows

    def _write_from_pairs(self, index: KeyIndex, opened: OpenVectors, shard: int) -> int:
        uri = self.data[shard]
        is_table = uri.lower().endswith((".parquet", ".csv", ".tsv", "/"))  # it may name other files
        with contextlib.nullcontext(uri) if is_table else files.local_copy(uri) as path:
            found = index.find_samples(uri, path, number=shard, needs_caption=not self._may_lack("caption"))
            sha256 = PictureFolder(uri).sha256 if uri.endswith("/") else files.sha256(path)
            image = self._gather(found, opened, [part.image for part in self.parts])
            text = self._gather(found, opened, [part.text for part in self.parts])
            usable = self._judge(image, text)
            errors = [e or ("" if good else NOT_UNIT) for e, good in zip(found.errors, usable.tolist(), strict=True)]
            valid = np.array([not error for error in errors])
            rows = Rows(
                key=[entry.key for entry in found.entries],
                offset=np.array([entry.offset for entry in found.entries], np.uint64),
                size=np.array([entry.size for entry in found.entries], np.uint32),
                valid=valid,
                error=errors,
                image_sha256=found.image_sha256,
                has_image=valid & image.usable,
                has_text=valid & text.usable,
            )
            notes = {
                "num_normalised": str(image.num_normalised + text.num_normalised),
                "num_found": str(int((found.part >= 0).sum())),
            }
            num_bytes = source_size(path)
        source = SourceFile(uri=uri, num_bytes=num_bytes, sha256=sha256, truncated=found.truncated, notes=notes)
        self._write(shard, rows, image, text, source)
        return len(rows)

    def _may_lack(self, side: Side) -> bool:
        return side in self.may_lack or (side == "caption" and not self.has_texts)

    def _judge(self, image: UnitRows, text: UnitRows) -> Bool[np.ndarray, " n"]:
        """Return which rows have the embeddings that they may not lack."""
        usable = image.usable & text.usable
        if self._may_lack("caption"):
            usable |= image.usable
        if self._may_lack("image"):
            usable |= text.usable
        return usable

    def _gather(self, found: FoundSamples, opened: OpenVectors, places: Sequence[VectorPlace | None]) -> UnitRows:
        """Return the rows of all samples; those without an embedding are zeros."""
        nothing = _nothing(len(found.entries), self.dim)
        rows, usable, num_normalised = nothing.rows, nothing.usable, 0
        for number in np.unique(found.part[found.part >= 0]).tolist():
            if (place := places[number]) is not None:
                samples = np.flatnonzero(found.part == number)
                taken = to_unit_rows(opened[place][found.row[samples]])
                rows[samples], usable[samples] = taken.rows, taken.usable
                num_normalised += taken.num_normalised
        return UnitRows(rows, usable, num_normalised)

    def _write(
        self,
        shard: int,
        rows: Rows,
        image: UnitRows,
        text: UnitRows,
        source: SourceFile,
    ) -> None:
        write_shard(
            self.folder,
            shard,
            rows,
            image=_only(image.rows, rows.has_image),
            text=_only(text.rows, rows.has_text),
            source=source,
            teacher=self.teacher,
        )


def _nothing(num_rows: int, dim: int) -> UnitRows:
    return UnitRows(np.zeros((num_rows, dim), np.float16), np.zeros(num_rows, bool), 0)


def _only(rows: Float16[np.ndarray, "n dim"], there: Bool[np.ndarray, " n"]) -> Float16[np.ndarray, "n dim"]:
    """Return the rows with zeros in place of those that are not there."""
    return rows if there.all() else np.where(there[:, None], rows, np.float16(0))


@dataclass(frozen=True)
class PartSizes:
    """The rows of all parts, the width of their vectors, and whether some are more precise than a store holds."""

    num_rows: int
    dim: int
    is_rounded: bool


def check_parts(parts: Sequence[EmbeddingPart]) -> PartSizes:
    """Read the headers of all parts.

    Raises:
        InputError: vectors differ in width, or images and texts in number.
    """
    num_rows, is_rounded = 0, False
    first = read_vector_header(parts[0].image)
    for part in parts:
        headers = [(place, read_vector_header(place)) for place in (part.image, part.text) if place is not None]
        for place, header in headers:
            if header.dim != first.dim:
                raise InputError(
                    f"{place} has vectors of {header.dim} numbers, and {parts[0].image} of {first.dim}: they are not "
                    "of one model. Import each model's into a store of its own."
                )
            if header.num_rows != headers[0][1].num_rows:
                raise InputError(
                    f"{place} has {header.num_rows} vectors, and {part.image} has {headers[0][1].num_rows}: they do "
                    "not belong together. Give the files that were written together."
                )
            is_rounded |= header.dtype.itemsize > 2
        num_rows += headers[0][1].num_rows
    return PartSizes(num_rows, first.dim, is_rounded)
