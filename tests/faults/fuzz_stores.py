"""Damaged stores, side files and checkpoints, of today and without the digests of older versions."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from distilclip import digests
from distilclip.data.side_files import (
    CENTERS_FILE,
    FOREST_FILE,
    ForestEdges,
    Groups,
    Labels,
    groups_name,
    labels_name,
    read_centers,
    read_forest,
    read_groups,
    read_labels,
    write_centers,
    write_forest,
    write_groups,
    write_labels,
)
from distilclip.data.store import Store, sample_id, store_files
from distilclip.row_weights import RowPlaces, read_row_weights
from tests.faults.fuzz_runner import FLIPS, Door, Lost, command, flipped
from tests.stages.conftest import write_store

SHARDS, ROWS, DIM = 2, 10, 8
SIDES = (groups_name(0), labels_name(1), FOREST_FILE, CENTERS_FILE)


def make_template(folder: Path) -> None:
    """Write a store and, in the same folder, what the stages after it write, with all digests."""
    write_store(folder, rows=ROWS, shards=SHARDS, dim=DIM)
    for shard in range(SHARDS):
        row = np.arange(ROWS, dtype=np.uint32)
        ids, distance = sample_id(shard, row), np.zeros(ROWS, np.float32)
        write_groups(str(folder), shard, Groups(row, ids, ids, distance, row % 2 == 0))
        write_labels(str(folder), shard, Labels(row, row % 3, distance))
    edges = np.arange(3, dtype=np.uint64)
    write_forest(str(folder), ForestEdges(edges, edges + np.uint64(1), np.zeros(3, np.float32)))
    write_centers(str(folder), np.eye(3, DIM, dtype=np.float32))
    np.save(folder / "weights.npy", np.ones(SHARDS * ROWS))
    names = [*store_files(SHARDS), *(groups_name(n) for n in range(SHARDS)), *(labels_name(n) for n in range(SHARDS))]
    known = digests.digest_files(str(folder), [*names, FOREST_FILE, CENTERS_FILE])
    (folder / "result.json").write_text(json.dumps({"stage": "embed", "digests": known}))
    (folder / "config.json").write_text(json.dumps({"stage": "embed", "max_pixels": 100}))


@lru_cache(maxsize=1)
def template(parent: Path) -> dict[str, bytes]:
    """The files of an undamaged folder."""
    folder = parent / "template"
    if not folder.exists():
        make_template(folder)
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def read_everything(folder: Path) -> dict[str, Any]:
    """Read all that the readers of a store and of side files give."""
    store = Store.open(str(folder))
    found: dict[str, Any] = {"shards": [vars(shard) for shard in store.shards], "teacher": store.teacher}
    for shard in range(store.num_shards):
        found[f"image {shard}"], found[f"text {shard}"] = store.image(shard).tobytes(), store.text(shard).tobytes()
        rows = store.rows(shard)
        found[f"rows {shard}"] = [
            rows.key,
            rows.valid.tolist(),
            rows.error,
            rows.image_sha256.tobytes(),
            rows.offset.tolist(),
        ]
    for name, table in (("groups", read_groups(str(folder), 0)), ("labels", read_labels(str(folder), 1))):
        found[name] = [column.tolist() for column in vars(table).values()]
    found["forest"] = [column.tolist() for column in vars(read_forest(str(folder))).values()]
    found["centers"] = read_centers(str(folder)).tobytes()
    return found


@dataclass(frozen=True)
class Damage:
    """What is done to a file: its number among all, what with, and whether the folder has digests."""

    file: int
    how: Callable[[bytes], bytes]
    words: str
    has_digests: bool

    def __repr__(self) -> str:
        return f"file {self.file}, {self.words}, digests {self.has_digests}"


_HEADERS = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(-5, 10**12), st.text(max_size=5), st.sampled_from(["F16", "image", "F32"])
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.sampled_from(["image", "text", "__metadata__", "dtype", "shape", "data_offsets"]), inner, max_size=4
        ),
    ),
    max_leaves=8,
)


def _with_header(value: Any) -> Callable[[bytes], bytes]:
    """Put another JSON header before the tensors of a safetensors file, or exchange one value of its own."""

    def change(content: bytes) -> bytes:
        length = int.from_bytes(content[:8], "little")
        if not 0 < length < len(content):
            return content
        header = value
        if isinstance(value, dict):
            try:
                own = json.loads(content[8 : 8 + length])
            except ValueError:
                own = {}
            header = {
                name: {**entry, **value} if name != "__metadata__" else entry for name, entry in own.items()
            } | value
        encoded = json.dumps(header).encode()
        return len(encoded).to_bytes(8, "little") + encoded + content[8 + length :]

    return change


@st.composite
def damages(draw: Callable[..., Any]) -> Damage:
    """Some damage to some file."""
    kind = draw(st.sampled_from(["flip", "flip", "damage", "header", "json"]))
    if kind == "flip":
        flips = draw(FLIPS)
        return Damage(
            draw(st.integers(0, 99)), lambda content: flipped(content, flips), f"flip {flips}", draw(st.booleans())
        )
    if kind == "damage":
        seed = draw(st.integers(0, 2**16))
        cut = draw(st.floats(0, 1))
        return Damage(
            draw(st.integers(0, 99)), lambda c: c[: int(cut * len(c))], f"cut {cut} {seed}", draw(st.booleans())
        )
    value = draw(_HEADERS)
    how = _with_header(value) if kind == "header" else lambda _: json.dumps(value).encode()
    return Damage(draw(st.integers(0, 99)), how, f"{kind} {value!r}", draw(st.booleans()))


def place_damaged(case: Damage, parent: Path, folder: Path) -> bool:
    """Write the template with its damage; whether a file is different of which a store has the digest."""
    whole = template(parent)
    names = list(whole)
    name = names[case.file % len(names)]
    content = case.how(whole[name])
    shutil.rmtree(folder, ignore_errors=True)
    for other, bytes_ in whole.items():
        if other == "result.json" and not case.has_digests:
            bytes_ = b'{"stage": "embed"}'
        (folder / other).parent.mkdir(parents=True, exist_ok=True)
        (folder / other).write_bytes(content if other == name else bytes_)
    return content != whole[name] and name.endswith(
        (".rows.parquet", "manifest.parquet", "0.safetensors", "1.safetensors")
    )


def read_damaged(case: Damage, folder: Path) -> bool:
    """Read a damaged folder: with digests, what is read is what was written."""
    whole = folder / "whole"
    if not whole.exists():
        place_damaged(Damage(0, lambda content: content, "", True), folder, whole)
    expected = read_everything(whole)
    digests.forget()
    here = folder / "case"
    place_damaged(case, folder, here)
    places = RowPlaces(
        shard=np.repeat(np.arange(SHARDS, dtype=np.uint32), ROWS),
        row=np.tile(np.arange(ROWS, dtype=np.uint32), SHARDS),
        key=_keys(),
        num_rows=np.array([ROWS] * SHARDS),
    )
    found = read_everything(here)
    read_row_weights(str(here / "weights.npy"), places)
    names = list(template(folder))
    if case.has_digests and names[case.file % len(names)] != "result.json" and found != expected:
        raise Lost(f"another {next(name for name in expected if found.get(name) != expected[name])} than was written")
    return True


def _keys() -> Any:
    import pyarrow as pa

    return pa.array([f"{row:05d}" for _ in range(SHARDS) for row in range(ROWS)], pa.large_string())


def verify_damaged(case: Damage, folder: Path) -> bool:
    """Run `distilclip verify` on a damaged folder: a change in a file with a digest is a fault that is found."""
    here = folder / "case"
    is_changed = place_damaged(case, folder, here)
    digests.forget()
    code, _ = command(["verify", str(here)])
    if case.has_digests and is_changed and code == 0:
        raise Lost("verify finds no fault")
    return code in (0, 1)


DOORS = (
    Door(name="stores and side files, readers", cases=damages(), enter=read_damaged, share=0.10),
    Door(name="stores and side files, verify", cases=damages(), enter=verify_damaged, share=0.03),
)
