"""Check a folder of `weigh`: a finite weight of at least 0 for rows that ascend, as many as result.json says."""

from __future__ import annotations

import re
from functools import partial

import numpy as np

from distilclip.data.side_files import WeightedRows, read_weights
from distilclip.integrity.findings import Findings, list_parts, read_or_report
from distilclip.row_weights import weights_name


def check_weights(found: Findings) -> None:
    """Check the weights of every shard, and their numbers against result.json."""
    found.compare_digests()
    num_rows = num_drawn = num_whole = 0
    named = [int(match[1]) for name in found.changed if (match := re.fullmatch(r"weights/(\d+)\.parquet", name))]
    shards = sorted({*list_parts(found.child("weights"), ".parquet"), *named})
    for shard in shards:
        name = weights_name(shard)
        if name in found.changed:
            found.add_fault(found.describe_change(name), remove=[name])
            continue
        table = read_or_report(found, partial(read_weights, found.path, shard), name, remove=[name])
        if table is None:
            continue
        if wrong := _find_wrong(table):
            found.add_fault(f"{found.child(name)}: {wrong}", remove=[name])
            continue
        num_whole += 1
        num_rows += len(table.row)
        num_drawn += int((table.weight > 0).sum())
    for name, count in (("num_rows", num_rows), ("num_drawn", num_drawn)):
        if not found.faults and found.result.get(name, count) != count:
            text = f"{found.child('result.json')} says {name} {found.result[name]}; its files have {count}"
            found.add_fault(text, remove=["result.json"])
    found.whole.append(f"{num_whole} of {len(shards)} shards: {num_rows:,} rows, {num_drawn:,} of positive weight")


def _find_wrong(table: WeightedRows) -> str:
    """Say what is wrong with the weights of a shard; empty where nothing is."""
    if not (np.diff(table.row.astype(np.int64)) > 0).all():
        return "its rows do not ascend"
    if not ((table.weight >= 0) & (table.weight < np.inf)).all():
        return "a weight is not a finite number of at least 0"
    return ""
