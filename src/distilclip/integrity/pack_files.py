"""Check a folder of `pack`: every file's digest, and the counts of its index and result.json."""

from __future__ import annotations

from functools import partial

from distilclip.data.side_files import CENTERS_FILE
from distilclip.integrity.findings import Findings, list_parts, read_or_report
from distilclip.packs.pack import INDEX_FILE, Pack, shard_name


def check_pack(found: Findings) -> None:
    """Check the shards and the index, by which the shards that are whole need not be written again."""
    found.compare_digests()
    for name in sorted(found.changed):
        found.add_fault(found.describe_change(name), remove=[name])
    if not found.result:
        return
    if INDEX_FILE not in found.changed:
        pack = read_or_report(found, partial(Pack.open, found.path), INDEX_FILE, remove=[INDEX_FILE])
        for name, count in ({} if pack is None else {"num_rows": pack.num_rows, **vars(pack.facts.counts)}).items():
            if found.result.get(name, count) != count:
                text = f"{found.child('result.json')} says {name} {found.result[name]}; its index says {count}"
                found.add_fault(text, remove=["result.json"])
    shards = [shard_name(shard) for shard in range(int(found.result.get("num_shards", 0)))]
    there = [shard_name(shard) for shard in list_parts(found.child("shards"), ".arrow")]
    whole = [name for name in shards if name in there and name not in found.changed]
    centers = f", {CENTERS_FILE}" if CENTERS_FILE in found.result.get("digests", {}) else ""
    found.whole.append(f"{len(whole)} of {len(shards)} shards, {INDEX_FILE}{centers}")
