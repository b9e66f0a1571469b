"""Write and read a store: the embeddings of every shard, its row table, and the manifest that lists the shards."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float, Float16, Integer, UInt8, UInt32, UInt64

from distilclip import digests, files
from distilclip.csv_rows import CsvColumns
from distilclip.data.columns import FORMAT_VERSION, read_column_metadata, read_columns, refuse_damage, write_columns
from distilclip.data.reader import Reader
from distilclip.data.shards import key_digest
from distilclip.data.tensors import Header, read_header, read_tensors, write_tensors
from distilclip.data.views import ViewEmbeddings, Views, check_views, read_views, views_path, write_views
from distilclip.errors import InputError, other_version

ROWS_SCHEMA = pa.schema(
    [
        ("row", pa.uint32()),
        ("key", pa.string()),
        ("offset", pa.uint64()),
        ("size", pa.uint32()),
        ("valid", pa.bool_()),
        ("error", pa.string()),
        ("image_sha256", pa.binary(32)),
        ("has_image", pa.bool_()),
        ("has_text", pa.bool_()),
    ]
)
_LATER_COLUMNS = ("has_image", "has_text")  # row tables of older versions lack them: a valid row has both


@dataclass(frozen=True)
class Rows:
    """The row table of a shard. An unusable row has `valid` false and the reason in `error`.

    `image_sha256` is that of the image file's bytes, zeros where there is none. `has_image` and `has_text` say which
    embeddings are there: of a valid row one at least, and both where they are not given; of others none.
    """

    key: list[str]
    offset: UInt64[np.ndarray, " n"]
    size: UInt32[np.ndarray, " n"]
    valid: Bool[np.ndarray, " n"]
    error: list[str]
    image_sha256: UInt8[np.ndarray, "n 32"]
    has_image: Bool[np.ndarray, " n"] = None  # type: ignore[assignment]  # filled in below
    has_text: Bool[np.ndarray, " n"] = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        for name in _LATER_COLUMNS:
            if getattr(self, name) is None:
                object.__setattr__(self, name, self.valid)

    def __len__(self) -> int:
        return len(self.key)

    @classmethod
    def of_table(cls, table: pa.Table) -> Rows:
        """Return the rows of a table with `ROWS_SCHEMA`."""
        digests = table.column("image_sha256").combine_chunks().fill_null(bytes(32))
        whole = np.frombuffer(digests.buffers()[1], np.uint8).reshape(-1, 32)
        return cls(
            key=table.column("key").to_pylist(),
            offset=table.column("offset").to_numpy(),
            size=table.column("size").to_numpy(),
            valid=table.column("valid").to_numpy(),
            error=table.column("error").to_pylist(),
            image_sha256=whole[digests.offset : digests.offset + len(digests)],
            **{name: table.column(name).to_numpy() for name in _LATER_COLUMNS},
        )

    def has(self, side: str) -> Bool[np.ndarray, " n"]:
        """Return which rows have an embedding of `side`, `image` or `text`."""
        return {"image": self.has_image, "text": self.has_text}[side]

    def columns(self) -> dict[str, Any]:
        """Return the columns of `ROWS_SCHEMA`."""
        return {
            "row": np.arange(len(self), dtype=np.uint32),
            "key": self.key,
            "offset": self.offset,
            "size": self.size,
            "valid": self.valid,
            "error": self.error,
            "image_sha256": self._digests(),
            "has_image": self.has_image,
            "has_text": self.has_text,
        }

    def _digests(self) -> pa.FixedSizeBinaryArray:
        """Return the digests in Arrow, null where there is none."""
        known = pa.array(self.image_sha256.any(axis=1)).buffers()[1]
        content = pa.py_buffer(np.ascontiguousarray(self.image_sha256))
        return pa.FixedSizeBinaryArray.from_buffers(pa.binary(32), len(self), [known, content])


_TOLERANCE = 2e-3  # half precision keeps the length of a unit vector to about 5e-4


def check_embeddings(embeddings: Float16[np.ndarray, "n dim"], valid: Bool[np.ndarray, " n"], *, where: str) -> None:
    """Raise `InputError` naming the first valid row that is not finite or not of unit length."""
    wrong = valid & not_unit(embeddings)
    if wrong.any():
        raise InputError(
            f"{where}, row {int(np.argmax(wrong))}: not a finite unit vector. Embed the data again, into a new folder."
        )


def not_unit(embeddings: Float[np.ndarray, "n dim"]) -> Bool[np.ndarray, " n"]:
    """Return which rows are not finite or not of unit length, as far as half precision can tell."""
    lengths = np.linalg.norm(embeddings.astype(np.float32), axis=1)
    return ~(np.abs(lengths - 1) < _TOLERANCE)  # not >=, so that NaN is caught


MANIFEST_SCHEMA = pa.schema(
    [
        ("shard", pa.uint32()),
        ("uri", pa.string()),
        ("bytes", pa.uint64()),
        ("num_rows", pa.uint32()),
        ("key_digest", pa.string()),
        ("sha256", pa.string()),
        ("status", pa.string()),
        ("xxh3", pa.string()),
    ]
)
TEACHER_KEYS = ("name", "digest", "preprocessing", "tokenizer", "precision", "scale")
NOT_KNOWN = "unknown"
"""What an imported store says of what the files that it was made from do not tell."""
BIAS_KEY = "bias"  # of teachers trained with the sigmoid loss only


def sample_id(
    shard: Integer[np.ndarray, "*n"] | int | np.integer, row: Integer[np.ndarray, "*n"] | int | np.integer
) -> Any:
    """Return `shard << 32 | row` as uint64, of numbers or arrays."""
    return (np.asarray(shard, np.uint64) << np.uint64(32) | np.asarray(row, np.uint64))[()]


def split_id(ids: Integer[np.ndarray, "*n"] | int | np.integer) -> tuple[Any, Any]:
    """Return the shard and the row of sample ids, as uint32."""
    ids = np.asarray(ids, np.uint64)
    return (ids >> np.uint64(32)).astype(np.uint32)[()], (ids & np.uint64(0xFFFFFFFF)).astype(np.uint32)[()]


def stem(shard: int) -> str:
    """Return the name of a shard's files: six digits."""
    return f"{shard:06d}"


