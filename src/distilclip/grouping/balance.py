"""Balance images semantically (CLIP-CID, section 3.1): group similar rows and keep one row of each group.

`dc.balance` and the stage `distilclip balance` are one computation: a search in parts finds spanning forests of near
pairs (`search_forest`), `balance_parts` merges them, cuts the forest at the threshold and chooses the representatives.
`dc.balance` has one part.

Unit rows at the angles 0, 10, 19, 100 and 105 degrees; 10 degrees are the distance 0.174, 9 degrees 0.157, 19 degrees
0.330:

>>> angles = np.deg2rad([0, 10, 19, 100, 105])
>>> x = np.column_stack([np.cos(angles), np.sin(angles)])
>>> result = balance(x, threshold=0.2, metric="euclidean")
>>> result.group.tolist()  # 0 and 19 degrees are joined by 10; a group is called after its smallest row
[0, 0, 0, 3, 3]
>>> result.representative.tolist()  # 10 degrees are nearest to the mean
[1, 1, 1, 3, 3]
>>> result.keep.tolist(), result.removed_ratio
([False, True, False, True, False], 0.6)
>>> print(result.explain(0))
Row 0 is removed: row 1 of its group of 3 rows stands for it, at euclidean distance 0.1743.
That is below the threshold 0.2; a chain of 1 link joins them, the largest 0.1743: 0 -0.1743- 1

A chain can join what is far apart. The rule `cover` keeps more of such a group: every row that is removed is nearer
than the threshold to the row that stands for it (`cover`). The rule `complete` makes groups of which every two rows are
nearer than the threshold (`complete_linkage`).

>>> angles = np.deg2rad([0, 10, 20, 30, 40])
>>> x = np.column_stack([np.cos(angles), np.sin(angles)])
>>> rules = ("union-find", "cover", "complete")
>>> [int(balance(x, threshold=0.2, metric="euclidean", rule=rule).keep.sum()) for rule in rules]
[1, 3, 3]
"""

from __future__ import annotations

import numbers
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from distilclip.errors import InputError
from distilclip.grouping.cautions import Outcome, list_cautions
from distilclip.grouping.complete_linkage import complete_forest
from distilclip.grouping.cover import cells, choose_cover
from distilclip.grouping.explanation import Explanation, explain_row
from distilclip.grouping.forest import Curve, Forest, ForestBuilder, threshold_curve, threshold_for
from distilclip.grouping.representatives import Represent, choose_representatives
from distilclip.grouping.rule import Rule, RuleName
from distilclip.grouping.search_forest import Finding, search_forest
from distilclip.vectors.metric import Metric
from distilclip.vectors.points import Points, as_rows
from distilclip.vectors.tolerance import Tolerance

if TYPE_CHECKING:
    import pandas

NUM_CURVE_POINTS = 100
NUM_COVERS = 20  # points of the curve where each is computed anew
SEARCH_STEPS = 12  # halvings of the interval in which the threshold for a share of a cover is sought, at most
NEAR_ENOUGH = 0.0005  # to a share of the rows: then the search ends


