"""Write selected rows as DataComp's metadata: embeddings as .npz, and beside each a Parquet file with uids and texts.

Source: mlfoundations/datacomp, baselines/apply_filter.py, which reads `l14_img` of NAME.npz by the rows of
NAME.parquet.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from distilclip import files
from distilclip.data.shards import Text, read_texts
from distilclip.data.store import stem
from distilclip.export.selection import Selection
from distilclip.export.uids import uid_of

OWN_SCHEMA = pa.schema(
    [
        ("uid", pa.string()),
        ("url", pa.string()),
        ("text", pa.string()),
        ("original_width", pa.int64()),
        ("original_height", pa.int64()),
        ("sha256", pa.string()),
        ("key", pa.string()),
        ("shard", pa.uint32()),
        ("row", pa.uint32()),
    ]
)
"""`key`, `shard` and `row` lead back to the store; DataComp has the others, and a score."""


@dataclass(frozen=True)
class MetadataWriter:
    """Writes the selected rows of a shard as one pair of files; the Parquet file last, which says that both are there.

    `name` is that of the model in the names of arrays and of the score, such as `l14`; `sides` are the embeddings that
    any row of the store has. Picklable; called with shard numbers in any process. What an earlier run finished is left
    as it is.
    """

    selection: Selection
    folder: str
    name: str
    sides: tuple[str, ...] = ("image", "text")

    def __call__(self, shard: int) -> int:
        """Write a pair of files; return its number of rows. A shard without any has no files."""
        path = files.join(self.folder, "metadata", stem(shard))
        if files.exists(f"{path}.parquet"):
            with files.open_read(f"{path}.parquet") as file:
                return int(pq.ParquetFile(file).metadata.num_rows)
        rows, store = self.selection.rows(shard), self.selection.store
        if not len(rows):
            return 0
        readers = (("image", "img", store.image), ("text", "txt", store.text))
        arrays = {f"{self.name}_{word}": read(shard)[rows.row] for side, word, read in readers if side in self.sides}
        with files.atomic_write(f"{path}.npz") as file:
            np.savez(file, **arrays)
        texts = list(read_texts(rows.uri, rows.key, rows.offset, rows.size, columns=store.csv_columns))
        columns: dict[str, Any] = {
            "uid": [self._uid(key, text, uri=rows.uri) for key, text in zip(rows.key, texts, strict=True)],
            "url": [_text_of(text, "url") for text in texts],
            "text": [text.caption for text in texts],
            "original_width": [_number_of(text, "original_width") for text in texts],
            "original_height": [_number_of(text, "original_height") for text in texts],
            "sha256": [digest.tobytes().hex() if digest.any() else None for digest in rows.image_sha256],
            "key": rows.key,
            "shard": np.full(len(rows), shard, np.uint32),
            "row": rows.row,
        }
        table = pa.table(columns, schema=OWN_SCHEMA)
        if len(arrays) == 2:
            image, text = (array.astype(np.float32) for array in arrays.values())
            score = pa.array((image * text).sum(axis=1), mask=~(image.any(axis=1) & text.any(axis=1)))
            table = table.append_column(f"clip_{self.name}_similarity_score", score)
        with files.atomic_write(f"{path}.parquet") as file:
            pq.write_table(table, file, compression="zstd")
        return len(rows)

    def _uid(self, key: str, text: Text, *, uri: str) -> str:
        return f"{uid_of(key, text, kind=self.selection.uid, where=f'{uri}: {key}'):032x}"


def _text_of(text: Text, name: str) -> str | None:
    value = text.meta.get(name)
    return value if isinstance(value, str) else None


def _number_of(text: Text, name: str) -> int | None:
    value = text.meta.get(name)
    return value if isinstance(value, int) else None
