"""The row table of a shard of a store: which samples it has, where they lie, and which of them cannot be used."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, UInt8, UInt32, UInt64

ROWS_SCHEMA = pa.schema(
    [
        ("row", pa.uint32()),
        ("key", pa.string()),
        ("offset", pa.uint64()),
        ("size", pa.uint32()),
        ("valid", pa.bool_()),
        ("error", pa.string()),
        ("image_sha256", pa.binary(32)),
    ]
)


@dataclass(frozen=True)
class Rows:
    """The row table of a shard. An unusable row has `valid` false and the reason in `error`.

    `image_sha256` is that of the image file's bytes, zeros where there is none.
    """

    key: list[str]
    offset: UInt64[np.ndarray, " n"]
    size: UInt32[np.ndarray, " n"]
    valid: Bool[np.ndarray, " n"]
    error: list[str]
    image_sha256: UInt8[np.ndarray, "n 32"]

    def __len__(self) -> int:
        return len(self.key)

    @classmethod
    def of_table(cls, table: pa.Table) -> Rows:
        """The rows of a table with `ROWS_SCHEMA`."""
        digests = table.column("image_sha256").combine_chunks().fill_null(bytes(32))
        whole = np.frombuffer(digests.buffers()[1], np.uint8).reshape(-1, 32)
        return cls(
            key=table.column("key").to_pylist(),
            offset=table.column("offset").to_numpy(),
            size=table.column("size").to_numpy(),
            valid=table.column("valid").to_numpy(),
            error=table.column("error").to_pylist(),
            image_sha256=whole[digests.offset : digests.offset + len(digests)],
        )

    def columns(self) -> dict[str, Any]:
        """The columns of `ROWS_SCHEMA`."""
        return {
            "row": np.arange(len(self), dtype=np.uint32),
            "key": self.key,
            "offset": self.offset,
            "size": self.size,
            "valid": self.valid,
            "error": self.error,
            "image_sha256": [digest.tobytes() if digest.any() else None for digest in self.image_sha256],
        }
