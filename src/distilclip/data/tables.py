"""Tables of samples: Parquet with image bytes, as Hugging Face datasets store them, and a CSV beside image files."""

from __future__ import annotations

import csv
import io
import os
from collections import OrderedDict
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from distilclip.data import files
from distilclip.data.samples import BadSample, Entry, Sample, clean_caption
from distilclip.errors import InputError

IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "image_bytes")
CAPTION_COLUMNS = ("caption", "text", "txt")
LABEL_COLUMNS = ("label", "cls")
KEY_COLUMNS = ("__key__", "key")
CACHE_BYTES = 256 << 20


class ParquetShard:
    """A Parquet file with an image column (binary, or struct<bytes, path>) and a caption column.

    The offset of an entry is its row number, its size is 0. A read decodes the whole row group around the row, and
    keeps up to `CACHE_BYTES` of them: scattered reads of files with large row groups are slow, tars suit training.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.truncated = False
        self._groups: OrderedDict[int, pa.Table] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {"uri": self.uri, "truncated": False, "_groups": OrderedDict()}

    def close(self) -> None:
        """Close the file and drop what was kept of it."""
        self._groups.clear()
        if "_file" in self.__dict__:
            self._file.close()
            del self._file

    def index(self) -> list[Entry]:
        """Every row in order. Raises `InputError` where there is no row, or no image column."""
        num_rows = self._file.metadata.num_rows
        if num_rows == 0:
            raise InputError(f"{self.uri} has no rows: remove it from the data.")
        column = self._first_of(KEY_COLUMNS)
        keys: list[Any] = [None] * num_rows
        if column is not None:
            keys = self._file.read(columns=[column], use_threads=False).column(column).to_pylist()
        assert self._image_column  # found or complained about
        return [Entry(_key(key, row), row, 0) for row, key in enumerate(keys)]

    def prefetch(self, offset: int, size: int) -> None:
        """Nothing: a row group is read when the first of its rows is."""

    def read(self, offset: int, size: int) -> Sample:
        """The sample in row `offset`. Raises `BadSample` where its caption is none."""
        ends = self._row_group_ends
        if not 0 <= offset < ends[-1]:
            raise InputError(f"{self.uri} has no row {offset}: the file is not the one that was indexed.")
        group = int(np.searchsorted(ends, offset, side="right"))
        table = self._row_group(group)
        row = table.slice(offset - int(ends[group]) + table.num_rows, 1).to_pylist()[0]
        image = row.pop(self._image_column)
        key = _key(row.get(self._first_of(KEY_COLUMNS)), offset)
        caption = clean_caption(row.get(self._first_of(CAPTION_COLUMNS)), where=f"{self.uri}: {key}")
        label = row.get(self._first_of(LABEL_COLUMNS))
        return Sample(
            key=key,
            image=image["bytes"] if isinstance(image, dict) else image,
            caption=caption,
            meta=row,
            label=None if label is None else str(label),
        )

    @cached_property
    def _file(self) -> pq.ParquetFile:
        try:
            return pq.ParquetFile(files.open_read(self.uri))
        except pa.ArrowInvalid as error:
            raise InputError(f"{self.uri} is no complete Parquet file ({error}): fetch it again.") from error

    @cached_property
    def _image_column(self) -> str:
        binary = [field.name for field in self._file.schema_arrow if _holds_images(field.type)]
        name = next((c for c in IMAGE_COLUMNS if c in binary), binary[0] if len(binary) == 1 else None)
        if name is None:
            raise InputError(
                f"{self.uri} has no column of image bytes: looked for binary or struct<bytes, path> columns named "
                f"{', '.join(IMAGE_COLUMNS)} among {', '.join(self._file.schema_arrow.names)}. Rename the column."
            )
        return name

    @cached_property
    def _row_group_ends(self) -> np.ndarray:
        metadata = self._file.metadata
        return np.cumsum([metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)])

    def _first_of(self, names: tuple[str, ...]) -> str | None:
        return next((name for name in names if name in self._file.schema_arrow.names), None)

    def _row_group(self, group: int) -> pa.Table:
        table = self._groups.pop(group, None)
        if table is None:
            columns = [f.name for f in self._file.schema_arrow if not _holds_images(f.type)]
            # One thread: this runs in loader workers, of which there is one per core already.
            table = self._file.read_row_group(group, columns=[*columns, self._image_column], use_threads=False)
            while self._groups and sum(t.nbytes for t in self._groups.values()) + table.nbytes > CACHE_BYTES:
                self._groups.popitem(last=False)
        self._groups[group] = table
        return table


class CsvShard:
    """A CSV or TSV with columns `filepath` and `caption`; relative paths start from the folder of the file.

    The offset of an entry is its row number, its size is 0, its key the path as written. A `label` column is read too;
    all others become `meta`.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.truncated = False

    def close(self) -> None:
        """Nothing stays open."""

    def index(self) -> list[Entry]:
        """Every row in order. Raises `InputError` where columns or rows are missing."""
        if not self._rows:
            raise InputError(f"{self.uri} has no rows: remove it from the data.")
        return [_csv_entry(row, number) for number, row in enumerate(self._rows)]

    def prefetch(self, offset: int, size: int) -> None:
        """Nothing: image files are read when they are asked for."""

    def read(self, offset: int, size: int) -> Sample:
        """The sample in row `offset`, with its image file. Raises `BadSample` where the file is missing."""
        if not 0 <= offset < len(self._rows):
            raise InputError(f"{self.uri} has no row {offset}: the file is not the one that was indexed.")
        row = self._rows[offset]
        key, error = _csv_entry(row, offset).key, _csv_entry(row, offset).error
        where = f"{self.uri}: row {offset}"
        if error:
            raise BadSample(error, where=where)
        path = row["filepath"]
        if not (files.is_url(path) or os.path.isabs(path)):
            path = files.join(os.path.dirname(self.uri) or ".", path)
        try:
            image = files.read_bytes(path)
        except (FileNotFoundError, IsADirectoryError) as missing:
            raise BadSample("missing image file", detail=path, where=where) from missing
        caption = clean_caption(row.get("caption"), where=where)
        label = next((row[c] for c in LABEL_COLUMNS if row.get(c) is not None), None)
        return Sample(key, image, caption, {k: v for k, v in row.items() if k is not None}, label)

    @cached_property
    def _rows(self) -> list[dict[str, Any]]:
        # Bytes that are no UTF-8 survive as surrogates, so that they condemn their own row and not the file.
        text = files.read_bytes(self.uri).decode("utf-8-sig", errors="surrogateescape")
        delimiter = "\t" if self.uri.lower().endswith(".tsv") else ","
        reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
        try:
            names, rows = reader.fieldnames or [], list(reader)
        except csv.Error as error:
            raise InputError(f"{self.uri}, line {reader.line_num}: {error}. Correct the quoting there.") from error
        missing = {"filepath", "caption"} - set(names)
        if missing:
            raise InputError(
                f"{self.uri} has no column {' and no column '.join(sorted(missing))}; its first line is {names}. "
                "Name the columns `filepath` and `caption` (comma in .csv, tab in .tsv)."
            )
        return rows


def _holds_images(type_: pa.DataType) -> bool:
    if pa.types.is_struct(type_):
        return type_.get_field_index("bytes") >= 0
    return pa.types.is_binary(type_) or pa.types.is_large_binary(type_)


def _key(value: object, row: int) -> str:
    return f"{row:09d}" if value is None else str(value)


def _csv_entry(row: dict[str, Any], number: int) -> Entry:
    path = row["filepath"] or ""
    key = path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    error = ""
    if None in row:  # DictReader's name for what exceeds the columns: mostly a caption with an unquoted comma
        error = "more values than columns"
    elif key != path:
        error = "file path is not UTF-8"
    elif not path:
        error = "no image"
    return Entry(key, number, 0, error)
