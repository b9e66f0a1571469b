"""Read samples that lie in no tar: Parquet as of Hugging Face, a CSV beside image files, or a folder of pictures."""

from __future__ import annotations

import array
import codecs
import contextlib
import errno
import hashlib
import io
import itertools
import os
import stat
import threading
from collections import OrderedDict
from collections.abc import Collection, Iterator
from functools import cached_property, lru_cache
from typing import Any, NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import UInt64

from distilclip import files
from distilclip.csv_rows import CsvColumns, CsvLayout, CsvRecord, check_layout, find_layout, read_records
from distilclip.data.columns import refuse_damage
from distilclip.data.limits import Side
from distilclip.data.reader import Reader
from distilclip.data.samples import (
    IMAGE_EXTENSIONS,
    NO_IMAGE,
    BadSample,
    Entry,
    Sample,
    clean_caption,
    decode_meta,
    decode_text,
    first_caption,
    judge_memory,
)
from distilclip.errors import InputError
from distilclip.messages import say

IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "image_bytes")
CAPTION_COLUMNS = ("caption", "text", "txt", "title")
LABEL_COLUMNS = ("label", "cls")
KEY_COLUMNS = ("__key__", "key")
KEY_COLUMNS_OF_TABLES = (*KEY_COLUMNS, "uid", "image_path")
"""Where a table without images has its keys: as above, as in DataComp's metadata, or in clip-retrieval's."""
_FETCH_AGAIN = "Fetch it again."
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
        self._damaged: dict[int, str] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"uri": self.uri, "truncated": False, "_token": object(), "_damaged": {}}

    def close(self) -> None:
        """Close the file and drop what was kept of it."""
        _row_groups(os.getpid()).drop(self._token)
        if "_file" in self.__dict__:
            self._file.close()
            del self._file

    def index(self, may_lack: Collection[Side] = ()) -> list[Entry]:
        """Return every row in order. Raises `InputError` where there is no row, or no image column that there must."""
        num_rows = self._file.metadata.num_rows
        if num_rows == 0:
            raise InputError(f"{self.uri} has no rows: remove it from the data.")
        column = self.key_column
        with refuse_damage(self.uri, remedy=_FETCH_AGAIN):
            if num_rows != int(self._row_group_ends[-1]):
                raise ValueError(f"{num_rows} rows, and {self._row_group_ends[-1]} in its row groups")
            keys: list[Any] = [None] * num_rows
            if column is not None:
                keys = self._file.read(columns=[column], use_threads=False).column(column).to_pylist()
        if self._image_column is None and ("image" not in may_lack or self.holds_images):
            self._refuse_columns()
        return [Entry(_key(key, row), row, 0) for row, key in enumerate(keys)]

    def prefetch(self, offset: int, size: int) -> None:
        """Do nothing: a row group is read when the first of its rows is."""

    def read(self, offset: int, size: int) -> Sample:
        """Return the sample in row `offset`. Raises `BadSample` where it, or its caption, cannot be understood."""
        ends = self._row_group_ends
        if not 0 <= offset < ends[-1]:
            raise InputError(f"{self.uri} has no row {offset}: the file is not the one that was indexed.")
        group = int(np.searchsorted(ends, offset, side="right"))
        with judge_memory(f"{self.uri}: row {offset}"):
            table = self._row_group(group)
            row: Any = _values_of(table.slice(offset - int(ends[group]) + table.num_rows, 1))
        image = None if self._image_column is None else row.pop(self._image_column, None)
        key = _key(row.get(self.key_column), offset)
        where = f"{self.uri}: {key}"
        caption = first_caption(row.get(self._find_column(CAPTION_COLUMNS)), row.get("captions"), where=where)
        label = row.get(self._find_column(LABEL_COLUMNS))
        if isinstance(image, dict):
            path = image.get("path")
            path = path if isinstance(path, str) else None
            image = _read_image(path, self.uri, where=where) if image["bytes"] is None and path else image["bytes"]
        return Sample(
            key=key,
            image=image,
            caption=caption,
            meta=row,
            label=None if label is None else str(label),
        )

    @cached_property
    def holds_images(self) -> bool:
        """Whether it has a column of images at all; img2dataset and LAION write tables of metadata without one."""
        return any(_holds_images(field.type) for field in self._file.schema_arrow)

    @property
    def key_column(self) -> str | None:
        """The column of the keys; None where they are row numbers."""
        return self._find_column(KEY_COLUMNS if self.holds_images else KEY_COLUMNS_OF_TABLES)

    @property
    def names_files(self) -> bool:
        """Whether rows may name image files instead of holding them."""
        metadata = self._file.metadata
        for place in range(metadata.num_columns):
            if metadata.schema.column(place).path == f"{self._image_column}.bytes":
                groups = (metadata.row_group(group).column(place) for group in range(metadata.num_row_groups))
                return any(g.statistics is None or g.statistics.null_count != 0 for g in groups)
        return False

    @cached_property
    def _file(self) -> pq.ParquetFile:
        with refuse_damage(self.uri, remedy=_FETCH_AGAIN):
            return pq.ParquetFile(files.open_read(self.uri))

    @cached_property
    def _image_column(self) -> str | None:
        binary = [field.name for field in self._file.schema_arrow if _holds_images(field.type)]
        return next((c for c in IMAGE_COLUMNS if c in binary), binary[0] if len(binary) == 1 else None)

    def _refuse_columns(self) -> NoReturn:
        """Say that there is no column of images, and what to do."""
        names = {column.lower(): column for column in self._file.schema_arrow.names}
        if "url" in names:
            caption = next((names[c] for c in (*CAPTION_COLUMNS, "caption") if c in names), "caption")
            raise InputError(
                f"{self.uri} holds web addresses (column {names['url']}) and no images. "
                f"{_fetch(self.uri, 'parquet', names['url'], caption)}"
            )
        raise InputError(
            f"{self.uri} has no column of image bytes: looked for binary or struct<bytes, path> columns named "
            f"{', '.join(IMAGE_COLUMNS)} among {', '.join(self._file.schema_arrow.names)}. Rename the column; "
            "where its rows are captions alone, `embed --may-lack image`."
        )

    @cached_property
    def _row_group_ends(self) -> np.ndarray:
        metadata = self._file.metadata
        return np.cumsum([metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)])

    def _find_column(self, names: tuple[str, ...]) -> str | None:
        return next((name for name in names if name in self._file.schema_arrow.names), None)

    def _row_group(self, group: int) -> pa.Table:
        """Return a row group; `BadSample` where it cannot be decoded, which is tried only once."""
        if group in self._damaged:
            raise BadSample("damaged row group", detail=self._damaged[group], where=f"{self.uri}: row group {group}")
        kept = _row_groups(os.getpid())
        table = kept.get(self._token, group)
        if table is None:
            columns = [f.name for f in self._file.schema_arrow if not (_holds_images(f.type) or holds_vectors(f.type))]
            try:
                # One thread: this runs in loader workers, of which there is one per core already.
                columns += [] if self._image_column is None else [self._image_column]
                table = self._file.read_row_group(group, columns=columns, use_threads=False)
            except (pa.ArrowException, OSError) as error:
                if isinstance(error, OSError) and error.errno is not None:
                    raise
                self._damaged[group] = " ".join(str(error).split())[:200]
                return self._row_group(group)
            kept.add(self._token, group, table)
        return table