@dataclass(frozen=True, kw_only=True)
class SourceFile:
    """The file that a shard is made from; `truncated` says that its end is missing.

    `notes` is what else the payload's metadata say of it.
    """

    uri: str
    num_bytes: int
    sha256: str
    truncated: bool = False
    notes: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class StoreShard:
    """One line of the manifest. `num_bytes` is the size of the source file.

    `sha256` and `xxh3` are digests of the embeddings; a store of an older version has no `xxh3`.
    """

    index: int
    uri: str
    num_bytes: int
    num_rows: int
    key_digest: str
    sha256: str
    status: str
    xxh3: str | None = None

    @property
    def quick_digest(self) -> str:
        """The digest that readers compare."""
        return self.xxh3 or self.sha256


class StoredTeacher:
    """The teacher whose embeddings a folder holds, as `teacher` describes it; `dim` is their width."""

    path: str
    dim: int
    teacher: dict[str, Any]
    views: Views | None

    @property
    def scale(self) -> float:
        """The teacher's factor of cosine similarities. Raises `InputError` where it was imported without it."""
        scale = float(self.teacher["scale"])
        if math.isnan(scale):
            raise InputError(
                f"{self.path} was imported without the scale of its teacher, which is needed here. Import it again, "
                "into another --out, with --teacher-scale (exp of the model's logit_scale; of OpenAI's models 100)."
            )
        return scale


