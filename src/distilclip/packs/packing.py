"""Shuffle the kept rows of a store into the shards of a pack, in two passes that read and write files in order.

The first pass reads a part of the store, some of its shards, and writes its rows sorted by the shard that each is drawn
into. The second reads, for each shard of the pack, what every part has for it, shuffles that, and writes it in packets.
As every row draws its shard alike, and every order inside a shard is as likely, so is every order of all rows.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Int64

from distilclip import files
from distilclip.data.decode import shrink_picture
from distilclip.data.pairs import Index, assert_image, check_source, clusters_of_rows, unlabelled
from distilclip.data.samples import BadSample, Sample, judge_memory
from distilclip.data.shards import Shard, assert_key, opened_whole
from distilclip.data.side_files import kept_rows
from distilclip.data.store import Store, not_unit, sample_id
from distilclip.data.tensors import read_tensors, write_tensors
from distilclip.errors import InputError
from distilclip.packs.pack import (
    PackedRows,
    ShardPackets,
    find_packets,
    pack_schema,
    shard_name,
    write_packets,
)

Part = tuple[int, int, int]
"""A part's number, its first shard of the store, and the one after its last."""


@dataclass(frozen=True, kw_only=True)
class Packing:
    """What to pack, and how; travels to workers. `uris` are where the shards of the store lie now.

    The pictures become JPEGs of `quality` whose shorter side is `max_side` pixels, where it was longer. `num_shards`
    is that of the pack; each packet has `packet_rows` rows.
    """

    folder: str
    store: str
    uris: Sequence[str]
    groups: str | None
    clusters: str | None
    seed: int
    max_side: int
    quality: int
    max_pixels: int
    packet_rows: int
    num_shards: int = 0

    def schema(self, store: Store) -> pa.Schema:
        """Return the columns of the pack."""
        return pack_schema(store.dim, 0 if store.views is None else store.views.num)

    def count(self, store: Store) -> Int64[np.ndarray, " shards"]:
        """Return how many rows of each shard of the store are packed."""
        with ThreadPoolExecutor(16) as pool:  # each shard of a remote store takes a few requests
            return np.array(list(pool.map(lambda shard: int(self._kept(store, shard).sum()), range(store.num_shards))))

    def _kept(self, store: Store, shard: int) -> Bool[np.ndarray, " r"]:
        table = store.columns(shard, "valid", "has_image", "has_text")
        valid, has_image, has_text = (table[name].to_numpy() for name in table.column_names)
        return kept_rows(store, shard, valid, self.groups) & (has_image | has_text)

    def gather(self, part: Part) -> None:
        """Write the rows of a part, sorted by their shard of the pack, unless they are there."""
        number, first, after = part
        place = _place_name(self.folder, number)
        if not files.exists(place):
            store = Store.open(self.store)
            found = [self._gather_shard(store, shard) for shard in range(first, after)]
            goes_to = np.concatenate([goes for _, goes in found])
            batch = _joined([rows.to_batch(self.schema(store)) for rows, _ in found])
            order = np.argsort(goes_to, kind="stable")
            bounds = np.searchsorted(goes_to[order], np.arange(self.num_shards + 1)).tolist()
            start = [0]
            with files.atomic_write(_part_name(self.folder, number)) as file:
                for low, high in itertools.pairwise(bounds):
                    start.append(start[-1] + file.write(batch.take(pa.array(order[low:high])).serialize()))
            write_tensors(place, {"start": np.array(start, np.int64)}, {})

    def _gather_shard(self, store: Store, shard: int) -> tuple[PackedRows, Int64[np.ndarray, " n"]]:
        """Read the kept rows of a shard; return them, and the shard of the pack that each goes to."""
        uri, index, keep = self.uris[shard], Index.read(store, shard), self._kept(store, shard)
        check_source(store, shard, uri, index)
        row = np.flatnonzero(keep)
        cluster = np.full(len(row), -1, np.int32)
        if self.clusters is not None:
            cluster = clusters_of_rows(self.clusters, shard, keep)
            missing = (cluster < 0) & index.has_image[keep]
            if missing.any():
                raise unlabelled(self.clusters, shard=shard, row=int(row[np.argmax(missing)]))
        images: list[bytes | None] = []
        captions, resized = [], []
        with opened_whole(uri, store.csv_columns) as source:
            for number in row.tolist():
                sample = _read(source, index, number, uri=uri)
                image = sample.image if index.has_image[number] else None
                smaller = None if image is None else self._shrink(image)
                images.append(smaller or image)
                resized.append(smaller is not None)
                captions.append(_captions(sample, several=store.views is not None) if index.has_text[number] else [])
        rows = PackedRows(
            id=sample_id(shard, row),
            image=images,
            captions=captions,
            image_embedding=_unit(store, shard, "image", keep, index.has_image[keep]),
            text_embedding=_unit(store, shard, "text", keep, index.has_text[keep]),
            cluster=cluster,
            is_resized=np.array(resized, bool),
        )
        rows = rows if store.views is None else _with_views(rows, store, shard, row)
        generator = np.random.Generator(np.random.PCG64([self.seed, shard]))
        return rows, generator.integers(self.num_shards, size=len(row))

    def _shrink(self, image: bytes) -> bytes | None:
        """Return a smaller picture, None where it is small or cannot be decoded: who trains on it says so."""
        try:
            with judge_memory():
                return shrink_picture(image, max_side=self.max_side, quality=self.quality, max_pixels=self.max_pixels)
        except BadSample:
            return None

    def scatter(self, num_parts: int, shard: int) -> ShardPackets:
        """Write a shard of the pack from what `num_parts` parts have for it, unless it is there; say what is where."""
        path, schema = files.join(self.folder, shard_name(shard)), self.schema(Store.open(self.store))
        if not files.exists(path):
            batch = _joined([_read_part(self.folder, part, shard, schema) for part in range(num_parts)])
            generator = np.random.Generator(np.random.PCG64([self.seed, shard, 1]))
            batch = batch.take(pa.array(generator.permutation(len(batch))))
            starts = range(0, len(batch), self.packet_rows)
            write_packets(path, (batch.slice(start, self.packet_rows) for start in starts), schema)
        return find_packets(path, schema)