class CsvShard:
    """A CSV beside image files; relative paths start from the folder of the file.

    The offset of an entry is its row number, its size is 0, its key the path as written, or the row number in nine
    digits where there is no column of paths. A `label` column is read too; all others become `meta`. Of the file only
    where each row begins is kept, 8 bytes a row. `columns` says what the first line does not tell.
    """

    def __init__(self, uri: str, columns: CsvColumns | None = None) -> None:
        self.uri, self.columns = uri, columns or CsvColumns()
        self.truncated = False
        self._reader = Reader(uri)

    def close(self) -> None:
        """Close the file; the next read opens it again."""
        self._reader.close()

    def index(self, may_lack: Collection[Side] = ()) -> list[Entry]:
        """Return every row in order. Raises `InputError` where columns or rows are missing."""
        layout, _ = self._header
        check_layout(layout, self.columns, uri=self.uri, may_lack=may_lack)
        entries = []
        longest = 0
        for number, record in enumerate(self._records()):
            entries.append(_csv_entry(layout, record, number))
            longest = max(longest, record.num_lines)
        if entries and layout.image.lower() == "url" and self.columns.csv_img_key is None:
            _check_no_web_address(self.uri, entries[0].key, layout)
        if not entries:
            raise InputError(f"{self.uri} has no rows: remove it from the data.")
        if longest > 1:
            say(
                f"{self.uri}: of {len(entries)} rows, the longest has {longest} lines. Where each caption should have "
                "one line, a quote is not closed."
            )
        return entries

    @property
    def names_columns(self) -> bool:
        """Whether its first line names a column of image files and one of captions."""
        layout, _ = self._header
        return bool(layout.image and layout.caption)

    def prefetch(self, offset: int, size: int) -> None:
        """Do nothing: image files are read when they are asked for."""

    def read(self, offset: int, size: int) -> Sample:
        """Return the sample in row `offset`, with its image file. Raises `BadSample` where the file is missing."""
        layout, _ = self._header
        record = self._record(offset)
        entry = _csv_entry(layout, record, offset)
        where = f"{self.uri}: row {offset}"
        if entry.error and entry.error != NO_IMAGE:
            raise BadSample(entry.error, where=where)
        row = layout.name_values(record.values)
        image = None if entry.error else _read_image(row[layout.image], self.uri, where=where)
        caption = clean_caption(row.get(layout.caption), where=where) if layout.caption else None
        label = next((row[c] for c in LABEL_COLUMNS if row.get(c) is not None), None)
        return Sample(entry.key, image, caption, row, label)

    def _record(self, number: int) -> CsvRecord:
        starts = self._row_starts
        if not 0 <= number < len(starts) - 1:
            raise InputError(f"{self.uri} has no row {number}: the file is not the one that was indexed.")
        span = self._reader.read(int(starts[number]), int(starts[number + 1] - starts[number]))
        text = io.StringIO(span.decode("utf-8", "surrogateescape"), newline="")
        record = next(read_records(text, self._header[0], extensions=IMAGE_EXTENSIONS), None)
        if record is None:
            raise InputError(f"{self.uri} changed while it was read: row {number} is empty. Begin again.")
        return record

    @cached_property
    def _header(self) -> tuple[CsvLayout, int]:
        """The columns, and the byte at which the first row begins."""
        with files.open_read(self.uri) as file:
            mark = len(codecs.BOM_UTF8) if file.read(3) == codecs.BOM_UTF8 else 0
            file.seek(mark)
            line = io.TextIOWrapper(file, "utf-8", errors="surrogateescape", newline="").readline()
        return find_layout(line, self.columns, uri=self.uri), mark + len(line.encode("utf-8", "surrogateescape"))

    @cached_property
    def _row_starts(self) -> UInt64[np.ndarray, " rows1"]:
        """The byte at which each row begins, and the one after the last row."""
        num_bytes = (record.num_bytes for record in self._records())
        return np.frombuffer(array.array("Q", itertools.accumulate(num_bytes, initial=self._header[1])), np.uint64)

    def _records(self) -> Iterator[CsvRecord]:
        """Yield the rows, in one pass that holds one row at a time."""
        layout, start = self._header
        with files.open_read(self.uri) as file:
            file.seek(start)
            # Bytes that are no UTF-8 survive as surrogates, so that they condemn their own row and not the file.
            text = io.TextIOWrapper(file, "utf-8", errors="surrogateescape", newline="")
            yield from read_records(text, layout, extensions=IMAGE_EXTENSIONS)