@dataclass(frozen=True)
class Store(StoredTeacher):
    """A finished store, opened for reading. Embeddings are memory maps where the store is local.

    `has_pictures` is false for one that was imported and does not know where they are.
    """

    path: str
    shards: list[StoreShard]
    dim: int
    teacher: dict[str, Any]
    views: Views | None = None
    csv_columns: CsvColumns | None = None
    has_pictures: bool = True

    @classmethod
    def open(cls, path: str) -> Store:
        """Open a store by its folder.

        Raises:
            InputError: there is none, it is unfinished, or its format version is unknown.
        """
        manifest = files.join(path, "manifest.parquet")
        if not files.exists(manifest):
            raise InputError(f"{path} is no finished store (no manifest.parquet): run `distilclip embed --out {path}`.")
        digests.check_file(path, "manifest.parquet", remedy=digests.repair_with(path, "embed"))
        with refuse_damage(manifest):
            table = read_columns(manifest, MANIFEST_SCHEMA, optional=["xxh3"]).to_pydict()
            shards = [StoreShard(*values) for values in zip(*table.values(), strict=True)]
            metadata = read_column_metadata(manifest)
            views = Views.from_json(metadata["views"]) if "views" in metadata else None
            csv_columns = CsvColumns(**json.loads(metadata["csv_columns"])) if "csv_columns" in metadata else None
            has_pictures = metadata.get("pictures") != NOT_KNOWN
            return cls(path, shards, int(metadata["dim"]), teacher_of(metadata), views, csv_columns, has_pictures)

    def require_pictures(self) -> None:
        """Raise `InputError` where the store was imported without its pictures."""
        if not self.has_pictures:
            raise InputError(
                f"{self.path} was imported without its pictures, which are needed here. Import it again, into another "
                "--out, with --data and the tars that hold them."
            )

    @property
    def num_shards(self) -> int:
        """Number of shards, each made from one source file."""
        return len(self.shards)

    @property
    def num_rows(self) -> int:
        """Number of rows of all shards, unusable ones included."""
        return sum(shard.num_rows for shard in self.shards)

    def image(self, shard: int) -> Float16[np.ndarray, "n dim"]:
        """Return the image embeddings of a shard: unit rows, zeros where the row has none."""
        return self._embeddings(shard)["image"]

    def text(self, shard: int) -> Float16[np.ndarray, "n dim"]:
        """Return the text embeddings of a shard: unit rows, zeros where the row has none."""
        return self._embeddings(shard)["text"]

    def view_embeddings(self, shard: int) -> ViewEmbeddings:
        """Return the embeddings of a shard's views, in a store that has some."""
        self._check_digest(files.join("views", f"{stem(shard)}.safetensors"))
        return read_views(self.path, shard, **self._shape_of_views(shard))

    def payload_path(self, shard: int) -> str:
        """Return the path of the embeddings of a shard."""
        return self._path(shard, "safetensors")

    def views_path(self, shard: int) -> str:
        """Return the path of the embeddings of a shard's views."""
        return views_path(self.path, shard)

    def check_payload(self, shard: int, header: Header) -> None:
        """Raise `InputError` unless a file with this header holds the embeddings of a shard of this store."""
        path, metadata = self.payload_path(shard), header.metadata
        if metadata.get("format") != FORMAT_VERSION:
            raise other_version(path, metadata.get("format"), known=FORMAT_VERSION)
        if metadata.get("teacher_digest") != self.teacher["digest"]:
            raise InputError(
                f"{path} was embedded by teacher {metadata.get('teacher_name')} "
                f"({metadata.get('teacher_digest')}), the rest of the store by {self.teacher['name']} "
                f"({self.teacher['digest']}). {_EMBED_AGAIN}"
            )
        expected = (self.shards[shard].num_rows, self.dim)
        for name in ("image", "text"):
            if header.shapes.get(name) != expected:
                raise InputError(f"{path} has no {name} embeddings of shape {expected}. {_EMBED_AGAIN}")

    def check_views(self, shard: int, header: Header) -> None:
        """Raise `InputError` unless a file with this header holds the views of a shard of this store."""
        check_views(self.path, shard, header, **self._shape_of_views(shard))

    def rows(self, shard: int) -> Rows:
        """Return the row table of a shard."""
        with refuse_damage(self._path(shard, "rows.parquet")):
            return Rows.of_table(self.columns(shard, *ROWS_SCHEMA.names))

    def columns(self, shard: int, *names: str) -> pa.Table:
        """Return some columns of the row table of a shard, in Arrow. `rows` takes ten times as long."""
        path = self._path(shard, "rows.parquet")
        self._check_digest(f"{stem(shard)}.rows.parquet")
        table = _read_row_table(path, names)
        if len(table) != self.shards[shard].num_rows:
            raise InputError(
                f"{path} has {len(table)} rows, the manifest says {self.shards[shard].num_rows}. {_EMBED_AGAIN}"
            )
        return table

    def list_embeddings(self) -> list[tuple[str, str, Callable[[], str]]]:
        """Return the files of embeddings that have a digest: path, digest (`files.has_digest`) and what repairs it."""
        remedy, known = digests.repair_with(self.path, "embed"), digests.read_digests(self.path)
        found = [(self.payload_path(line.index), line.quick_digest, remedy) for line in self.shards]
        views = [(files.join(self.path, name), known[name], remedy) for name in known if name.startswith("views/")]
        return found + views

    def verify(self) -> None:
        """Read everything and compare it with the manifest.

        Raises:
            InputError: a digest disagrees, or an embedding is not finite or not of unit length; names file and row.
        """
        for shard in self.shards:
            path = self.payload_path(shard.index)
            if files.sha256(path) != shard.sha256:
                raise InputError(f"{path} is not the file that was written (SHA-256 differs). {_EMBED_AGAIN}")
            rows = self.rows(shard.index)
            if key_digest(rows.key) != shard.key_digest:
                raise InputError(f"{self._path(shard.index, 'rows.parquet')}: the keys were changed. {_EMBED_AGAIN}")
            for name, embeddings in self._embeddings(shard.index).items():
                check_embeddings(embeddings, rows.has(name), where=f"{path}, {name}")
            for view in range(self.views.num if self.views else 0):
                embeddings = self.view_embeddings(shard.index).image[:, view]
                check_embeddings(embeddings, rows.has_image, where=f"{path}, view {view}")

    def _path(self, shard: int, suffix: str) -> str:
        return files.join(self.path, f"{stem(shard)}.{suffix}")

    def _check_digest(self, name: str) -> None:
        digests.check_file(self.path, name, remedy=digests.repair_with(self.path, "embed"))

    def _shape_of_views(self, shard: int) -> dict[str, Any]:
        assert self.views is not None
        return {
            "num_rows": self.shards[shard].num_rows,
            "num_views": self.views.num,
            "dim": self.dim,
            "teacher": self.teacher["digest"],
        }

    def _embeddings(self, shard: int) -> dict[str, np.ndarray]:
        path = self.payload_path(shard)
        with Reader(path) as reader:
            self.check_payload(shard, read_header(reader))
        arrays = read_tensors(path)
        line = self.shards[shard]
        if not digests.is_same(path, line.quick_digest):
            where = f"; shard {shard}, rows 0 to {line.num_rows - 1}"
            raise InputError(digests.describe_change(path, digests.repair_with(self.path, "embed")(), what=where))
        return {name: arrays[name] for name in ("image", "text")}


