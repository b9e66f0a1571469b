"""Check a balance folder: one row kept for each group, near rows in one group, and distances as they are stored."""

from __future__ import annotations

from dataclasses import fields
from functools import partial

import numpy as np
from jaxtyping import Bool, Float, UInt64

from distilclip import files
from distilclip.data.images import ImageMatrix
from distilclip.data.side_files import FOREST_FILE, Groups, groups_name, read_forest, read_groups
from distilclip.data.store import Store, sample_id
from distilclip.integrity.findings import Findings, input_of, list_parts, read_or_report
from distilclip.vectors.tolerance import Tolerance

BLOCK_ROWS = 8192
NEAR = 1e-5
"""How far a distance computed here may be from the stored one, relative to it or to 0.1, whichever is larger."""


def check_groups(found: Findings) -> None:
    """Check the groups of all shards together, and the forest that they were cut from."""
    found.compare_digests()
    path = input_of(found, "store")
    store = None if path is None else Store.open(path)
    groups_of = input_of(found, "groups")
    searched = None
    if store is not None and (groups_of is None) == (found.config.get("groups") is None):
        searched = ImageMatrix(store, groups_of)
    shards = list(range(store.num_shards) if store else list_parts(found.child("groups"), ".parquet"))
    parts = {shard: table for shard in shards if (table := _read_shard(found, searched, shard)) is not None}
    is_whole = len(parts) == len(shards)
    if parts:
        ids = np.concatenate([sample_id(shard, table.row) for shard, table in parts.items()])
        names = [field.name for field in fields(Groups)]
        groups = Groups(**{name: np.concatenate([getattr(t, name) for t in parts.values()]) for name in names})
        wrong = _find_wrong_rows(ids, groups) if is_whole else {}
        if found.result.get("rule") == "cover":
            far = ~groups.keep & (groups.distance >= np.float32(found.result["threshold"]))
            wrong |= {"are not below the threshold from the image kept for them": far} if far.any() else {}
        if store is not None and not wrong:
            wrong = {"have another distance to their representative": _wrong_distances(found, store, ids, groups)}
        bounds = np.cumsum([0, *(len(table.row) for table in parts.values())])
        for what, rows in wrong.items():
            for shard, start, stop in zip(parts, bounds[:-1], bounds[1:], strict=True):
                if count := int(rows[start:stop].sum()):
                    name = groups_name(shard)
                    found.add_fault(f"{found.child(name)}: {count} rows {what}", remove=[name])
        if is_whole:
            _check_counts(found, ids, groups)
        found.whole.append(f"{len(parts)} of {len(shards)} shards: {len(ids):,} rows, {int(groups.keep.sum()):,} kept")
    _check_forest(found, ids if parts and is_whole else None, groups.group if parts else None)


def _read_shard(found: Findings, searched: ImageMatrix | None, shard: int) -> Groups | None:
    name = groups_name(shard)
    if name in found.changed:
        found.add_fault(found.describe_change(name), remove=[name])
        return None
    if not (found.result or files.exists(found.child(name))):
        return None  # not made yet
    table = read_or_report(found, partial(read_groups, found.path, shard), name, remove=[name])
    if table is None:
        return None
    ordered = bool((np.diff(table.row.astype(np.int64)) > 0).all())
    if searched is not None:
        ordered = np.array_equal(table.row, np.flatnonzero(searched.usable(shard)))
    if not ordered:
        of = "valid rows of the store's shard" if searched is None or searched.groups is None else "rows of --groups"
        found.add_fault(f"{found.child(name)}: its rows are not the {of}", remove=[name])
    return table if ordered else None