@dataclass(frozen=True, kw_only=True)
class Balance:
    """Groups of semantically similar rows and the representatives kept of them.

    `group` is the smallest row of a row's group, `representative` the kept row that stands for it, `distance` the
    distance between the two in the metric's unit. A row that is not valid has group and representative -1, an
    infinite distance, and is not kept. By the rule `cover`, a group is a kept row and those that it stands for.
    """

    group: Int[np.ndarray, " n"]
    representative: Int[np.ndarray, " n"]
    distance: Float[np.ndarray, " n"]
    threshold: float
    metric: Metric
    max_threshold: float
    forest: Forest
    rule: RuleName = "union-find"
    saturated: float | None = None  # topk: share of rows whose list is full, where edges may be missing
    _joins: Forest = field(repr=False)  # its edges below a threshold join the groups of it; by cover, what is covered
    _represent: Represent = field(repr=False)

    @property
    def keep(self) -> Bool[np.ndarray, " n"]:
        """Whether a row stays: whether it is its own representative."""
        return self.representative == np.arange(len(self.group))

    @property
    def num_valid(self) -> int:
        """Rows that belong to a group, be it only their own."""
        return int((self.group >= 0).sum())

    @property
    def num_groups(self) -> int:
        """Groups, single rows included."""
        return int((self.group == np.arange(len(self.group))).sum())

    @property
    def largest_group(self) -> int:
        """Members of the largest group."""
        return int(np.bincount(self.group[self.group >= 0]).max(initial=0))

    @property
    def removed_ratio(self) -> float:
        """Share of the valid rows that are not kept."""
        return (self.num_valid - int(self.keep.sum())) / max(self.num_valid, 1)

    @cached_property
    def curve(self) -> Curve:
        """What other thresholds up to `max_threshold` would do, at 100 equal steps; by the rule `cover` at 20.

        The forest answers for every threshold of single linkage; of the covers, each is computed.
        """
        num_points = NUM_COVERS if self.rule == "cover" else NUM_CURVE_POINTS
        steps = self.max_threshold * np.arange(1, num_points + 1) / num_points
        if self.rule != "cover":
            return threshold_curve(self._joins, thresholds=steps, num_valid=self.num_valid)
        sizes = [np.bincount(self.at(step).group[self.group >= 0]) for step in steps.tolist()]
        num_groups = np.array([np.count_nonzero(size) for size in sizes])
        return Curve(
            threshold=steps,
            num_groups=num_groups,
            removed_ratio=(self.num_valid - num_groups) / max(self.num_valid, 1),
            largest_group=np.array([size.max(initial=0) for size in sizes]),
        )

    @property
    def num_chained(self) -> int:
        """Rows farther than the threshold from their representative: only a chain of others joins them to it."""
        return int((self.distance[self.representative >= 0] >= np.float32(self.threshold)).sum())

    @property
    def warnings(self) -> list[str]:
        """What is doubtful: nearly all removed, one group with much of all, or most of the removed joined by chains.

        Each text says the number, why it matters, and what to try. The list is empty where nothing is.
        """
        outcome = Outcome(
            num_valid=self.num_valid,
            num_removed=self.num_valid - int(self.keep.sum()),
            largest_group=self.largest_group,
            num_chained=self.num_chained,
            threshold=self.threshold,
            metric=self.metric,
            rule=self.rule,
        )
        return list_cautions(outcome, forest=self._joins, curve=self.curve)

    def members(self, row: int) -> Int[np.ndarray, " m"]:
        """Return the rows of a row's group, ascending, the row itself among them.

        Raises:
            InputError: there is no such row, or it is not valid and so belongs to no group.
        """
        return np.flatnonzero(self.group == self.group[self._checked(row)])

    def explain(self, row: int) -> Explanation:
        """Say why a row was removed, or what it stands for: its representative, and the links that join the two.

        Print the answer, or read its fields. Raises `InputError` as `members` does.
        """
        row = self._checked(row)
        joined = self.forest.below(self.threshold)
        # By these rules one link joins a row to the one kept for it, which need not be in the forest.
        if self.rule in ("cover", "complete") and row != self.representative[row]:
            ends = np.sort([[row], [self.representative[row]]], axis=0)
            joined = replace(joined, left=ends[0], right=ends[1], distance=self.distance[[row]].astype(np.float32))
        return explain_row(
            row,
            forest=joined,
            members=self.members(row),
            representative=int(self.representative[row]),
            distance=float(self.distance[row]),
            threshold=self.threshold,
            metric=self.metric,
        )

    def to_frame(self) -> pandas.DataFrame:
        """Return a table of pandas with the columns row, group, representative, distance and keep.

        Raises `InputError` where pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise InputError(
                "pandas is not installed: pip install pandas. Balance.group, .representative, .distance and .keep hold "
                "the same columns as arrays."
            ) from error
        columns = {name: getattr(self, name) for name in ("group", "representative", "distance", "keep")}
        return pandas.DataFrame({"row": np.arange(len(self.group)), **columns})

    def _checked(self, row: int) -> int:
        if not isinstance(row, numbers.Integral) or not 0 <= row < len(self.group):
            raise InputError(f"row={row!r}: there are the rows 0 to {len(self.group) - 1}.")
        if self.group[row] < 0:
            raise InputError(f"Row {row} was marked as not valid: it belongs to no group.")
        return int(row)

    def borderline(self, count: int) -> tuple[Forest, Forest]:
        """Return the pairs of the forest just under the threshold, nearest to it first, and those from it on."""
        stop = len(self.forest.below(self.threshold))
        return self.forest.at(np.arange(stop)[::-1][:count]), self.forest.at(np.arange(stop, len(self.forest))[:count])

    def largest_groups(self, count: int) -> list[tuple[int, int, float]]:
        """Return groups of several rows, largest first: smallest row, members, largest distance to a representative."""
        members = self.group >= 0
        size = np.bincount(self.group[members], minlength=len(self.group))
        largest = np.lexsort((np.arange(len(size)), -size))[:count]
        farthest = np.zeros(len(size), np.float32)
        np.maximum.at(farthest, self.group[members], self.distance[members])
        return [(int(g), int(size[g]), float(farthest[g])) for g in largest if size[g] > 1]

    def at(self, threshold: float) -> Balance:
        """Return what `balance` with another threshold, at most `max_threshold`, would; without another search."""
        tolerance = Tolerance(threshold, self.metric)
        if threshold > self.max_threshold:
            raise InputError(f"threshold={threshold!r}: the search covers (0, {self.max_threshold!r}]. Search wider.")
        cut = _cut(self._joins, tolerance, self.group >= 0, self._represent, self.rule)
        return replace(self, **cut, threshold=threshold)


def balance(
    x: np.ndarray | Tensor | Sequence[Any],
    *,
    threshold: float | None = None,
    metric: Metric,
    rule: RuleName = "union-find",
    top_k: int | None = None,
    target_removed: float | None = None,
    max_threshold: float | None = None,
    valid: np.ndarray | Tensor | Sequence[bool] | None = None,
    memory_gb: float | None = None,
    device: str | torch.device | None = None,
) -> Balance:
    """Group rows closer than a threshold and choose of each group the row that is kept.

    Args:
        x: image embeddings, one row each, as an array or tensor of float16, float32 or float64, or as lists; a memory
            map is read in place.
        threshold: rows with distance < threshold are joined. Leave it out when `target_removed` is given.
        metric: `euclidean`, `sqeuclidean` or `cosine`, the unit of every distance here. Cosine looks at directions
            only. The other two take rows as they are, and published thresholds are for rows of unit length: other
            rows are grouped, too, with a `UserWarning` that names the first of them.
        rule: `union-find` joins rows by every pair, over chains too (single linkage), and keeps the row nearest to the
            mean of its group, as CLIP-CID does; `topk` joins only by each row's `top_k` nearest, as the paper's text
            says; `cover` keeps as many of a group as it takes that every row removed is below the threshold from the
            row that stands for it; `complete` joins groups only while all their rows are below the threshold from each
            other (complete linkage), where chains join at most 10,000 rows.
        top_k: list length of `topk`.
        target_removed: choose the threshold that removes this share of the valid rows (by the rule `cover`: to within
            0.0005, or the 4,096th part of `max_threshold`).
        max_threshold: search this far, for the curve, `Balance.at` and `target_removed`; default `threshold`. The
            rule `complete` may reach less far: `Balance.max_threshold` says how far.
        valid: rows to use; the others belong to no group. Default all.
        memory_gb: working memory of the search beyond the rows; default 1.
        device: where products are computed; default the CPU.

    Raises:
        InputError: arguments that contradict each other or lie outside their range, or a valid row that is not finite.
    """
    checked = Rule(
        metric=metric,
        threshold=threshold,
        rule=rule,
        top_k=top_k,
        target_removed=target_removed,
        max_threshold=max_threshold,
    )
    values = as_rows(x)
    used = _as_mask(valid, len(values))
    points = Points.of(values, metric=metric, valid=used)
    _warn_off_unit(points, used, metric)
    whole = search_forest(points, used, checked, memory_gb=memory_gb, device=device)
    return balance_parts(checked, used, parts=[whole], represent=lambda choose, group: choose(points, group))


def balance_parts(
    rule: Rule,
    valid: Bool[np.ndarray, " n"],
    *,
    parts: Iterable[Finding],
    represent: Represent,
    save: Callable[[Finding], None] | None = None,
) -> Balance:
    """Turn what the parts of a search found into groups and the rows kept of them.

    Args:
        rule: which rows are joined and kept.
        valid: rows that belong to a group.
        parts: forests over all rows, as the parts of the search finish; their order does not matter.
        represent: chooses the representatives; it reads the rows.
        save: called with the forest of all parts before the rows are read for the representatives.
    """
    # 1. The forest of all parts is the forest of their forests. Lists of nearest rows are searched in one part.
    builder = ForestBuilder(len(valid))
    saturated = None
    for part in parts:
        builder.add(part.forest.left, part.forest.right, part.forest.distance)
        saturated = part.saturated if saturated is None else saturated
    forest = builder.forest()
    if save is not None:
        save(Finding(forest=forest, saturated=saturated))
    # 2. The threshold, the groups below it, and their representatives.
    joins, farthest = forest, rule.farthest
    if rule.rule == "complete":
        near = Tolerance(rule.farthest, rule.metric)
        joins, farthest = complete_forest(forest, valid, needed=rule.threshold or 0.0, near=near, represent=represent)
    threshold = rule.threshold
    if threshold is None:
        if farthest < rule.farthest and len(joins) < (rule.target_removed or 0) * int(valid.sum()):
            raise InputError(
                f"target_removed={rule.target_removed!r} is out of reach of rule=complete: it fits up to the threshold "
                f"{farthest:.6g}, and removes {len(joins) / int(valid.sum()):.4f} there. Use rule=cover."
            )
        threshold = _threshold_for(rule, joins, valid, represent)
    tolerance = Tolerance(threshold, rule.metric)
    return Balance(
        **_cut(joins, tolerance, valid, represent, rule.rule),
        threshold=tolerance.threshold,
        metric=rule.metric,
        max_threshold=farthest,
        forest=forest,
        rule=rule.rule,
        saturated=saturated,
        _joins=joins,
        _represent=represent,
    )


def _cut(
    forest: Forest, tolerance: Tolerance, valid: Bool[np.ndarray, " n"], represent: Represent, rule: RuleName
) -> dict[str, Any]:
    """Return every row's group at a threshold, its representative, and the distance to that."""
    group = np.where(valid, forest.below(tolerance.threshold).groups(), -1)
    if rule == "cover":
        representative, squared = represent(partial(choose_cover, near=tolerance), group)
        group = cells(representative)
    else:
        representative, squared = represent(choose_representatives, group)
    return {"group": group, "representative": representative, "distance": tolerance.distance_of(squared)}