class PictureFolder:
    """The pictures that lie in one folder, without those of its subfolders; its URI ends in a slash.

    A caption is the text of the `.txt` of the same stem, else what the `.json` of that stem says. Where no picture has
    either, it is a folder of pictures alone. The offset of an entry is its place among the sorted names, its size is 0,
    its key the name of the file.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.truncated = False

    def __getstate__(self) -> dict[str, Any]:
        return {"uri": self.uri, "truncated": False}

    @property
    def num_bytes(self) -> int:
        """Sum of the sizes of the pictures and their texts."""
        return sum(self._sizes.values())

    @property
    def sha256(self) -> str:
        """SHA-256 of the names and sizes."""
        listing = "".join(f"{name}\0{size}\n" for name, size in sorted(self._sizes.items()))
        return hashlib.sha256(listing.encode("utf-8", "surrogateescape")).hexdigest()

    @property
    def has_captions(self) -> bool:
        """Whether any picture has a text beside it."""
        return any(self._text_names(name) for name in self._names)

    def close(self) -> None:
        """Forget the listing; the next read makes it again."""
        for name in ("_sizes", "_names"):
            self.__dict__.pop(name, None)

    def index(self, may_lack: Collection[Side] = ()) -> list[Entry]:
        """Return every picture, by name."""
        return [Entry(_printable(name), number, 0) for number, name in enumerate(self._names)]

    def prefetch(self, offset: int, size: int) -> None:
        """Do nothing: image files are read when they are asked for."""

    def read(self, offset: int, size: int) -> Sample:
        """Return picture number `offset` with its caption. Raises `BadSample` where a file cannot be used."""
        if not 0 <= offset < len(self._names):
            raise InputError(f"{self.uri} has no picture {offset}: pictures were removed since it was indexed.")
        name = self._names[offset]
        where = f"{self.uri}{_printable(name)}"
        image = _read_image(name, self.uri, where=where)
        texts = {text.rpartition(".")[2]: files.read_bytes(self.uri + text) for text in self._text_names(name)}
        meta = decode_meta(texts["json"], where=where) if "json" in texts else {}
        text = decode_text(texts["txt"], name="caption", where=where) if "txt" in texts else None
        caption = first_caption(text, meta.get("caption"), meta.get("captions"), where=where)
        return Sample(_printable(name), image, caption, meta)

    def _text_names(self, name: str) -> list[str]:
        stem = name.rpartition(".")[0]
        return [text for text in (f"{stem}.txt", f"{stem}.json") if text in self._sizes]

    @cached_property
    def _names(self) -> list[str]:
        return sorted(name for name in self._sizes if is_picture(name))

    @cached_property
    def _sizes(self) -> dict[str, int]:
        """Bytes of the pictures and of the texts beside them, by name."""
        sizes = files.file_sizes(self.uri)
        stems = {name.rpartition(".")[0] for name in sizes if is_picture(name)}
        texts = (name for name in sizes if name.rpartition(".")[2] in ("txt", "json"))
        kept = {*filter(is_picture, sizes), *(name for name in texts if name.rpartition(".")[0] in stems)}
        return {name: sizes[name] for name in kept}


def is_picture(name: str) -> bool:
    """Return whether a file is a picture by its name; hidden ones are none."""
    return not name.startswith(".") and name.rpartition(".")[2].lower() in IMAGE_EXTENSIONS


def _holds_images(type_: pa.DataType) -> bool:
    if pa.types.is_struct(type_):
        place = type_.get_field_index("bytes")
        bytes_type = type_.field(place).type if place >= 0 else None
        return bytes_type is not None and (
            pa.types.is_null(bytes_type) or _holds_images(bytes_type)
        )  # null: paths only
    return pa.types.is_binary(type_) or pa.types.is_large_binary(type_)


def holds_vectors(type_: pa.DataType) -> bool:
    """Return whether a column holds a list of real numbers in each row, such as embeddings."""
    is_list = pa.types.is_list(type_) or pa.types.is_large_list(type_) or pa.types.is_fixed_size_list(type_)
    return is_list and pa.types.is_floating(type_.value_type)


def _values_of(row: pa.Table) -> dict[str, Any]:
    """Return the values of a table of one row by column, without those that Python cannot hold."""
    try:
        return row.to_pylist()[0]
    except (ValueError, TypeError, pa.ArrowException):
        found = {}
        for name in row.column_names:
            with contextlib.suppress(ValueError, TypeError, pa.ArrowException):
                found[name] = row.column(name).to_pylist()[0]
        return found


def _key(value: object, row: int) -> str:
    return f"{row:09d}" if value is None else str(value)


def _printable(name: str) -> str:
    """Return a name that may hold bytes which are no UTF-8, with these as escapes."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _read_image(path: str, table: str, *, where: str) -> bytes:
    """Read the image file that a table, or a folder, names. Raises `BadSample` where there is none to be read."""
    if not (files.is_url(path) or os.path.isabs(path)):
        path = files.join(os.path.dirname(table) or ".", path)
    try:
        if not files.is_url(path) and not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would be waited for
            raise BadSample("missing image file", detail=path, where=where)
        return files.read_bytes(path)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as missing:
        raise BadSample("missing image file", detail=path, where=where) from missing
    except (PermissionError, ValueError) as error:  # the latter for a zero byte in a path
        if isinstance(error, InputError):
            raise
        raise BadSample("unreadable image file", detail=path, where=where) from error
    except OSError as error:
        if error.errno not in (errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL):
            raise
        raise BadSample("unreadable image file", detail=path[:200], where=where) from error


def _csv_entry(layout: CsvLayout, record: CsvRecord, number: int) -> Entry:
    row = layout.name_values(record.values)
    path = (layout.image and row[layout.image]) or ""
    key = _printable(path) if layout.image else f"{number:09d}"
    error = ""
    if record.is_unclosed:
        error = "unclosed quote"
    elif None in row:  # mostly a caption with an unquoted comma
        error = "more values than columns"
    elif layout.image and key != path:
        error = "file path is not UTF-8"
    elif not path:
        error = NO_IMAGE
    return Entry(key, number, 0, error)


def _check_no_web_address(uri: str, path: str, layout: CsvLayout) -> None:
    if path.startswith(("http://", "https://")):
        kind = "tsv" if layout.separator == "\t" else "csv"
        raise InputError(
            f"{uri} holds web addresses ({path[:80]} first) and no image files. "
            f"{_fetch(uri, kind, layout.image, layout.caption)}"
        )


def _fetch(uri: str, kind: str, image: str, caption: str) -> str:
    return (
        f"Fetch the images first: `img2dataset --url_list {uri} --input_format {kind} --url_col {image} --caption_col "
        f"{caption} --output_format webdataset --output_folder pairs`, then give --data pairs."
    )
