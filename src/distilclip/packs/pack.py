"""Write and read a pack: rows to train on, shuffled once, each with all that training needs of it, in Arrow files.

A *packet* is a few rows side by side: one record batch of a shard, read by one request and compared with its digest.
All that a process knows of the rows is where each packet lies: the index, which the processes of a machine map into
memory.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash
from jaxtyping import Bool, Float16, Int32, Int64, UInt64

from distilclip import digests, files
from distilclip.data.columns import FORMAT_VERSION, refuse_damage
from distilclip.data.reader import shared_copy
from distilclip.data.store import StoredTeacher, teacher_metadata, teacher_of
from distilclip.data.tensors import read_metadata, read_tensors, write_tensors
from distilclip.data.views import Views
from distilclip.errors import InputError, other_version

INDEX_FILE = "index.safetensors"
_MAGIC = 8  # bytes before the schema of an Arrow file
_VERSION_KEY = "distilclip.format"


def shard_name(shard: int) -> str:
    """Return the name of a shard within a pack."""
    return f"shards/{shard:06d}.arrow"


def pack_schema(dim: int, num_views: int) -> pa.Schema:
    """Return the columns of a shard; those of views only where there are some."""
    fields = [
        ("id", pa.uint64()),
        ("image", pa.large_binary()),
        ("captions", pa.list_(pa.string())),
        ("image_embedding", pa.list_(pa.float16(), dim)),
        ("text_embedding", pa.list_(pa.float16(), dim)),
        ("cluster", pa.int32()),
        ("is_resized", pa.bool_()),
    ]
    if num_views:
        fields += [
            ("view_embeddings", pa.list_(pa.float16(), num_views * dim)),
            ("other_embeddings", pa.list_(pa.list_(pa.float16(), dim))),
        ]
    return pa.schema(fields, metadata={_VERSION_KEY: FORMAT_VERSION})


@dataclass(frozen=True, kw_only=True)
class PackedRows:
    """n rows of a pack. A row that lacks its picture has the image None; one that lacks its caption has no captions.

    `id` is the sample id in the store that the pack was made from, `cluster` -1 where there is none. `is_resized` says
    that the picture was made smaller. Embeddings are zeros where the row lacks what they are of. With m views,
    `view_embeddings` are those of the picture's views, and `other_embeddings[other_first[i] : other_first[i + 1]]` are
    those of row i's captions after the first.
    """

    id: UInt64[np.ndarray, " n"]
    image: Sequence[bytes | None]
    captions: Sequence[list[str]]
    image_embedding: Float16[np.ndarray, "n dim"]
    text_embedding: Float16[np.ndarray, "n dim"]
    cluster: Int32[np.ndarray, " n"]
    is_resized: Bool[np.ndarray, " n"]
    view_embeddings: Float16[np.ndarray, "n m dim"] | None = None
    other_embeddings: Float16[np.ndarray, "t dim"] | None = None
    other_first: Int64[np.ndarray, " n1"] | None = None

    def __len__(self) -> int:
        return len(self.id)

    def to_batch(self, schema: pa.Schema) -> pa.RecordBatch:
        """Return the rows as a record batch."""
        columns: dict[str, Any] = dict(vars(self))
        for name in ("image_embedding", "text_embedding", "view_embeddings"):
            if name in schema.names:
                columns[name] = _vectors(columns[name].reshape(len(self), -1))
        if "other_embeddings" in schema.names:
            starts = pa.array(columns["other_first"], pa.int32())
            columns["other_embeddings"] = pa.ListArray.from_arrays(starts, _vectors(columns["other_embeddings"]))
        arrays = [columns[field.name] for field in schema]
        kinds = [field.type for field in schema]
        return pa.record_batch(
            [a if isinstance(a, pa.Array) else pa.array(a, kind) for a, kind in zip(arrays, kinds, strict=True)],
            schema=schema,
        )

    @classmethod
    def of_batch(cls, batch: pa.RecordBatch) -> PackedRows:
        """Return the rows of a record batch of `pack_schema`."""
        views = {}
        dim = batch.schema.field("image_embedding").type.list_size
        if "view_embeddings" in batch.schema.names:
            others = batch.column("other_embeddings")
            starts = others.offsets.to_numpy().astype(np.int64)
            views = {
                "view_embeddings": _matrix(batch.column("view_embeddings")).reshape(len(batch), -1, dim),
                "other_embeddings": _matrix(others.flatten(), dim),
                "other_first": starts - starts[0],
            }
        return cls(
            id=batch.column("id").to_numpy(),
            image=[None if picture is None else picture.as_py() for picture in _pictures(batch.column("image"))],
            captions=batch.column("captions").to_pylist(),
            image_embedding=_matrix(batch.column("image_embedding")),
            text_embedding=_matrix(batch.column("text_embedding")),
            cluster=batch.column("cluster").to_numpy(),
            is_resized=batch.column("is_resized").to_numpy(zero_copy_only=False),
            **views,
        )


def _pictures(column: pa.LargeBinaryArray) -> list[Any]:
    return [value if value.is_valid else None for value in column]


def _vectors(values: Float16[np.ndarray, "n width"]) -> pa.FixedSizeListArray:
    return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(values).reshape(-1)), values.shape[1])


def _matrix(column: pa.FixedSizeListArray, width: int | None = None) -> Float16[np.ndarray, "n width"]:
    return column.flatten().to_numpy().reshape(len(column), width or column.type.list_size)


@dataclass(frozen=True, kw_only=True)
class RowCounts:
    """How many rows have a picture, a caption, and both; and how many pictures were made smaller."""

    num_images: int
    num_texts: int
    num_pairs: int
    num_resized: int

    @classmethod
    def of_table(cls, table: pa.Table) -> RowCounts:
        """Count the rows of a table with the columns of a shard."""
        has_image = np.asarray(table["image"].is_valid())
        has_text = np.asarray(pc.list_value_length(table["captions"])) > 0
        flags = (has_image, has_text, has_image & has_text, np.asarray(table["is_resized"]))
        return cls(**{f.name: int(flag.sum()) for f, flag in zip(dataclasses.fields(cls), flags, strict=True)})

    @classmethod
    def total(cls, counts: Sequence[RowCounts]) -> RowCounts:
        """Return the sums of several."""
        return cls(**{f.name: sum(getattr(each, f.name) for each in counts) for f in dataclasses.fields(cls)})


@dataclass(frozen=True, kw_only=True)
class ShardPackets:
    """The packets of a shard: the place of each in the file, its XXH3 of 64 bits; and the SHA-256 of the file."""

    num_rows: int
    counts: RowCounts
    start: Int64[np.ndarray, " packets"]
    size: Int32[np.ndarray, " packets"]
    digest: UInt64[np.ndarray, " packets"]
    sha256: str


def write_packets(path: str, batches: Iterable[pa.RecordBatch], schema: pa.Schema) -> None:
    """Write a shard, a packet for each record batch."""
    with files.atomic_write(path) as file, pa.ipc.new_file(pa.PythonFile(file, "w"), schema) as writer:
        for batch in batches:
            writer.write_batch(batch)


def find_packets(path: str, schema: pa.Schema) -> ShardPackets:
    """Read a shard, and say where its packets lie. Raises `InputError` where it is cut or of another schema."""
    content, batches = memoryview(files.read_bytes(path)), []
    start, size, digest = [], [], []
    with refuse_damage(path):
        source = pa.BufferReader(content)
        source.seek(_MAGIC)
        found = pa.ipc.read_schema(source)
        if not found.equals(schema, check_metadata=True):
            raise InputError(
                f"{path} is a shard of another pack or version. Remove it, and run `distilclip pack` again."
            )
        for place, message in _messages(source):
            batches.append(pa.ipc.read_record_batch(message, schema))
            start.append(place)
            size.append(source.tell() - place)
            digest.append(xxhash.xxh3_64_intdigest(content[place : source.tell()]))
    table = pa.Table.from_batches(batches, schema)
    return ShardPackets(
        num_rows=len(table),
        counts=RowCounts.of_table(table.select(["image", "captions", "is_resized"])),
        start=np.array(start, np.int64),
        size=np.array(size, np.int32),
        digest=np.array(digest, np.uint64),
        sha256=hashlib.sha256(content).hexdigest(),
    )


def _messages(source: pa.BufferReader) -> Iterator[tuple[int, Any]]:
    """Yield the record batches from here on, each with its place; the source stands behind it then."""
    while True:
        place = source.tell()
        try:
            message = pa.ipc.read_message(source)
        except EOFError:  # the end mark
            return
        yield place, message


@dataclass(frozen=True, kw_only=True)
class PackFacts:
    """What the index says of a pack besides the places of its packets.

    `packet_rows` are the rows of each packet but the last of a shard. Of pictures that were made smaller, the shorter
    side has `max_side` pixels.
    """

    packet_rows: int
    max_side: int
    has_clusters: bool
    counts: RowCounts

    def to_metadata(self) -> dict[str, str]:
        """Return the values as strings."""
        values = {"packet_rows": self.packet_rows, "max_side": self.max_side, "has_clusters": self.has_clusters}
        return {name: str(int(value)) for name, value in {**values, **vars(self.counts)}.items()}

    @classmethod
    def of_metadata(cls, metadata: Mapping[str, str]) -> PackFacts:
        """Return what `to_metadata` wrote."""
        return cls(
            packet_rows=int(metadata["packet_rows"]),
            max_side=int(metadata["max_side"]),
            has_clusters=metadata["has_clusters"] == "1",
            counts=RowCounts(**{f.name: int(metadata[f.name]) for f in dataclasses.fields(RowCounts)}),
        )


def write_index(folder: str, shards: Sequence[ShardPackets], facts: PackFacts, *, teacher: StoredTeacher) -> None:
    """Write where the packets of all shards lie, what the pack is, and whose embeddings it holds."""
    views = {} if teacher.views is None else {"views": teacher.views.to_json()}
    described = {"dim": str(teacher.dim), **teacher_metadata(teacher.teacher), **views, **facts.to_metadata()}
    write_tensors(
        files.join(folder, INDEX_FILE),
        {
            "num_rows": np.array([shard.num_rows for shard in shards], np.int64),
            "num_packets": np.array([len(shard.start) for shard in shards], np.int64),
            "start": np.concatenate([shard.start for shard in shards]),
            "digest": np.concatenate([shard.digest for shard in shards]).view(np.int64),
            "size": np.concatenate([shard.size for shard in shards]),
        },
        {"format": FORMAT_VERSION, **described},
    )


@dataclass(frozen=True, eq=False)
class Pack(StoredTeacher):
    """A finished pack, opened for reading: 20 bytes for each packet, in a memory map that all processes share.

    `first_row` and `first_packet` are those of each shard, and after the last one their numbers in all.
    """

    path: str
    dim: int
    teacher: dict[str, Any]
    views: Views | None
    facts: PackFacts
    first_row: Int64[np.ndarray, " shards1"]
    first_packet: Int64[np.ndarray, " shards1"]
    start: Int64[np.ndarray, " packets"]
    size: Int32[np.ndarray, " packets"]
    digest: Int64[np.ndarray, " packets"]

    @classmethod
    def open(cls, path: str) -> Pack:
        """Open a pack by its folder; the index of a remote one is copied to this machine.

        Raises:
            InputError: there is none, it is damaged, or its format version is unknown.
        """
        index = files.join(path, INDEX_FILE)
        if not files.exists(index):
            raise InputError(f"{path} is no pack (no {INDEX_FILE}): run `distilclip pack --out {path}`.")
        digests.check_file(path, INDEX_FILE, remedy=digests.repair_with(path, "pack"))
        if files.is_url(path):
            index = shared_copy(index) or index
        metadata = read_metadata(index)
        if metadata.get("format") != FORMAT_VERSION:
            raise other_version(index, metadata.get("format"), known=FORMAT_VERSION)
        arrays = read_tensors(index)
        first = {name: np.concatenate([[0], np.cumsum(arrays[f"num_{name}s"])]) for name in ("row", "packet")}
        return cls(
            path,
            int(metadata["dim"]),
            teacher_of(metadata),
            Views.from_json(metadata["views"]) if "views" in metadata else None,
            PackFacts.of_metadata(metadata),
            first["row"],
            first["packet"],
            arrays["start"],
            arrays["size"],
            arrays["digest"],
        )

    @property
    def num_rows(self) -> int:
        """Number of rows of all shards."""
        return int(self.first_row[-1])

    @property
    def num_packets(self) -> int:
        """Number of packets of all shards."""
        return int(self.first_packet[-1])

    @property
    def schema(self) -> pa.Schema:
        """The columns of every shard."""
        return pack_schema(self.dim, 0 if self.views is None else self.views.num)

    def first_rows(self, packets: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
        """Return the first row of n packets; that of the packet after the last one is the number of rows."""
        shard = np.searchsorted(self.first_packet, packets, side="right") - 1
        shard = np.minimum(shard, len(self.first_packet) - 1)
        return self.first_row[shard] + (packets - self.first_packet[shard]) * self.facts.packet_rows

    def packets_of(self, rows: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
        """Return the packets that n rows lie in."""
        shard = np.searchsorted(self.first_row, rows, side="right") - 1
        return self.first_packet[shard] + (rows - self.first_row[shard]) // self.facts.packet_rows

    def place(self, packet: int) -> tuple[int, int, int]:
        """Return where a packet lies: its shard, its first byte, and its number of bytes."""
        shard = int(np.searchsorted(self.first_packet, packet, side="right")) - 1
        return shard, int(self.start[packet]), int(self.size[packet])

    def decode(self, packet: int, content: bytes) -> PackedRows:
        """Return the rows of a packet from its bytes. Raises `InputError` where these are not what was written."""
        if xxhash.xxh3_64_intdigest(content) != int(self.digest[packet]) % 2**64:
            path = files.join(self.path, shard_name(self.place(packet)[0]))
            raise InputError(
                digests.describe_change(path, digests.repair_with(self.path, "pack")(), what=f" in packet {packet}")
            )
        return PackedRows.of_batch(pa.ipc.read_record_batch(pa.py_buffer(content), self.schema))
