"""Open the vectors of an .npy, an .npz, a Parquet file or a Lance dataset as one matrix, in place where it can be."""

from __future__ import annotations

import contextlib
import itertools
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float

from distilclip import files
from distilclip.data.columns import refuse_damage
from distilclip.data.tabular import holds_vectors
from distilclip.errors import InputError

_PIECE = 1 << 24
_WRITE_AGAIN = "Fetch it, or write it, again."


@dataclass(frozen=True)
class VectorPlace:
    """A file of vectors; `name` is the array of an .npz or the column of a table, `fragment` a part of a dataset."""

    path: str
    name: str = ""
    fragment: int = 0

    def __str__(self) -> str:
        return f"{self.path}, {self.name}" if self.name else self.path

    @property
    def is_lance(self) -> bool:
        """Whether it lies in a Lance dataset."""
        return self.path.rstrip("/").lower().endswith(".lance")

    @property
    def file(self) -> str:
        """The file itself; of a Lance dataset the one of the fragment."""
        return list_fragments(self.path)[self.fragment][1] if self.is_lance else self.path


def list_names(path: str) -> list[str]:
    """Return the names of the arrays of an .npz, or of the columns of vectors of a table."""
    if path.lower().endswith(".npz"):
        with refuse_npz(path), files.open_read(path) as file, zipfile.ZipFile(file) as archive:
            return [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
    return [field.name for field in _schema(VectorPlace(path)) if holds_vectors(field.type)]


def list_fragments(path: str) -> list[tuple[int, str]]:
    """Return the parts of a table of vectors, each with its file: one of a Parquet file, the fragments of Lance."""
    if not VectorPlace(path).is_lance:
        return [(0, path)]
    fragments = _open_lance(path).get_fragments()
    return [(at, files.join(path, "data", one.data_files()[0].path)) for at, one in enumerate(fragments)]


def read_table(place: VectorPlace, names: Sequence[str]) -> pa.Table:
    """Read columns of a Parquet file, or of a fragment of a Lance dataset."""
    if place.is_lance:
        return _open_lance(place.path).get_fragments()[place.fragment].to_table(columns=list(names))
    with refuse_damage(place.path, remedy=_WRITE_AGAIN), files.open_read(place.path) as file:
        return pq.ParquetFile(file).read(columns=list(names))


def column_names(place: VectorPlace) -> list[str]:
    """Return the names of all columns of a table."""
    return list(_schema(place).names)


@dataclass(frozen=True)
class VectorHeader:
    """What a file says of its vectors before they are read."""

    num_rows: int
    dim: int
    dtype: np.dtype[Any]


def read_vector_header(place: VectorPlace) -> VectorHeader:
    """Read how many vectors there are, and of how many numbers of which kind.

    Raises:
        InputError: the file is damaged, or its array or column is no matrix of such numbers.
    """
    suffix = place.path[-4:].lower()
    if suffix not in (".npy", ".npz"):
        return _read_column_header(place)
    with refuse_npz(place.path), files.open_read(place.path) as file:
        if suffix == ".npy":
            shape, _, dtype = _read_array_header(file)
        else:
            with zipfile.ZipFile(file) as archive, archive.open(f"{place.name}.npy") as member:
                shape, _, dtype = _read_array_header(member)
    _check_matrix(shape, dtype, place)
    return VectorHeader(shape[0], shape[1], dtype)


@contextlib.contextmanager
def open_vectors(place: VectorPlace) -> Iterator[Float[np.ndarray, "n dim"]]:
    """Yield the vectors as a matrix of half, single or double precision; a local .npy or stored .npz is mapped.

    Raises:
        InputError: the file is damaged, or its array or column is no matrix of such numbers.
    """
    if place.path.lower().endswith((".npy", ".npz")):
        with files.local_copy(place.path) as local:
            with refuse_npz(place.path):
                array = np.load(local, mmap_mode="r") if not place.name else _read_member(local, place)
            _check_matrix(array.shape, array.dtype, place)
            yield array
    else:
        yield _read_column(place)


@contextlib.contextmanager
def refuse_npz(path: str) -> Iterator[None]:
    """Turn what numpy and zipfile raise on damaged bytes into `InputError`."""
    try:
        yield
    except (zipfile.BadZipFile, ValueError, EOFError, KeyError, zlib.error, SyntaxError) as error:
        if isinstance(error, InputError):
            raise
        said = " ".join(str(error).split())[:200]
        raise InputError(f"{path} is no complete file of arrays ({said}). {_WRITE_AGAIN}") from error


def _read_member(local: str, place: VectorPlace) -> np.ndarray:
    """Return an array of an .npz: a map of the file, or what a compressed one holds. Its checksum is compared."""
    with zipfile.ZipFile(local) as archive:
        found = archive.getinfo(f"{place.name}.npy")
        if found.compress_type != zipfile.ZIP_STORED:
            with archive.open(found) as file:
                return np.lib.format.read_array(file, allow_pickle=False)
    with open(local, "rb") as file:
        file.seek(found.header_offset)
        head = file.read(30)
        start = found.header_offset + 30 + int.from_bytes(head[26:28], "little") + int.from_bytes(head[28:30], "little")
        file.seek(start)
        shape, in_columns, dtype = _read_array_header(file)
        at = file.tell()
        if at + dtype.itemsize * int(np.prod(shape)) != start + found.file_size:
            raise ValueError(f"{place.name} is not as long as its header says")
        file.seek(start)
        checksum, left = 0, found.file_size
        while left and (piece := file.read(min(_PIECE, left))):
            checksum, left = zlib.crc32(piece, checksum), left - len(piece)
    if left or checksum != found.CRC:
        raise ValueError(f"the checksum of {place.name} differs")
    return np.memmap(local, dtype, "r", at, shape, order="F" if in_columns else "C")


def _read_array_header(file: Any) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Return shape, whether it is stored by columns, and dtype of an array; the file is at its first number then."""
    major = np.lib.format.read_magic(file)[0]
    if major == 1:
        return np.lib.format.read_array_header_1_0(file)
    return np.lib.format.read_array_header_2_0(file)


def _check_matrix(shape: tuple[int, ...], dtype: np.dtype[Any], place: VectorPlace) -> None:
    if len(shape) != 2 or 0 in shape or dtype.kind != "f" or dtype.itemsize > 8:
        raise InputError(
            f"{place} is an array of {dtype} of shape {shape}; embeddings are float16, float32 or float64 [rows, dim]. "
            "Write them so."
        )


def _read_column(place: VectorPlace) -> np.ndarray:
    """Return a list column as a matrix. A row that is null is NaN, so that it is found out as every other such row."""
    with refuse_damage(place.path, remedy=_WRITE_AGAIN):
        column = read_table(place, [place.name]).column(place.name)
        pieces = [_matrix(chunk, place) for chunk in column.chunks if len(chunk)]
    widths = {piece.shape[1] for piece in pieces} - {0}  # 0: nulls alone
    if len(widths) != 1:
        raise InputError(f"{place} holds vectors of {len(widths)} widths ({sorted(widths)[:5]}); all need the same.")
    (dim,) = widths
    dtype = column.type.value_type.to_pandas_dtype()
    filled = [piece if piece.shape[1] else np.full((len(piece), dim), np.nan, dtype) for piece in pieces]
    return np.concatenate(filled).astype(dtype, copy=False)


def _matrix(chunk: Any, place: VectorPlace) -> np.ndarray:
    """Return a chunk of a list column as a matrix, nulls as NaN."""
    lengths = np.asarray(chunk.value_lengths().fill_null(0))
    present = np.asarray(chunk.is_valid())
    widths = np.unique(lengths[present])
    if len(widths) > 1:
        row = int(np.argmax(present & (lengths != lengths[np.argmax(present)])))
        raise InputError(f"{place}: the vector in row {row} of a row group has another length ({lengths[row]}).")
    dim = int(widths[0]) if len(widths) else 0
    rows = np.full((len(chunk), dim), np.nan, chunk.type.value_type.to_pandas_dtype())
    values = np.asarray(chunk.flatten().to_numpy(zero_copy_only=False))  # of the rows that are there
    rows[present] = values.reshape(-1, dim) if dim else 0
    return rows


def _read_column_header(place: VectorPlace) -> VectorHeader:
    """Return the header of a list column: rows from the file's footer, the width from the first vector."""
    kind = _schema(place).field(place.name).type
    if place.is_lance:
        fragment = _open_lance(place.path).get_fragments()[place.fragment]
        num_rows, first = fragment.count_rows(), fragment.scanner(columns=[place.name], limit=1000).to_table()
    else:
        with refuse_damage(place.path, remedy=_WRITE_AGAIN), files.open_read(place.path) as file:
            table = pq.ParquetFile(file)
            num_rows = table.metadata.num_rows
            batches = table.iter_batches(batch_size=1000, columns=[place.name])
            first = pa.Table.from_batches(
                list(itertools.islice(batches, 1)), pa.schema([table.schema_arrow.field(place.name)])
            )
    lengths = first.column(place.name).combine_chunks().value_lengths().drop_null()
    if not len(lengths):
        raise InputError(f"{place} has no vector in its first rows. Is it the right column (--image-column)?")
    return VectorHeader(num_rows, int(lengths[0].as_py()), np.dtype(kind.value_type.to_pandas_dtype()))


def _schema(place: VectorPlace) -> pa.Schema:
    if place.is_lance:
        return _open_lance(place.path).schema
    with refuse_damage(place.path, remedy=_WRITE_AGAIN), files.open_read(place.path) as file:
        return pq.ParquetFile(file).schema_arrow


def _open_lance(path: str) -> Any:
    try:
        import lance
    except ImportError as error:
        raise InputError(
            f"{path} is a Lance dataset, which the package lance reads: pip install pylance. Or write it as Parquet."
        ) from error
    return lance.dataset(path.rstrip("/"))


class OpenVectors:
    """Keeps matrices open, so that those of one file are not opened for every shard of pairs.

    All that are mapped are kept, of others (of tables, compressed or remote files) the last `limit`, since they take
    memory or disk. Call `close` at the end.
    """

    def __init__(self, limit: int = 4) -> None:
        self._limit = limit
        self._mapped: dict[VectorPlace, np.ndarray] = {}
        self._open: dict[VectorPlace, tuple[contextlib.ExitStack, np.ndarray]] = {}

    def __getitem__(self, place: VectorPlace) -> np.ndarray:
        if place in self._mapped:
            return self._mapped[place]
        if place not in self._open:
            while len(self._open) >= self._limit:
                self._open.pop(next(iter(self._open)))[0].close()
            stack = contextlib.ExitStack()
            vectors = stack.enter_context(open_vectors(place))
            if isinstance(vectors, np.memmap) and not files.is_url(place.path):
                return self._mapped.setdefault(place, vectors)
            self._open[place] = stack, vectors
        return self._open[place][1]

    def close(self) -> None:
        """Let all of them go."""
        self._mapped.clear()
        while self._open:
            self._open.popitem()[1][0].close()
