"""Search rows for the spanning forest of their near pairs: one part of a balance, or all of it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Int

from distilclip.grouping.forest import Forest, ForestBuilder
from distilclip.grouping.near_pairs import near_pairs, nearest
from distilclip.grouping.rule import Rule
from distilclip.vectors.points import Distinct, Points, distinct
from distilclip.vectors.tolerance import Tolerance


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What a search, or a part of one, found: a spanning forest of the near pairs."""

    forest: Forest
    saturated: float | None = None  # topk: share of rows whose list is full, where edges may be missing


def search_forest(
    points: Points,
    valid: Bool[np.ndarray, " n"],
    rule: Rule,
    *,
    num_searched: int = 0,
    memory_gb: float | None = None,
    device: str | torch.device | None = None,
) -> Finding:
    """Search the valid rows, as the rule says: every near pair, or the paper's lists of each row's `top_k` nearest.

    Pairs of two of the first `num_searched` rows are left out, unless they are equal: this forest and that of these
    rows merge to the forest of all. For lists, also says which share of the rows has a full list below the threshold:
    such a row may have further neighbours that its list has no place for.
    """
    # 1. Collapse equal rows: each is joined to its copies at distance 0, and only the distinct rows are searched.
    rows = np.flatnonzero(valid)
    same = distinct(points.values, rows)
    forest = ForestBuilder(len(points))
    reach = Tolerance(rule.farthest, rule.metric)
    _join_copies(same, rows, forest)
    if rule.top_k is None:
        # 2a. Every near pair, reduced to a forest as it is found.
        before = int(np.searchsorted(same.first, num_searched))
        near_pairs(points, same.first, reach, into=forest, num_searched=before, memory_gb=memory_gb, device=device)
        return Finding(forest=forest.forest())
    # 2b. The nearest [m, top_k] of every distinct row, as edges.
    assert not num_searched
    lists = nearest(points, same.first, reach, k=rule.top_k, memory_gb=memory_gb, device=device)
    near = lists.row >= 0
    forest.add(np.repeat(same.first, near.sum(axis=1)), lists.row[near], lists.distance[near])
    full = near.sum(axis=1) == rule.top_k
    saturated = float(full[same.position[rows]].sum()) / max(len(rows), 1)
    return Finding(forest=forest.forest(), saturated=saturated)


def _join_copies(same: Distinct, rows: Int[np.ndarray, " m"], forest: ForestBuilder) -> None:
    original = same.first[same.position[rows]]
    copied = original != rows
    forest.add(original[copied], rows[copied], np.zeros(copied.sum(), np.float32))