def _threshold_for(rule: Rule, forest: Forest, valid: Bool[np.ndarray, " n"], represent: Represent) -> float:
    """Return the threshold that removes the share asked for; `InputError` where none of those searched does."""
    wanted, num_valid = rule.target_removed, int(valid.sum())
    assert wanted is not None
    joined = threshold_for(forest, removed_ratio=wanted, num_valid=num_valid)
    if rule.rule != "cover":
        return joined

    def removed(threshold: float) -> float:
        cut = _cut(forest, Tolerance(threshold, rule.metric), valid, represent, "cover")
        return 1 - len(np.unique(cut["group"][valid])) / num_valid

    # A cover never removes more than single linkage, so its threshold lies from there on.
    low, high = joined, rule.farthest
    shares = {high: removed(high), low: removed(low)}
    if shares[high] < wanted:
        raise InputError(
            f"target_removed={wanted!r} is out of reach: at the largest threshold searched, a cover removes "
            f"{shares[high]:.4f}. Raise max_threshold."
        )
    for _ in range(SEARCH_STEPS):
        middle = (low + high) / 2
        shares[middle] = removed(middle)
        if abs(shares[middle] - wanted) <= NEAR_ENOUGH:
            return middle
        low, high = (middle, high) if shares[middle] < wanted else (low, middle)
    return min(shares, key=lambda threshold: (abs(shares[threshold] - wanted), threshold))


def _warn_off_unit(points: Points, valid: Bool[np.ndarray, " n"], metric: Metric) -> None:
    """Warn of rows without unit length; distances between such rows are right, and mostly not what was meant."""
    off = points.off_unit(valid)
    if len(off):
        warnings.warn(
            f"Row {off[0]} has length {points.norm[off[0]]:.4g}, not 1 ({len(off)} such rows): {metric} thresholds "
            "that are published, or found on other embeddings, are for unit rows. Normalise them "
            "(x / np.linalg.norm(x, axis=1, keepdims=True)) or use metric='cosine'. If lengths are meant, ignore this.",
            stacklevel=3,
        )


def _as_mask(valid: np.ndarray | Tensor | Sequence[bool] | None, num_rows: int) -> Bool[np.ndarray, " n"]:
    if valid is None:
        return np.ones(num_rows, bool)
    mask = valid.detach().cpu().numpy() if isinstance(valid, Tensor) else np.asarray(valid)
    if mask.dtype != bool or mask.shape != (num_rows,):
        raise InputError(f"valid must be one bool for each of the {num_rows} rows, not {mask.dtype} {mask.shape}.")
    return mask
