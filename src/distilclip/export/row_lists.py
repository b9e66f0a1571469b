"""Write selected rows as lists for other tools: keys, a DataComp subset, clip-retrieval's layout.

A writer is picklable and is called with shard numbers in any process; what an earlier run finished is left as it is.
"""

from __future__ import annotations

import contextlib
import csv
import io
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from distilclip import files
from distilclip.data.shards import read_texts
from distilclip.data.store import stem
from distilclip.export.selection import Selection
from distilclip.export.uids import read_uids, write_subset

METADATA_SCHEMA = pa.schema(
    [("image_path", pa.string()), ("caption", pa.string()), ("shard", pa.uint32()), ("row", pa.uint32())]
)
"""`image_path` is the key, as clip-retrieval has it for webdataset; `shard` and `row` lead back into the store."""


@dataclass(frozen=True, kw_only=True)
class Keys:
    """`num_ambiguous` counts the selected rows whose key another row of the store has too; `plain`: keys.txt exists."""

    num_keys: int
    num_ambiguous: int
    plain: bool


def write_keys(selection: Selection, folder: str) -> Keys:
    """Write `keys.tsv`, and `keys.txt` where keys alone name samples.

    `keys.tsv` has a header line, then `uri`, `row` and `key` of every selected row, tabs between (a value with a tab,
    a quote or a line break is quoted, as in CSV). `keys.txt` is one key per line; it is left out where a selected key
    occurs a second time in the store (keys are not unique across a crawl's tars) or contains a line break.
    """
    store = selection.store
    every, chosen, one_line = [], [], True  # hashes of keys: 8 bytes each instead of a string
    with contextlib.ExitStack() as stack:
        table = stack.enter_context(files.atomic_write(files.join(folder, "keys.tsv")))
        lines = io.TextIOWrapper(table, "utf-8", newline="", write_through=True)
        writer = csv.writer(lines, delimiter="\t", lineterminator="\n")
        writer.writerow(["uri", "row", "key"])
        for shard in range(store.num_shards):
            rows, selected = store.rows(shard), selection.rows(shard)
            every.append(np.array([hash(key) for key in rows.key], np.int64))
            chosen.append(every[-1][selected.row])
            one_line = one_line and not any(set("\r\n") & set(key) for key in selected.key)
            writer.writerows((selected.uri, row, key) for row, key in zip(selected.row, selected.key, strict=True))
        lines.detach()
    values, counts = np.unique(np.concatenate(every), return_counts=True)
    num_ambiguous = int(np.isin(np.concatenate(chosen), values[counts > 1]).sum())
    plain = one_line and num_ambiguous == 0
    if plain:
        _write_plain(folder)
    return Keys(num_keys=sum(map(len, chosen)), num_ambiguous=num_ambiguous, plain=plain)


def _write_plain(folder: str) -> None:
    """Write `keys.txt` from `keys.tsv`, so that no shard is read a second time."""
    with (
        files.open_read(files.join(folder, "keys.tsv")) as table,
        files.atomic_write(files.join(folder, "keys.txt")) as file,
    ):
        for line in csv.DictReader(io.TextIOWrapper(table, "utf-8", newline=""), delimiter="\t"):
            file.write(f"{line['key']}\n".encode())


@dataclass(frozen=True)
class UidWriter:
    """Writes the uids of a shard's selected rows into `uids`, from which `join_uids` makes the subset."""

    selection: Selection
    folder: str

    def __call__(self, shard: int) -> int:
        """Write the uids of a shard; return their number."""
        path = _uids_path(self.folder, shard)
        if files.exists(path):
            return len(_read_array(path))
        rows = self.selection.rows(shard)
        uids = read_uids(
            rows.uri,
            rows.key,
            rows.offset,
            rows.size,
            kind=self.selection.uid,
            columns=self.selection.store.csv_columns,
        )
        with files.atomic_write(path) as file:
            np.save(file, uids)
        return len(uids)


def join_uids(folder: str, num_shards: int) -> int:
    """Write `subset.npy` from the uids of all shards; return the number of different ones."""
    uids = np.concatenate([_read_array(_uids_path(folder, shard)) for shard in range(num_shards)])
    return write_subset(files.join(folder, "subset.npy"), uids)


def _uids_path(folder: str, shard: int) -> str:
    return files.join(folder, "uids", f"{stem(shard)}.npy")


def _read_array(path: str) -> Any:
    with files.open_read(path) as file:
        return np.load(file)


@dataclass(frozen=True)
class PartitionWriter:
    """Writes the selected rows of a shard as one partition of clip-retrieval: `.npy` files, and Parquet with captions.

    Source: rom1504/clip-retrieval, clip_inference/writer.py. autofaiss and embedding-reader read the same folders.
    """

    selection: Selection
    folder: str
    sides: tuple[str, ...] = ("image", "text")
    """the embeddings that any row of the store has"""

    def __call__(self, shard: int) -> int:
        """Write a partition; return its number of rows. A shard without any has no files: their readers expect rows.

        The metadata come last: a partition that has them is finished.
        """
        number = str(shard).zfill(len(str(self.selection.store.num_shards)))
        metadata = files.join(self.folder, "metadata", f"metadata_{number}.parquet")
        if files.exists(metadata):
            with files.open_read(metadata) as file:
                return int(pq.ParquetFile(file).metadata.num_rows)
        rows = self.selection.rows(shard)
        if not len(rows):
            return 0
        store = self.selection.store
        for side, folder, read in (("image", "img_emb", store.image), ("text", "text_emb", store.text)):
            if side not in self.sides:
                continue
            embeddings = read(shard)
            with files.atomic_write(files.join(self.folder, folder, f"{folder}_{number}.npy")) as file:
                np.save(file, embeddings[rows.row])
        texts = read_texts(rows.uri, rows.key, rows.offset, rows.size, columns=self.selection.store.csv_columns)
        columns = {
            "image_path": rows.key,
            "caption": [text.caption for text in texts],
            "shard": np.full(len(rows), shard, np.uint32),
            "row": rows.row,
        }
        with files.atomic_write(metadata) as file:
            pq.write_table(pa.table(columns, schema=METADATA_SCHEMA), file, compression="zstd")
        return len(rows)