def write_shard(
    folder: str,
    shard: int,
    rows: Rows,
    *,
    image: Float16[np.ndarray, "n dim"],
    text: Float16[np.ndarray, "n dim"],
    source: SourceFile,
    teacher: Mapping[str, Any],
    views: ViewEmbeddings | None = None,
) -> None:
    """Write one shard: views, embeddings, then the row table, whose presence says that the shard is finished."""
    assert len(rows) == len(image) == len(text), "one embedding of either kind per row"
    described = teacher_metadata(teacher)
    if views is not None:
        write_views(folder, shard, views, described)
    written = write_tensors(
        files.join(folder, f"{stem(shard)}.safetensors"),
        {"image": image, "text": text},
        {"format": FORMAT_VERSION, "uri": source.uri, "tar_digest": source.sha256, **source.notes, **described},
    )
    status = "truncated" if source.truncated else "complete"
    line = StoreShard(
        index=shard,
        uri=source.uri,
        num_bytes=source.num_bytes,
        num_rows=len(rows),
        key_digest=key_digest(rows.key),
        sha256=written.sha256,
        status=status,
        xxh3=written.xxh3,
    )
    metadata = {name: str(value) for name, value in vars(line).items() if name != "index"}
    write_columns(files.join(folder, f"{stem(shard)}.rows.parquet"), ROWS_SCHEMA, rows.columns(), metadata)


def finished_shard(folder: str, shard: int) -> StoreShard | None:
    """Return what `write_shard` wrote about a shard, or None where it did not finish."""
    path = files.join(folder, f"{stem(shard)}.rows.parquet")
    if not files.exists(path):
        return None
    metadata = read_column_metadata(path)
    with refuse_damage(path):
        return StoreShard(
            index=shard,
            uri=metadata["uri"],
            num_bytes=int(metadata["num_bytes"]),
            num_rows=int(metadata["num_rows"]),
            key_digest=metadata["key_digest"],
            sha256=metadata["sha256"],
            status=metadata["status"],
            xxh3=metadata.get("xxh3"),
        )


