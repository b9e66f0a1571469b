"""Check a store: digests, rows, keys and unit lengths of every shard, and the files that it was made from."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Literal

from distilclip import files
from distilclip.csv_rows import CsvColumns
from distilclip.data.shards import EMBEDDING_SUFFIXES, key_digest, open_shard, source_size
from distilclip.data.store import Rows, Store, StoreShard, check_embeddings, finished_shard, read_shard_rows, stem
from distilclip.data.tensors import read_tensors
from distilclip.errors import InputError
from distilclip.integrity.findings import Findings, read_or_report

Sources = Literal["none", "sizes", "keys"]


def check_store(found: Findings, sources: Sources) -> None:
    """Check every shard of a store, finished or not."""
    found.compare_digests()
    lines, columns = _read_lines(found)
    if found.is_of_other_version:
        return
    whole = [line for line in lines if _check_shard(found, line)]
    num_rows = sum(line.num_rows for line in whole)
    found.whole.append(
        f"{len(whole)} of {len(lines)} shards ({num_rows:,} rows): payload, row table, keys, unit lengths"
    )
    for line in whole if sources != "none" else ():
        _check_source(found, line, columns, keys=sources == "keys")


def _read_lines(found: Findings) -> tuple[list[StoreShard], CsvColumns]:
    """Return what is written of each shard: the manifest, or the row tables where it is damaged or not there yet."""
    name, store = "manifest.parquet", None
    if name in found.changed:
        found.add_fault(found.describe_change(name), remove=[name])
    elif files.exists(found.child(name)):
        store = read_or_report(found, lambda: Store.open(found.path), name, remove=[name])
    elif found.result:
        found.add_fault(f"{found.child(name)} is missing", remove=[name])
    if store is not None:
        return store.shards, store.csv_columns or CsvColumns()
    lines = []
    for shard in itertools.count():
        line = _try(partial(finished_shard, found.path, shard))
        if line is None:
            break
        lines.append(line)
    return lines, CsvColumns()


def _try(read: Callable[[], StoreShard | None]) -> StoreShard | None:
    try:
        return read()
    except (InputError, OSError, ValueError, KeyError):
        return None


def _check_shard(found: Findings, line: StoreShard) -> bool:
    """Report what is wrong with a shard's files; its rows are made anew as a whole."""
    table, payload, views = (
        f"{stem(line.index)}.rows.parquet",
        f"{stem(line.index)}.safetensors",
        f"views/{stem(line.index)}.safetensors",
    )
    remove = [table, payload, "manifest.parquet", *([views] if files.exists(found.child(views)) else [])]
    before = len(found.faults)
    for name in (table, views):
        if name in found.changed:
            found.add_fault(found.describe_change(name), remove=remove)
    rows = None
    if table not in found.changed:
        rows = read_or_report(found, lambda: read_shard_rows(found.path, line.index), table, remove=remove)
    if rows is not None:
        if len(rows) != line.num_rows or key_digest(rows.key) != line.key_digest:
            text = f"{found.child(table)} has not the {line.num_rows} keys that the manifest says"
            found.add_fault(text, remove=remove)
        if _try(partial(finished_shard, found.path, line.index)) != line:
            found.add_fault(f"{found.child(table)} says other things of its shard than the manifest", remove=remove)
    if not files.exists(found.child(payload)):
        found.add_fault(f"{found.child(payload)} is missing", remove=remove)
    elif files.sha256(found.child(payload)) != line.sha256:
        text = f"{found.describe_change(payload)}; rows 0 to {line.num_rows - 1} of shard {line.index}"
        found.add_fault(text, remove=remove)
    elif rows is not None:
        _check_rows(found, payload, rows, remove)
    return len(found.faults) == before


def _check_rows(found: Findings, payload: str, rows: Rows, remove: list[str]) -> None:
    arrays = read_or_report(found, lambda: read_tensors(found.child(payload)), payload, remove=remove)
    for name in ("image", "text") if arrays is not None else ():
        if name not in arrays or len(arrays[name]) != len(rows):
            found.add_fault(f"{found.child(payload)} has no {name} embeddings of {len(rows)} rows", remove=remove)
            continue
        try:
            check_embeddings(arrays[name], rows.has(name), where=f"{found.child(payload)}, {name}")
        except InputError as error:
            found.add_fault(str(error))  # it is what was written: a rerun would write it again


def _check_source(found: Findings, line: StoreShard, columns: CsvColumns, *, keys: bool) -> None:
    """Compare the shard's own file, where it is still there, with what it was when it was embedded."""
    try:
        num_bytes = source_size(line.uri)
    except (InputError, OSError):
        found.notes.append(f"{line.uri} is not there, so shard {line.index} is not compared with it")
        return
    if num_bytes != line.num_bytes:
        found.add_fault(f"{line.uri} has {num_bytes} bytes; when it was embedded it had {line.num_bytes}. Restore it.")
    elif keys and not line.uri.lower().endswith(EMBEDDING_SUFFIXES):  # those have none
        now = [entry.key for entry in open_shard(line.uri, columns).index(("image", "caption"))]
        if key_digest(now) != line.key_digest:
            found.add_fault(f"{line.uri} has other keys than when it was embedded. Restore it.")