def _find_wrong_rows(ids: UInt64[np.ndarray, " n"], groups: Groups) -> dict[str, Bool[np.ndarray, " n"]]:
    """Return the rows of a whole store, ids ascending, that break a rule of groups, by what is wrong with them."""
    last = len(ids) - 1
    place = np.minimum(np.searchsorted(ids, groups.representative), last)
    known = ids[place] == groups.representative
    named, member = np.unique(groups.group, return_inverse=True)
    least = np.full(len(named), np.iinfo(np.uint64).max, np.uint64)
    np.minimum.at(least, member, ids)
    num_kept = np.bincount(member, weights=groups.keep, minlength=len(named))
    wrong = {
        "have a representative that is no row of the store": ~known,
        "have a representative of another group": known & (groups.group[place] != groups.group),
        "have a representative that is not kept": known & ~groups.keep[place],
        "are kept and not their own representative, or the reverse": groups.keep != (groups.representative == ids),
        "are in a group without exactly one kept row": (num_kept != 1)[member],
        "are in a group that is not named by its smallest row": (least != named)[member],
        "are kept at a distance other than 0": groups.keep & (groups.distance != 0),
    }
    return {what: rows for what, rows in wrong.items() if rows.any()}


def _wrong_distances(
    found: Findings, store: Store, ids: UInt64[np.ndarray, " n"], groups: Groups
) -> Bool[np.ndarray, " n"]:
    """Return the removed rows whose stored distance is not that to their representative."""
    images, unit = ImageMatrix(store), Tolerance(1.0, str(found.config.get("metric")))
    wrong = np.zeros(len(ids), bool)
    removed = np.flatnonzero(~groups.keep)
    for start in range(0, len(removed), BLOCK_ROWS):
        here = removed[start : start + BLOCK_ROWS]
        own, kept = (_points(images.take(images.rows(which[here])), unit) for which in (ids, groups.representative))
        distance = unit.distance_of(((own - kept) ** 2).sum(axis=1))
        wrong[here] = ~(np.abs(distance - groups.distance[here]) <= NEAR * np.maximum(distance, 0.1))
    return wrong


def _points(rows: np.ndarray, unit: Tolerance) -> Float[np.ndarray, "n dim"]:
    points = rows.astype(np.float64)
    return points / np.linalg.norm(points, axis=1, keepdims=True) if unit.metric == "cosine" else points


def _check_counts(found: Findings, ids: UInt64[np.ndarray, " n"], groups: Groups) -> None:
    alone = found.result.get("num_pictureless", 0)  # kept, each as its own group, and counted apart
    counted = {
        "num_valid": len(ids) - alone,
        "num_kept": int(groups.keep.sum()) - alone,
        "num_groups": int((groups.group == ids).sum()) - alone,
    }
    for name, count in counted.items():
        if found.result.get(name, count) != count:
            text = f"{found.child('result.json')} says {name} {found.result[name]}; its groups have {count}"
            found.add_fault(text, remove=["result.json"])


def _check_forest(
    found: Findings, ids: UInt64[np.ndarray, " n"] | None, group: UInt64[np.ndarray, " n"] | None
) -> None:
    """Check the edges, and that those below the threshold join the rows of each group and no others."""
    both = [FOREST_FILE, "search.json"]  # the search writes them together
    if bad := [name for name in both if name in found.changed]:
        for name in bad:
            found.add_fault(found.describe_change(name), remove=both)
        return
    if not files.exists(found.child(FOREST_FILE)):
        return
    forest = read_or_report(found, partial(read_forest, found.path), FOREST_FILE, remove=both)
    if forest is None:
        return
    if not ((forest.left < forest.right) & (forest.distance >= 0)).all():
        found.add_fault(f"{found.child(FOREST_FILE)} has edges that no forest has", remove=both)
    elif ids is not None and group is not None and "threshold" in found.result:
        below = forest.distance < np.float32(found.result["threshold"])
        ends = [np.minimum(np.searchsorted(ids, side[below]), len(ids) - 1) for side in (forest.left, forest.right)]
        from distilclip.grouping.forest import Forest  # numba: only where there is a forest to check

        joined = Forest(left=ends[0], right=ends[1], distance=forest.distance[below], num_rows=len(ids)).groups()
        if found.result.get("rule") in ("cover", "complete"):  # a group is a part of what the edges join
            fits = np.array_equal(joined, joined[np.minimum(np.searchsorted(ids, group), len(ids) - 1)])
        else:
            fits = np.array_equal(ids[joined], group)
        if not fits:
            text = f"{found.child(FOREST_FILE)}: its edges below the threshold do not join the groups"
            found.add_fault(text, remove=both)
        else:
            found.whole.append(f"forest: {len(forest.left):,} edges, {int(below.sum()):,} below the threshold")