PARTS = "parts"
"""The folder of what the first pass writes, while the stage runs."""


def _part_name(folder: str, part: int) -> str:
    return files.join(folder, PARTS, f"{part:06d}.arrow")


def _place_name(folder: str, part: int) -> str:
    """Return where it says at which byte the rows for each shard begin; written last, so that the part is whole."""
    return files.join(folder, PARTS, f"{part:06d}.safetensors")


def _read_part(folder: str, part: int, shard: int, schema: pa.Schema) -> pa.RecordBatch:
    """Read the rows that a part has for a shard of the pack."""
    start, after = read_tensors(_place_name(folder, part))["start"][shard : shard + 2].tolist()
    content = files.read_range(_part_name(folder, part), start, after - start)
    return pa.ipc.read_record_batch(pa.py_buffer(content), schema)


def _joined(batches: Sequence[pa.RecordBatch]) -> pa.RecordBatch:
    """Join record batches, of which there is one at least, into one."""
    return next(iter(pa.Table.from_batches(batches).combine_chunks().to_batches()), batches[0])


def _read(source: Shard, index: Index, row: int, *, uri: str) -> Sample:
    """Read a sample. Raises `InputError` where it is not the one that was embedded."""
    key = index.key[row].as_py()
    try:
        sample = source.read(int(index.offset[row]), int(index.size[row]))
    except BadSample as error:
        raise InputError(
            f"{uri}: {key} could be read when it was embedded, and now cannot ({error}). Give the files that were "
            "embedded (--data), or embed these into another folder."
        ) from error
    assert_key(sample.key, key, uri=uri, row=row)
    assert_image(sample.image, int(index.image_digest[row]), where=f"{uri}: {key}")
    return sample


def _captions(sample: Sample, *, several: bool) -> list[str]:
    captions = [] if sample.caption is None else [sample.caption]
    return (sample.captions or captions) if several else captions


def _unit(
    store: Store, shard: int, side: str, keep: Bool[np.ndarray, " r"], there: Bool[np.ndarray, " n"]
) -> np.ndarray:
    """Return the embeddings of the kept rows. Raises `InputError` where one that must be there is no unit vector."""
    found = (store.image(shard) if side == "image" else store.text(shard))[keep]
    wrong = not_unit(found) & there
    if wrong.any():
        row = int(np.flatnonzero(keep)[np.argmax(wrong)])
        raise InputError(
            f"{store.path}: the {side} embedding of shard {shard}, row {row} is not a finite unit vector. The store is "
            "damaged: embed the data again, into a new folder."
        )
    return found


def _with_views(rows: PackedRows, store: Store, shard: int, row: Int64[np.ndarray, " n"]) -> PackedRows:
    """Return the rows with the embeddings of their views and of their further captions."""
    views = store.view_embeddings(shard)
    first, after = views.text_first[row], views.text_first[row + 1]
    others = after - first
    for at, captions in enumerate(rows.captions):
        if max(1, len(captions)) != 1 + others[at]:
            raise InputError(
                f"{store.path}: row {row[at]} of shard {shard} has other captions than when it was embedded. Embed the "
                "data again."
            )
    spans = [np.arange(*span) for span in zip(first.tolist(), after.tolist(), strict=True)]
    return dataclasses.replace(
        rows,
        view_embeddings=views.image[row],
        other_embeddings=views.text[np.concatenate([np.empty(0, np.int64), *spans])],
        other_first=np.concatenate([[0], np.cumsum(others)]),
    )
