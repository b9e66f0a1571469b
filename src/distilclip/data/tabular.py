"""Read tables of samples: Parquet with image bytes, as in Hugging Face datasets, or a CSV beside image files."""

from __future__ import annotations

import array
import codecs
import csv
import io
import itertools
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import UInt64

from distilclip import files
from distilclip.data.reader import Reader
from distilclip.data.samples import BadSample, Entry, Sample, clean_caption
from distilclip.errors import InputError

IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "image_bytes")
CAPTION_COLUMNS = ("caption", "text", "txt")
LABEL_COLUMNS = ("label", "cls")
KEY_COLUMNS = ("__key__", "key")
CACHE_BYTES = 256 << 20
"""Row groups that a process keeps, of all its Parquet shards together."""


class _RowGroups:
    """Keeps the row groups that were read last, up to `CACHE_BYTES`, but at least one.

    A token stands for a shard that may be gone, with its file closed.
    """

    def __init__(self) -> None:
        self._tables: OrderedDict[tuple[object, int], pa.Table] = OrderedDict()
        self._num_bytes = 0
        self._lock = threading.Lock()  # the shards of a store are opened by several threads

    def get(self, token: object, group: int) -> pa.Table | None:
        """Return a row group, if it is kept."""
        with self._lock:
            table = self._tables.get((token, group))
            if table is not None:
                self._tables.move_to_end((token, group))
            return table

    def add(self, token: object, group: int, table: pa.Table) -> None:
        """Keep a row group; the ones unused for the longest are dropped."""
        with self._lock:
            self._tables[token, group] = table
            self._num_bytes += table.nbytes
            while self._num_bytes > CACHE_BYTES and len(self._tables) > 1:
                self._num_bytes -= self._tables.popitem(last=False)[1].nbytes

    def drop(self, token: object) -> None:
        """Drop all row groups of a shard."""
        with self._lock:
            for key in [key for key in self._tables if key[0] is token]:
                self._num_bytes -= self._tables.pop(key).nbytes


@lru_cache(maxsize=1)
def _row_groups(process: int) -> _RowGroups:
    return _RowGroups()  # one for each process: what a parent kept is not counted in its loader processes


