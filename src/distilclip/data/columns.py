"""Write and read Parquet tables of fixed schemas, with the same bytes each time and a checked format version."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping

import pyarrow as pa
import pyarrow.parquet as pq

from distilclip import files
from distilclip.errors import InputError, other_version

FORMAT_VERSION = "1"
_VERSION_KEY = "distilclip.format"


def write_columns(
    path: str, schema: pa.Schema, columns: Mapping[str, object], metadata: Mapping[str, str] | None = None
) -> None:
    """Write the columns of `schema`, atomically, with string metadata in the file's footer."""
    pairs = {_VERSION_KEY: FORMAT_VERSION, **dict(sorted((metadata or {}).items()))}
    values = [(columns[field.name], field.type) for field in schema]
    arrays = [value if isinstance(value, pa.Array) else pa.array(value, kind) for value, kind in values]
    table = pa.table(arrays, schema=schema)
    with files.atomic_write(path) as file:
        pq.write_table(table.replace_schema_metadata(pairs), file, compression="zstd", version="2.6")


def read_columns(path: str, schema: pa.Schema, *, optional: Collection[str] = ()) -> pa.Table:
    """Read the columns of `schema`, in that order; those named `optional` may be missing, and are null then.

    Raises:
        InputError: the file is missing, damaged, of another format version, or lacks a column.
    """
    file = _open(path)
    found = file.schema_arrow
    absent = [name for name in schema.names if name in optional and name not in found.names]
    there = pa.schema([field for field in schema if field.name not in absent])
    wrong = [f"{f.name} ({f.type})" for f in there if f.name not in found.names or found.field(f.name).type != f.type]
    if wrong:
        raise InputError(f"{path} lacks the columns {', '.join(wrong)}; it has {', '.join(found.names)}.")
    with refuse_damage(path):
        table = file.read(columns=there.names)
    for name in absent:
        table = table.append_column(schema.field(name), pa.nulls(file.metadata.num_rows, schema.field(name).type))
    return table.select(schema.names)


def read_column_metadata(path: str) -> dict[str, str]:
    """Read the string metadata of a table that `write_columns` wrote; only the footer is read."""
    metadata = _open(path).schema_arrow.metadata or {}
    with refuse_damage(path):
        return {key.decode(): value.decode() for key, value in metadata.items() if key != b"ARROW:schema"}


@contextlib.contextmanager
def refuse_damage(path: str, *, remedy: str = "Remove it and run its stage again.") -> Iterator[None]:
    """Turn what pyarrow raises on damaged bytes, or who looks for values among them, into `InputError`."""
    try:
        yield
    except (pa.ArrowException, LookupError, ValueError, TypeError, OSError) as error:
        if isinstance(error, InputError | MemoryError) or (isinstance(error, OSError) and error.errno is not None):
            raise
        said = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(f"{path} is no complete Parquet file ({said}). {remedy}") from error


def _open(path: str) -> pq.ParquetFile:
    if not files.exists(path):
        raise InputError(f"{path} is missing.")
    with refuse_damage(path):
        file = pq.ParquetFile(files.open_read(path))
        version = (file.schema_arrow.metadata or {}).get(_VERSION_KEY.encode(), b"none").decode()
    if version != FORMAT_VERSION:
        raise other_version(path, version, known=FORMAT_VERSION)
    return file
