"""Made-up CSV and Parquet files of pairs, and damaged ones."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st

from distilclip.data.samples import BadSample, decode_image
from distilclip.data.shards import open_shard
from tests.conftest import encoded, picture
from tests.faults.fuzz_runner import Door, Lost, damaged

PICTURE = encoded(picture(0))
PLANTED = "planted{}.jpg"


def read_all(path: Path) -> list[str]:
    """Read every row of a table; the keys of its index. Each row is read or skipped with a reason."""
    shard = open_shard(str(path))
    entries = shard.index()
    num_read = num_skipped = 0
    for entry in entries:
        try:
            if entry.error:
                raise BadSample(entry.error)
            sample = shard.read(entry.offset, entry.size)
            if sample.image is not None:
                decode_image(sample.image)
            num_read += 1
        except BadSample as bad:
            num_skipped += 1
            if not bad.reason:
                raise Lost("a row without a reason") from bad
    shard.close()
    if num_read + num_skipped != len(entries):
        raise Lost(f"{len(entries)} rows, {num_read} read, {num_skipped} skipped")
    return [entry.key for entry in entries]


_VALUES = st.one_of(
    st.sampled_from(
        ["here.jpg", "nowhere.jpg", "", '"', '"open', 'a "quoted" word', '"a, b"', "a\0b", "../..", "x" * 5000, "=1+1"]
    ),
    st.text(max_size=20),
)
_LINES = st.lists(_VALUES, min_size=1, max_size=4)


@st.composite
def csvs(draw: Callable[..., Any]) -> tuple[bytes, int]:
    """A CSV with rows of all kinds, and how many good rows are planted in it, each on a line of its own."""
    separator = draw(st.sampled_from([",", "\t", ";", "|"]))
    header = draw(
        st.sampled_from(
            [["filepath", "caption"]] * 6 + [["caption", "filepath", "label"], ["title", "url"], ["a", "b"]]
        )
    )
    lines, planted = [separator.join(header)], 0
    for values in draw(st.lists(_LINES, max_size=8)):
        lines.append(separator.join(values))
        if draw(st.booleans()):
            row = {"filepath": PLANTED.format(planted), "caption": "a fine one", "label": "1"}
            lines.append(separator.join(row.get(name, "x") for name in header))
            planted += 1
    end = draw(st.sampled_from(["\n", "\n", "\r\n"]))
    encoding = draw(st.sampled_from(["utf-8", "utf-8", "utf-8-sig"]))
    content = end.join(lines).encode(encoding, "surrogatepass") + end.encode()
    if draw(st.integers(0, 4)) == 0:
        return draw(damaged(st.just(content))), 0
    return content, planted if "filepath" in header else 0


def read_csv(case: tuple[bytes, int], folder: Path) -> bool:
    """Read a CSV; no planted row may be missing, whatever stands before it."""
    content, planted = case
    (folder / "here.jpg").write_bytes(PICTURE)
    path = folder / "case.csv"
    path.write_bytes(content)
    keys = read_all(path)
    missing = [PLANTED.format(n) for n in range(planted) if PLANTED.format(n) not in keys]
    if missing:
        raise Lost(f"the row of {missing[0]} is missing")
    return True


_IMAGES: list[Any] = [PICTURE, PICTURE[:200], b"", None]
_COLUMNS: dict[str, st.SearchStrategy[Any]] = {
    "image": st.one_of(
        st.lists(st.sampled_from(_IMAGES), min_size=2, max_size=2).map(lambda v: pa.array(v, pa.binary())),
        st.lists(st.sampled_from(_IMAGES), min_size=2, max_size=2).map(
            lambda v: pa.array([{"bytes": image, "path": "here.jpg"} for image in v])
        ),
        st.just(pa.array([{"bytes": None, "path": None}, {"bytes": PICTURE, "path": None}])),
        st.just(pa.array([{"bytes": "text"}, {"bytes": "text"}])),
        st.just(pa.array([None, {"bytes": PICTURE}])),
        st.just(pa.array(["a.jpg", "b.jpg"])),
        st.just(pa.array([[PICTURE], [PICTURE]])),
    ),
    "caption": st.one_of(
        st.lists(st.one_of(st.none(), st.text(max_size=20)), min_size=2, max_size=2).map(
            lambda v: pa.array(v, pa.string())
        ),
        st.sampled_from(
            [
                pa.array([1, 2]),
                pa.array([b"x", b"\xff"]),
                pa.array([["a"], []]),
                pa.array([{"a": 1}, None]),
                pa.nulls(2),
                pa.array([True, False]),
            ]
        ),
    ),
    "__key__": st.sampled_from(
        [pa.array(["a", "a"]), pa.array([1, None]), pa.array([b"\xff", b"x"]), pa.array([1.5, float("nan")])]
    ),
    "label": st.sampled_from([pa.array([1, 2]), pa.array(["a", None]), pa.array([[1], [2]])]),
    "meta": st.sampled_from(
        [pa.array([{"x": [1]}, None]), pa.array([1, 2], pa.timestamp("ns")), pa.array(["a", "b"]).dictionary_encode()]
    ),
}


@st.composite
def parquets(draw: Callable[..., Any]) -> bytes:
    """A Parquet file with columns of right and wrong types."""
    names = draw(st.lists(st.sampled_from(list(_COLUMNS)), unique=True, max_size=5))
    columns = {
        name: draw(_COLUMNS[name]) for name in dict.fromkeys([*(["image"] if draw(st.integers(0, 9)) else []), *names])
    }
    table = pa.table(columns) if columns else pa.table({"x": pa.array([1, 2])})
    buffer = io.BytesIO()
    pq.write_table(
        table.slice(0, draw(st.sampled_from([2, 2, 2, 1, 0]))),
        buffer,
        compression=draw(st.sampled_from(["none", "zstd"])),
    )
    return buffer.getvalue()


def read_parquet(case: bytes, folder: Path) -> bool:
    """Read a Parquet file of pairs."""
    (folder / "here.jpg").write_bytes(PICTURE)
    path = folder / "case.parquet"
    path.write_bytes(case)
    read_all(path)
    return True


DOORS = (
    Door(name="CSV, reader", cases=csvs(), enter=read_csv, share=0.13),
    Door(name="Parquet, reader", cases=parquets() | damaged(parquets()), enter=read_parquet, share=0.10),
)
