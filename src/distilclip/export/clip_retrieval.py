"""Embeddings as clip-retrieval writes them: `.npy` files, and Parquet with the rows' names and captions.

Source: rom1504/clip-retrieval, clip_inference/writer.py. autofaiss and embedding-reader read the same folders.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from distilclip import files
from distilclip.data.shards import read_texts
from distilclip.export.selection import Selection

METADATA_SCHEMA = pa.schema(
    [("image_path", pa.string()), ("caption", pa.string()), ("shard", pa.uint32()), ("row", pa.uint32())]
)
"""`image_path` is the key, as clip-retrieval has it for webdataset; `shard` and `row` lead back into the store."""


@dataclass(frozen=True)
class PartitionWriter:
    """Writes the selected rows of a shard as one partition; picklable, called with shard numbers in any process."""

    selection: Selection
    folder: str

    def __call__(self, shard: int) -> int:
        """The number of rows written. A shard without any has no files, since their readers expect rows.

        The metadata come last: a partition that has them is finished and left as it is.
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
        for folder, embeddings in (("img_emb", store.image(shard)), ("text_emb", store.text(shard))):
            with files.atomic_write(files.join(self.folder, folder, f"{folder}_{number}.npy")) as file:
                np.save(file, embeddings[rows.row])
        columns = {
            "image_path": rows.key,
            "caption": [text.caption for text in read_texts(rows.uri, rows.key, rows.offset, rows.size)],
            "shard": np.full(len(rows), shard, np.uint32),
            "row": rows.row,
        }
        with files.atomic_write(metadata) as file:
            pq.write_table(pa.table(columns, schema=METADATA_SCHEMA), file, compression="zstd")
        return len(rows)