class ParquetShard:
    """A Parquet file with an image column (binary, or struct<bytes, path>) and a caption column.

    The offset of an entry is its row number, its size is 0. A read decodes the whole row group around the row, and
    keeps it while `CACHE_BYTES` suffice: scattered reads of files with large row groups are slow, tars suit training.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.truncated = False
        self._token = object()

    def __getstate__(self) -> dict[str, Any]:
        return {"uri": self.uri, "truncated": False, "_token": object()}

    def close(self) -> None:
        """Close the file and drop what was kept of it."""
        _row_groups(os.getpid()).drop(self._token)
        if "_file" in self.__dict__:
            self._file.close()
            del self._file

    def index(self) -> list[Entry]:
        """Return every row in order. Raises `InputError` where there is no row, or no image column."""
        num_rows = self._file.metadata.num_rows
        if num_rows == 0:
            raise InputError(f"{self.uri} has no rows: remove it from the data.")
        column = self._find_column(KEY_COLUMNS)
        keys: list[Any] = [None] * num_rows
        if column is not None:
            keys = self._file.read(columns=[column], use_threads=False).column(column).to_pylist()
        assert self._image_column  # found or complained about
        return [Entry(_key(key, row), row, 0) for row, key in enumerate(keys)]

    def prefetch(self, offset: int, size: int) -> None:
        """Do nothing: a row group is read when the first of its rows is."""

    def read(self, offset: int, size: int) -> Sample:
        """Return the sample in row `offset`. Raises `BadSample` where its caption is none."""
        ends = self._row_group_ends
        if not 0 <= offset < ends[-1]:
            raise InputError(f"{self.uri} has no row {offset}: the file is not the one that was indexed.")
        group = int(np.searchsorted(ends, offset, side="right"))
        table = self._row_group(group)
        row = table.slice(offset - int(ends[group]) + table.num_rows, 1).to_pylist()[0]
        image = row.pop(self._image_column)
        key = _key(row.get(self._find_column(KEY_COLUMNS)), offset)
        caption = clean_caption(row.get(self._find_column(CAPTION_COLUMNS)), where=f"{self.uri}: {key}")
        label = row.get(self._find_column(LABEL_COLUMNS))
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

    def _find_column(self, names: tuple[str, ...]) -> str | None:
        return next((name for name in names if name in self._file.schema_arrow.names), None)

    def _row_group(self, group: int) -> pa.Table:
        kept = _row_groups(os.getpid())
        table = kept.get(self._token, group)
        if table is None:
            columns = [f.name for f in self._file.schema_arrow if not _holds_images(f.type)]
            # One thread: this runs in loader workers, of which there is one per core already.
            table = self._file.read_row_group(group, columns=[*columns, self._image_column], use_threads=False)
            kept.add(self._token, group, table)
        return table


class CsvShard:
    """A CSV or TSV with columns `filepath` and `caption`; relative paths start from the folder of the file.

    The offset of an entry is its row number, its size is 0, its key the path as written. A `label` column is read too;
    all others become `meta`. Of the file only where each row begins is kept, 8 bytes a row.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.truncated = False
        self._reader = Reader(uri)
        self._delimiter = "\t" if uri.lower().endswith(".tsv") else ","

    def close(self) -> None:
        """Close the file; the next read opens it again."""
        self._reader.close()

    def index(self) -> list[Entry]:
        """Return every row in order. Raises `InputError` where columns or rows are missing."""
        records = self._records()
        names, _ = next(records)
        entries = [_csv_entry(_name_values(names, values), number) for number, (values, _) in enumerate(records)]
        if not entries:
            raise InputError(f"{self.uri} has no rows: remove it from the data.")
        return entries

    def prefetch(self, offset: int, size: int) -> None:
        """Do nothing: image files are read when they are asked for."""

    def read(self, offset: int, size: int) -> Sample:
        """Return the sample in row `offset`, with its image file. Raises `BadSample` where the file is missing."""
        row = self._row(offset)
        entry = _csv_entry(row, offset)
        where = f"{self.uri}: row {offset}"
        if entry.error:
            raise BadSample(entry.error, where=where)
        path = row["filepath"]
        if not (files.is_url(path) or os.path.isabs(path)):
            path = files.join(os.path.dirname(self.uri) or ".", path)
        try:
            image = files.read_bytes(path)
        except (FileNotFoundError, IsADirectoryError) as missing:
            raise BadSample("missing image file", detail=path, where=where) from missing
        caption = clean_caption(row.get("caption"), where=where)
        label = next((row[c] for c in LABEL_COLUMNS if row.get(c) is not None), None)
        return Sample(entry.key, image, caption, row, label)

    def _row(self, number: int) -> dict[Any, Any]:
        names, starts = self._layout
        if not 0 <= number < len(starts) - 1:
            raise InputError(f"{self.uri} has no row {number}: the file is not the one that was indexed.")
        span = self._reader.read(int(starts[number]), int(starts[number + 1] - starts[number]))
        text = io.StringIO(span.decode("utf-8", "surrogateescape"), newline="")
        values = next(filter(None, csv.reader(text, delimiter=self._delimiter)), None)
        if values is None:
            raise InputError(f"{self.uri} changed while it was read: row {number} is empty. Begin again.")
        return _name_values(names, values)

    @cached_property
    def _layout(self) -> tuple[list[str], UInt64[np.ndarray, " rows1"]]:
        """The names of the columns, the byte at which each row begins, and the one after the last row."""
        records = self._records()
        names, end = next(records)
        starts = array.array("Q", [end])
        starts.extend(end for _, end in records)
        return names, np.frombuffer(starts, np.uint64)

    def _records(self) -> Iterator[tuple[list[str], int]]:
        """Yield the names of the columns, then the values of every row, with the byte at which the next row begins.

        One pass that holds one row at a time. Blank lines belong to the row after them.
        """
        position = 0

        def lines() -> Iterator[str]:
            nonlocal position
            for line in text:
                position += len(line.encode("utf-8", "surrogateescape"))
                yield line

        with files.open_read(self.uri) as file:
            position = len(codecs.BOM_UTF8) if file.read(3) == codecs.BOM_UTF8 else 0
            file.seek(position)
            # Bytes that are no UTF-8 survive as surrogates, so that they condemn their own row and not the file.
            text = io.TextIOWrapper(file, "utf-8", errors="surrogateescape", newline="")
            reader = csv.reader(lines(), delimiter=self._delimiter)
            try:
                names = next(reader, [])
                self._check_names(names)
                yield names, position
                for values in filter(None, reader):
                    yield values, position
            except csv.Error as error:
                raise InputError(f"{self.uri}, line {reader.line_num}: {error}. Correct the quoting there.") from error

    def _check_names(self, names: Sequence[str]) -> None:
        missing = {"filepath", "caption"} - set(names)
        if missing:
            raise InputError(
                f"{self.uri} has no column {' and no column '.join(sorted(missing))}; its first line is {names}. "
                "Name the columns `filepath` and `caption` (comma in .csv, tab in .tsv)."
            )


def _holds_images(type_: pa.DataType) -> bool:
    if pa.types.is_struct(type_):
        return type_.get_field_index("bytes") >= 0
    return pa.types.is_binary(type_) or pa.types.is_large_binary(type_)


def _key(value: object, row: int) -> str:
    return f"{row:09d}" if value is None else str(value)


def _name_values(names: Sequence[str], values: Sequence[str]) -> dict[Any, Any]:
    """Return a row of a CSV by column: None for missing values, and those beyond the columns under the key None."""
    row: dict[Any, Any] = dict(itertools.zip_longest(names, values[: len(names)]))
    if len(values) > len(names):
        row[None] = values[len(names) :]
    return row


def _csv_entry(row: dict[Any, Any], number: int) -> Entry:
    path = row["filepath"] or ""
    key = path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    error = ""
    if None in row:  # mostly a caption with an unquoted comma
        error = "more values than columns"
    elif key != path:
        error = "file path is not UTF-8"
    elif not path:
        error = "no image"
    return Entry(key, number, 0, error)
