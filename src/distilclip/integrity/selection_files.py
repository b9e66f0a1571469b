"""Check a folder of `select`: what it keeps has the scores for it, and was kept by what it selects from."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial

import numpy as np
from jaxtyping import UInt32

from distilclip.data.side_files import (
    Groups,
    Scores,
    groups_name,
    read_groups,
    read_scores,
    rows_kept_by_all,
    scores_name,
)
from distilclip.data.store import Store
from distilclip.errors import InputError
from distilclip.integrity.findings import Findings, input_of, list_parts, read_or_report
from distilclip.scoring.cut import cut_share, on_side
from distilclip.scoring.parts import number_parts, split_by_shard

Tables = tuple[Scores | None, Groups]
"""The scores and groups of a shard; there are no scores where only --groups are combined."""


def check_selection(found: Findings) -> None:
    """Check the scores and the kept pairs of every shard against each other and against result.json."""
    found.compare_digests()
    named = [match for name in found.changed if (match := re.fullmatch(r"(?:scores|groups)/(\d+)\.parquet", name))]
    for name in sorted(name for name in found.changed if not re.fullmatch(r"(?:scores|groups)/\d+\.parquet", name)):
        found.add_fault(found.describe_change(name), remove=[name])  # a table of near copies
    parts = [part for folder in ("scores", "groups") for part in list_parts(found.child(folder), ".parquet")]
    shards = sorted({*parts, *(int(match[1]) for match in named)})
    tables = {shard: table for shard in shards if (table := _read_shard(found, shard)) is not None}
    num_whole = len(tables)
    if found.result:
        for shard, rows in _expect_rows(found, tables, is_whole=len(tables) == len(shards)).items():
            groups, name = tables[shard][1], groups_name(shard)
            if not np.array_equal(rows, groups.row[groups.keep]):
                found.add_fault(f"{found.child(name)}: what it keeps is not what has the scores for it", remove=[name])
                num_whole -= 1
    num_kept = sum(int(groups.keep.sum()) for _, groups in tables.values())
    counts = {"num_kept": num_kept}
    if all(scores is not None for scores, _ in tables.values()):
        counts["num_scored"] = sum(len(scores.row) for scores, _ in tables.values() if scores is not None)
    for name, count in counts.items():
        if not found.faults and found.result.get(name, count) != count:
            text = f"{found.child('result.json')} says {name} {found.result[name]}; its files have {count}"
            found.add_fault(text, remove=["result.json"])
    found.whole.append(f"{num_whole} of {len(shards)} shards: {num_kept:,} pairs kept")


def _read_shard(found: Findings, shard: int) -> Tables | None:
    """Read the tables of a shard; None, and a fault, where one cannot be had."""
    is_scored = found.config.get("score") is not None
    names = [*([scores_name(shard)] if is_scored else []), groups_name(shard)]
    if bad := [name for name in names if name in found.changed]:
        for name in bad:
            found.add_fault(found.describe_change(name), remove=[name])
        return None
    readers = [*([read_scores] if is_scored else []), read_groups]
    tables = [
        read_or_report(found, partial(read, found.path, shard), name, remove=[name])
        for read, name in zip(readers, names, strict=True)
    ]
    if any(table is None for table in tables):
        return None
    return (tables[0] if is_scored else None, tables[-1])


def _expect_rows(
    found: Findings, tables: Mapping[int, Tables], *, is_whole: bool
) -> dict[int, UInt32[np.ndarray, " m"]]:
    """Return which rows of each shard must be kept, as far as what says so is there."""
    scores = {shard: table for shard, (table, _) in tables.items() if table is not None}
    within = found.result.get("within", "all")
    if scores and within == "all":
        threshold, side = found.result["threshold"], found.result["side"]
        return {
            shard: table.row[on_side(table.score, threshold=threshold, side=side)] for shard, table in scores.items()
        }
    path, groups = input_of(found, "store"), found.config.get("groups") or []
    if path is None:
        return {}
    store = Store.open(path)
    try:
        if not scores:
            kept = {shard: rows_kept_by_all(store, shard, groups) for shard in tables}
            return {shard: np.flatnonzero(keep).astype(np.uint32) for shard, keep in kept.items()}
        if not is_whole:
            return {}  # the cut is made of all scores
        rows = [scores[shard].row for shard in scores]
        part = number_parts(store, rows, within=within, clusters=found.config.get("clusters"))
    except InputError as error:
        found.notes.append(f"what it keeps is not compared with what it was made from: {error}")
        return {}
    cut = cut_share(np.concatenate([table.score for table in scores.values()]), share=found.config["top"], part=part)
    keeps = split_by_shard(cut.keep, rows)
    return {shard: own[keep] for shard, own, keep in zip(scores, rows, keeps, strict=True)}
