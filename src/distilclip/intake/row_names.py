"""Read what a table beside embeddings says of their rows: keys, and digests of the image files."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from jaxtyping import UInt8

from distilclip.data.tabular import KEY_COLUMNS_OF_TABLES, ParquetShard
from distilclip.errors import InputError
from distilclip.intake.embedding_files import EmbeddingPart
from distilclip.intake.foreign_vectors import VectorPlace, column_names, read_table, read_vector_header

DIGEST_COLUMN = "sha256"
"""As DataComp and img2dataset name the digest of an image file, in hex."""
_DIGEST = re.compile("[0-9a-fA-F]{64}")


@dataclass(frozen=True)
class RowNames:
    """Keys of n rows, and the SHA-256 of their image files, zeros where it is not known.

    `column` is the one of the keys; None where they are row numbers in nine digits.
    """

    key: list[str]
    image_sha256: UInt8[np.ndarray, "n 32"]
    column: str | None = None


def key_column(part: EmbeddingPart) -> str | None:
    """Return the column of a part's keys; None where they are row numbers."""
    if part.table is None:
        return None
    if part.table.is_lance:
        names = column_names(part.table)
        return next((name for name in KEY_COLUMNS_OF_TABLES if name in names), None)
    table = ParquetShard(part.table.path)
    try:
        return table.key_column
    finally:
        table.close()


def holds_pictures(part: EmbeddingPart) -> bool:
    """Return whether the table of a part holds the images as well, as Hugging Face's do."""
    if part.table is None or part.table.is_lance:
        return False
    table = ParquetShard(part.table.path)
    try:
        return table.holds_images
    finally:
        table.close()


def read_row_names(part: EmbeddingPart, num_rows: int | None = None) -> RowNames:
    """Return the names of a part's rows; `num_rows` is how many vectors it has, if that is known.

    Raises:
        InputError: its table has another number of rows, or a digest that is none.
    """
    num_rows = read_vector_header(part.image).num_rows if num_rows is None else num_rows
    numbers = [f"{row:09d}" for row in range(num_rows)]
    digests = np.zeros((num_rows, 32), np.uint8)
    if part.table is None:
        return RowNames(numbers, digests)
    column, names = key_column(part), column_names(part.table)
    has_digests = DIGEST_COLUMN in names and not holds_pictures(part)  # img2dataset's are of what it fetched, not wrote
    wanted = [*([column] if column else []), *([DIGEST_COLUMN] if has_digests else [])]
    table = read_table(part.table, wanted or names[:1])
    if len(table) != num_rows:
        raise InputError(
            f"{part.table} has {len(table)} rows, and {part.image} has {num_rows} vectors: they do not belong "
            "together. Give the files that were written together."
        )
    if has_digests:
        digests = _read_digests(table.column(DIGEST_COLUMN), part.table)
    if column is None:
        return RowNames(numbers, digests)
    found = table.column(column).to_pylist()
    return RowNames([n if k is None else str(k) for n, k in zip(numbers, found, strict=True)], digests, column)


def _read_digests(column: pa.ChunkedArray, place: VectorPlace) -> UInt8[np.ndarray, "n 32"]:
    texts = [text or "0" * 64 for text in column.to_pylist()]
    for row, text in enumerate(texts):
        if not (isinstance(text, str) and _DIGEST.fullmatch(text)):
            raise InputError(
                f"{place}, row {row}: {DIGEST_COLUMN} is {str(text)[:80]!r}, and no SHA-256 in hex. Rename that column."
            )
    return np.frombuffer(bytes.fromhex("".join(texts)), np.uint8).reshape(-1, 32)
