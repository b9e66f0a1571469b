"""Precision and recall of a balance folder against the true groups that the samples' json members record.

python benchmarks/_truth.py STORE BALANCE FIELD [--copies]: images that share the value of FIELD are true pairs.
With `--copies`, recall is also given for each kind of copy (the synthetic corpus's `copy`): the share of copies whose
group holds another image of the same truth.
"""

from __future__ import annotations

import argparse
from collections import Counter, defaultdict
from collections.abc import Sequence

from distilclip.data.shards import open_shard
from distilclip.data.side_files import read_groups
from distilclip.data.store import Store


def num_pairs(labels: Sequence[object]) -> int:
    """Pairs of equal labels."""
    return sum(n * (n - 1) // 2 for n in Counter(labels).values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("store")
    parser.add_argument("balance")
    parser.add_argument("field")
    parser.add_argument("--copies", action="store_true")
    arguments = parser.parse_args()
    found, truth, copies = [], [], []
    store = Store.open(arguments.store)
    for shard in store.shards:
        rows, source = store.rows(shard.index), open_shard(shard.uri)
        groups = read_groups(arguments.balance, shard.index)
        for row, group in zip(groups.row, groups.group, strict=True):
            if rows.valid[row]:
                meta = source.read(int(rows.offset[row]), int(rows.size[row])).meta
                found.append(int(group))
                truth.append(meta[arguments.field])
                copies.append(meta.get("copy", ""))
    both, ours, true = num_pairs(list(zip(found, truth, strict=True))), num_pairs(found), num_pairs(truth)
    print(f"{len(found)} images, {len(set(found))} groups found, {len(set(truth))} true")
    print(f"pairs: {ours} found, {true} true, precision {both / max(1, ours):.3f}, recall {both / max(1, true):.3f}")
    if arguments.copies:
        together = Counter(zip(found, truth, strict=True))
        by_kind: dict[str, list[bool]] = defaultdict(list)
        for group, label, copy in zip(found, truth, copies, strict=True):
            by_kind[copy].append(together[group, label] > 1)
        for kind, hits in sorted(by_kind.items()):
            if kind != "original":
                print(f"{kind} copies grouped with one of theirs: {sum(hits) / len(hits):.3f} of {len(hits)}")


if __name__ == "__main__":
    main()
