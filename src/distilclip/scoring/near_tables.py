"""Write and read which pictures that the data was compared with have a near copy in it: `near/NN.parquet` of select."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from jaxtyping import Float32, UInt32, UInt64

from distilclip import digests, files
from distilclip.data.columns import read_columns, write_columns

NEAR_SCHEMA = pa.schema(
    [
        ("picture", pa.uint32()),
        ("uri", pa.string()),
        ("key", pa.string()),
        ("offset", pa.uint64()),
        ("size", pa.uint32()),
        ("nearest", pa.uint64()),
        ("similarity", pa.float32()),
    ]
)


@dataclass(frozen=True, kw_only=True)
class NearPictures:
    """The pictures of one target that have a near row in the store, ascending by their place among its pictures.

    Each lies in `uri`, under `key` at `offset` where that is a shard. `nearest` is the sample id of the row with the
    largest cosine to it, `similarity`.
    """

    picture: UInt32[np.ndarray, " m"]
    uri: list[str]
    key: list[str]
    offset: UInt64[np.ndarray, " m"]
    size: UInt32[np.ndarray, " m"]
    nearest: UInt64[np.ndarray, " m"]
    similarity: Float32[np.ndarray, " m"]


def near_name(number: int) -> str:
    """Return the name of the table of a target within a folder of `select`."""
    return f"near/{number:02d}.parquet"


def write_near(folder: str, number: int, near: NearPictures) -> None:
    """Write the table of a target."""
    write_columns(files.join(folder, near_name(number)), NEAR_SCHEMA, vars(near))


def read_near(folder: str, number: int) -> NearPictures:
    """Read the table of a target."""
    digests.check_file(folder, near_name(number), remedy=digests.repair_with(folder, "select"))
    table = read_columns(files.join(folder, near_name(number)), NEAR_SCHEMA)
    columns = {
        name: table[name].to_pylist() if name in ("uri", "key") else table[name].to_numpy()
        for name in NEAR_SCHEMA.names
    }
    return NearPictures(**columns)