def store_files(num_shards: int, *, views: Views | None = None) -> list[str]:
    """Return the names of a finished store's files whose digests its result.json has; the manifest has the others."""
    tables = [f"{stem(shard)}.rows.parquet" for shard in range(num_shards)]
    further = [f"views/{stem(shard)}.safetensors" for shard in range(num_shards)] if views else []
    return ["manifest.parquet", *tables, *further]


def write_manifest(
    folder: str,
    shards: Sequence[StoreShard],
    *,
    dim: int,
    teacher: Mapping[str, Any],
    views: Views | None = None,
    csv_columns: CsvColumns | None = None,
    has_pictures: bool = True,
) -> None:
    """Write the list of a store's shards, all of which must be there: the store is finished.

    `csv_columns` is what was said of the CSV files that it was made from, so that they are read alike later;
    `has_pictures` as in `Store`.
    """
    columns = dict(zip(MANIFEST_SCHEMA.names, zip(*(vars(s).values() for s in shards), strict=True), strict=True))
    metadata = {"dim": str(dim), **teacher_metadata(teacher), **({"views": views.to_json()} if views else {})}
    if csv_columns is not None and csv_columns.is_given:
        metadata["csv_columns"] = json.dumps(dataclasses.asdict(csv_columns))
    if not has_pictures:
        metadata["pictures"] = NOT_KNOWN
    write_columns(files.join(folder, "manifest.parquet"), MANIFEST_SCHEMA, columns, metadata)


def read_shard_rows(folder: str, shard: int) -> Rows:
    """Read the row table of a finished shard, whether or not its store is finished."""
    path = files.join(folder, f"{stem(shard)}.rows.parquet")
    with refuse_damage(path):
        return Rows.of_table(_read_row_table(path, ROWS_SCHEMA.names))


def _read_row_table(path: str, names: Sequence[str]) -> pa.Table:
    """Read some columns of a row table; one of an older version says of no row what it has: its valid rows have all."""
    table = read_columns(path, pa.schema([ROWS_SCHEMA.field(name) for name in names]), optional=_LATER_COLUMNS)
    for at, name in enumerate(names):
        if name in _LATER_COLUMNS and table.column(at).null_count:
            valid = read_columns(path, pa.schema([ROWS_SCHEMA.field("valid")])).column("valid")
            table = table.set_column(at, ROWS_SCHEMA.field(name), valid)
    return table


def check_unchanged(folder: str, line: StoreShard, uri: str) -> None:
    """Raise `InputError` where a local file was written again after its shard was embedded, and holds other bytes.

    `uri` is where the file of the shard lies now. One that has been moved is not read whole for this.
    """
    is_moved = files.absolute(uri) != files.absolute(line.uri)
    if is_moved or uri.endswith("/") or files.is_url(uri) or files.is_url(folder):
        return
    written, embedded = files.modified(uri), files.modified(files.join(folder, f"{stem(line.index)}.rows.parquet"))
    if written is None or embedded is None or written <= embedded:
        return
    expected = read_payload_metadata(folder, line.index).get("tar_digest", "")
    if expected and not digests.is_same(uri, expected):
        raise InputError(
            f"{uri} was written again after {folder} was made from it, with other content (its SHA-256 differs). "
            "Restore the file that was embedded, or embed this one into another --out."
        )


def read_payload_metadata(folder: str, shard: int) -> dict[str, str]:
    """Return what the embeddings of a finished shard say of their teacher and of the file they were made from."""
    with Reader(files.join(folder, f"{stem(shard)}.safetensors")) as reader:
        return read_header(reader).metadata


_EMBED_AGAIN = "Embed the data again, into a new folder."


def teacher_metadata(teacher: Mapping[str, Any]) -> dict[str, str]:
    """Return what describes a teacher as strings, for the metadata of a file."""
    return {
        f"teacher_{key}": str(teacher[key]) for key in (*TEACHER_KEYS, BIAS_KEY) if key in (*TEACHER_KEYS, *teacher)
    }


def teacher_of(metadata: Mapping[str, str]) -> dict[str, Any]:
    """Return what `teacher_metadata` wrote."""
    teacher: dict[str, Any] = {key: metadata[f"teacher_{key}"] for key in TEACHER_KEYS}
    teacher["scale"] = float(teacher["scale"])
    if f"teacher_{BIAS_KEY}" in metadata:
        teacher[BIAS_KEY] = float(metadata[f"teacher_{BIAS_KEY}"])
    return teacher
