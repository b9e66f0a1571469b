"""Check a folder of `select`: what it keeps has the scores for it, and was kept by what it selects from."""

from __future__ import annotations

import re
from functools import partial

import numpy as np

from distilclip.data.side_files import groups_name, read_groups, read_scores, scores_name
from distilclip.integrity.findings import Findings, list_parts, read_or_report
from distilclip.scoring.cut import on_side


def check_selection(found: Findings) -> None:
    """Check the scores and the kept pairs of every shard against each other and against result.json."""
    found.compare_digests()
    num_scored = num_kept = num_whole = 0
    named = [match for name in found.changed if (match := re.fullmatch(r"\w+/(\d+)\.parquet", name))]
    shards = sorted({*list_parts(found.child("scores"), ".parquet"), *(int(match[1]) for match in named)})
    for shard in shards:
        both = [scores_name(shard), groups_name(shard)]
        if bad := [name for name in both if name in found.changed]:
            for name in bad:
                found.add_fault(found.describe_change(name), remove=[name])
            continue
        scores = read_or_report(found, partial(read_scores, found.path, shard), both[0], remove=both[:1])
        groups = read_or_report(found, partial(read_groups, found.path, shard), both[1], remove=both[1:])
        if scores is None or groups is None:
            continue
        if found.result:
            kept = on_side(scores.score, threshold=found.result["threshold"], side=found.result["side"])
            if not np.array_equal(scores.row[kept], groups.row[groups.keep]):
                text = f"{found.child(both[1])}: what it keeps is not what has the scores for it"
                found.add_fault(text, remove=both[1:])
                continue
        num_scored, num_kept, num_whole = num_scored + len(scores.row), num_kept + int(groups.keep.sum()), num_whole + 1
    for name, count in (("num_scored", num_scored), ("num_kept", num_kept)):
        if not found.faults and found.result.get(name, count) != count:
            text = f"{found.child('result.json')} says {name} {found.result[name]}; its files have {count}"
            found.add_fault(text, remove=["result.json"])
    found.whole.append(f"{num_whole} of {len(shards)} shards: {num_scored:,} pairs, {num_kept:,} kept")
