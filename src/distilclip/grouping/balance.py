"""Image semantic balance (CLIP-CID, section 3.1): groups of similar images, and the one kept of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import no_type_check

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numba import njit
from torch import Tensor

from distilclip.errors import InputError, did_you_mean
from distilclip.grouping.forest import Curve, Forest, ForestBuilder, threshold_curve, threshold_for
from distilclip.grouping.near_pairs import near_pairs, nearest
from distilclip.vectors.kernels import SUM, kernel_view, stored
from distilclip.vectors.metric import distance, squared_threshold
from distilclip.vectors.points import Distinct, Points, distinct
from distilclip.vectors.threads import in_threads

NUM_CURVE_POINTS = 100

# Of every row's group (its smallest row, -1 for none): the representative and the squared distance to it.
Represent = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True, kw_only=True)
class Balance:
    """Groups of semantically similar rows and the representatives kept of them.

    `group` is the smallest row of a row's group, `representative` the kept row that stands for it, `distance` the
    distance between the two in the metric's unit. A row that is not valid has group and representative -1, an
    infinite distance, and is not kept.
    """

    group: Int[np.ndarray, " n"]
    representative: Int[np.ndarray, " n"]
    distance: Float[np.ndarray, " n"]
    threshold: float
    metric: str
    max_threshold: float
    forest: Forest
    saturated: float | None = None  # topk mode: share of rows whose list is full, where edges may be missing
    max_radius: float | None = None
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

    @property
    def curve(self) -> Curve:
        """What other thresholds up to `max_threshold` would do, at a hundred equal steps."""
        steps = self.max_threshold * np.arange(1, NUM_CURVE_POINTS + 1) / NUM_CURVE_POINTS
        return threshold_curve(self.forest, thresholds=steps, num_valid=self.num_valid)

    @property
    def num_chained(self) -> int:
        """Rows farther than the threshold from their representative: only a chain of others joins them to it."""
        return int((self.distance[self.representative >= 0] >= np.float32(self.threshold)).sum())

    def borderline(self, count: int) -> tuple[Forest, Forest]:
        """The pairs of the forest just under the threshold, nearest to it first, and those from it on."""
        stop = len(self.forest.below(self.threshold))
        return self.forest.at(np.arange(stop)[::-1][:count]), self.forest.at(np.arange(stop, len(self.forest))[:count])

    def largest_groups(self, count: int) -> list[tuple[int, int, float]]:
        """Groups of more than one row, largest first: smallest row, members, largest distance to a representative."""
        members = self.group >= 0
        size = np.bincount(self.group[members], minlength=len(self.group))
        largest = np.lexsort((np.arange(len(size)), -size))[:count]
        farthest = np.zeros(len(size), np.float32)
        np.maximum.at(farthest, self.group[members], self.distance[members])
        return [(int(g), int(size[g]), float(farthest[g])) for g in largest if size[g] > 1]

    def at(self, threshold: float) -> Balance:
        """What `balance` with another threshold, at most `max_threshold`, would return, without another search."""
        if not 0 < threshold <= self.max_threshold:
            raise InputError(f"threshold={threshold!r}: the search covers (0, {self.max_threshold!r}]. Search wider.")
        return cut(
            self.forest,
            represent=self._represent,
            valid=self.group >= 0,
            threshold=threshold,
            max_threshold=self.max_threshold,
            metric=self.metric,
            max_radius=self.max_radius,
            saturated=self.saturated,
        )


def balance(
    x: np.ndarray | Tensor,
    *,
    threshold: float | None = None,
    metric: str,
    mode: str = "threshold",
    top_k: int | None = None,
    max_radius: float | None = None,
    target_removed: float | None = None,
    max_threshold: float | None = None,
    valid: Bool[np.ndarray, " n"] | None = None,
    memory_gb: float | None = None,
    device: str | torch.device | None = None,
) -> Balance:
    """Group rows closer than a threshold (single linkage) and choose of each group the row nearest to its mean.

    Args:
        x: image embeddings, one row each; float16, float32 or float64; a memory map is read in place.
        threshold: rows with distance < threshold are joined. Leave it out when `target_removed` is given.
        metric: `euclidean`, `sqeuclidean` or `cosine`, the unit of every distance here.
        mode: `threshold` joins by every pair; `topk` only by each row's `top_k` nearest, as the paper's text does.
        top_k: list length in topk mode.
        max_radius: cover members farther than this from their representative by further representatives.
        target_removed: choose the threshold that removes this share of the valid rows (without `max_radius`).
        max_threshold: search this far, for the curve, `Balance.at` and `target_removed`; default `threshold`.
        valid: rows to use; the others belong to no group. Default all.
        memory_gb: working memory of the search beyond the rows; default 1.
        device: where products are computed; default the CPU.

    Raises:
        InputError: arguments that contradict each other or lie outside their range, or a valid row that is not finite.
    """
    max_threshold = largest_threshold(
        threshold=threshold,
        metric=metric,
        mode=mode,
        top_k=top_k,
        max_radius=max_radius,
        target_removed=target_removed,
        max_threshold=max_threshold,
    )
    points = Points.of(x, metric=metric, valid=valid)
    valid = np.ones(len(points), bool) if valid is None else valid
    saturated = None
    if top_k is None:
        forest = similarity_forest(
            points, valid, threshold=max_threshold, metric=metric, memory_gb=memory_gb, device=device
        )
    else:
        forest, saturated = nearest_forest(
            points, valid, threshold=max_threshold, metric=metric, top_k=top_k, memory_gb=memory_gb, device=device
        )
    if target_removed is not None:
        threshold = threshold_for(forest, removed_ratio=target_removed, num_valid=int(valid.sum()))
    assert threshold is not None  # largest_threshold asked for one of the two
    return cut(
        forest,
        represent=partial(representatives, points, metric=metric, max_radius=max_radius),
        valid=valid,
        threshold=threshold,
        max_threshold=max_threshold,
        metric=metric,
        max_radius=max_radius,
        saturated=saturated,
    )


def similarity_forest(
    points: Points,
    valid: Bool[np.ndarray, " n"],
    *,
    threshold: float,
    metric: str,
    split: int | None = None,
    memory_gb: float | None = None,
    device: str | torch.device | None = None,
) -> Forest:
    """The search: a minimum spanning forest of all pairs of valid rows closer than `threshold`.

    With `split`, of the pairs of a row before it and a row from it on (and of pairs of equal rows wherever they are):
    the forests of both sides and this one merge to the forest of all.
    """
    same, forest = _collapse(points, valid)
    near_pairs(
        points,
        same.first,
        threshold=threshold,
        metric=metric,
        into=forest,
        split=None if split is None else int(np.searchsorted(same.first, split)),
        memory_gb=memory_gb,
        device=device,
    )
    return forest.forest()


def nearest_forest(
    points: Points,
    valid: Bool[np.ndarray, " n"],
    *,
    threshold: float,
    metric: str,
    top_k: int,
    memory_gb: float | None = None,
    device: str | torch.device | None = None,
) -> tuple[Forest, float]:
    """The search of the paper's text: the same of each row's `top_k` nearest only (CLIP-CID, section 3.1).

    Also the share of rows whose list is full below the threshold: such a row may have further neighbours that its list
    has no place for.
    """
    same, forest = _collapse(points, valid)
    rows = np.flatnonzero(valid)
    lists = nearest(points, same.first, k=top_k, metric=metric, memory_gb=memory_gb, device=device)
    near = lists.distance < np.float32(threshold)
    forest.add(np.repeat(same.first, near.sum(axis=1)), lists.row[near], lists.distance[near])
    full = near.sum(axis=1) == top_k
    return forest.forest(), float(full[same.position[rows]].sum()) / max(len(rows), 1)


def _collapse(points: Points, valid: Bool[np.ndarray, " n"]) -> tuple[Distinct, ForestBuilder]:
    """The distinct valid rows, and a forest that joins each to its copies."""
    rows = np.flatnonzero(valid)
    same = distinct(points.values, rows)
    original = same.first[same.position[rows]]
    copied = original != rows
    forest = ForestBuilder(len(points))
    forest.add(original[copied], rows[copied], np.zeros(copied.sum(), np.float32))
    return same, forest


def cut(
    forest: Forest,
    *,
    represent: Represent,
    valid: Bool[np.ndarray, " n"],
    threshold: float,
    max_threshold: float,
    metric: str,
    max_radius: float | None = None,
    saturated: float | None = None,
) -> Balance:
    """The groups of a forest at a threshold, and their representatives."""
    group = np.where(valid, forest.below(threshold).groups(), -1)
    representative, squared = represent(group)
    return Balance(
        group=group,
        representative=representative,
        distance=distance(squared, metric),
        threshold=threshold,
        metric=metric,
        max_threshold=max_threshold,
        forest=forest,
        saturated=saturated,
        max_radius=max_radius,
        _represent=represent,
    )


def largest_threshold(
    *,
    threshold: float | None,
    metric: str,
    mode: str = "threshold",
    top_k: int | None = None,
    max_radius: float | None = None,
    target_removed: float | None = None,
    max_threshold: float | None = None,
) -> float:
    """How far to search; `InputError` for arguments that contradict each other."""
    if mode not in ("threshold", "topk"):
        raise InputError(f"mode={mode!r} is unknown. {did_you_mean(mode, ('threshold', 'topk'))}")
    if (mode == "topk") != (top_k is not None) or (top_k is not None and top_k < 1):
        raise InputError(f"top_k={top_k!r} with mode={mode!r}: topk mode takes a positive top_k, threshold mode none.")
    if (threshold is None) == (target_removed is None):
        raise InputError("Give either threshold or target_removed (with max_threshold), not both and not neither.")
    largest = threshold if max_threshold is None else max_threshold
    if largest is None:
        raise InputError("target_removed needs max_threshold: how far to search for the threshold that removes it.")
    for given in (largest, threshold, max_radius):
        if given is not None:
            squared_threshold(given, metric)
    if threshold is not None and threshold > largest:
        raise InputError(f"max_threshold={largest!r} is below threshold={threshold!r}.")
    return largest


# Two members of a pair are equally far from their mean; rounding must not choose between them, the smaller row must.
TIE = 1e-12


def representatives(
    points: Points,
    group: Int[np.ndarray, " n"],
    *,
    metric: str,
    max_radius: float | None = None,
) -> tuple[Int[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """Of every row, the representative that stands for it, and the squared distance to it (0 for itself).

    Args:
        points: the rows.
        group: of every row, the smallest row of its group; -1 for rows in no group, which get representative -1.
        metric: the unit of `max_radius`.
        max_radius: members farther than this from every representative of their group are covered by more: again and
            again the uncovered member nearest to the mean of the uncovered becomes one. A member belongs to the
            nearest representative.

    Returns the representative and the squared distance, infinite where there is none. Reads each row of the groups
    with more than one member a few times, group by group, and keeps one mean per thread.
    """
    alone = np.arange(len(group))
    chosen = np.where(group < 0, -1, alone)
    squared = np.where(group < 0, np.inf, 0.0)
    order = np.argsort(group, kind="stable")
    order = order[np.searchsorted(group[order], 0) :]
    first = np.flatnonzero(np.diff(group[order], prepend=-1))
    bounds = np.append(first, len(order))
    several = np.flatnonzero(np.diff(bounds) > 1)
    limit = np.inf if max_radius is None else squared_threshold(max_radius, metric) * (1 + 1e-7)
    values = kernel_view(points.values)
    in_threads(
        lambda start, stop: _choose(
            values, points.scale, order, bounds, several[start:stop], limit, TIE, chosen, squared
        ),
        len(several),
    )
    return chosen, squared


def representatives_in_batches(
    take: Callable[[Int[np.ndarray, " m"]], Float[np.ndarray, "m dim"]],
    group: Int[np.ndarray, " n"],
    *,
    metric: str,
    batch_rows: int,
    max_radius: float | None = None,
) -> tuple[Int[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """The same for rows that do not fit into memory: `take` reads those of several groups at a time.

    A batch holds whole groups, at most `batch_rows` rows unless one group has more. Rows alone in their group are not
    read.
    """
    alone = np.arange(len(group))
    chosen = np.where(group < 0, -1, alone)
    squared = np.where(group < 0, np.inf, 0.0)
    size = np.bincount(group[group >= 0], minlength=len(group))
    members = np.flatnonzero((group >= 0) & (size[group] > 1))
    members = members[np.argsort(group[members], kind="stable")]
    starts = np.flatnonzero(np.diff(group[members], prepend=-1))
    stops = np.append(starts[1:], len(members))
    begin = 0
    while begin < len(starts):
        end = max(begin + 1, int(np.searchsorted(stops, starts[begin] + batch_rows, side="right")))
        rows = np.sort(members[starts[begin] : stops[end - 1]])
        local = np.searchsorted(rows, group[rows])  # a group is called after its smallest row, which is among them
        found, squared[rows] = representatives(
            Points.of(take(rows), metric=metric), local, metric=metric, max_radius=max_radius
        )
        chosen[rows] = rows[found]
        begin = end
    return chosen, squared


@njit(nogil=True, cache=True, fastmath=SUM)
@no_type_check
def _choose(values, scale, order, bounds, groups, limit, tie, chosen, squared):
    for g in groups:
        members = order[bounds[g] : bounds[g + 1]]
        squared[members] = np.inf
        uncovered = members
        while len(uncovered):
            center = _nearest_to_mean(values, scale, uncovered, tie)
            for i in members:
                total = 0.0
                for k in range(values.shape[1]):
                    difference = scale[i] * stored(values[i, k]) - scale[center] * stored(values[center, k])
                    total += difference * difference
                if total < squared[i]:
                    squared[i], chosen[i] = total, center
            squared[center], chosen[center] = 0.0, center
            uncovered = uncovered[squared[uncovered] > limit]


@njit(nogil=True, cache=True, fastmath=SUM)
@no_type_check
def _nearest_to_mean(values, scale, members, tie):
    mean = np.zeros(values.shape[1])
    for i in members:
        for k in range(len(mean)):
            mean[k] += scale[i] * stored(values[i, k])
    mean /= len(members)
    squared = np.zeros(len(members))
    for m in range(len(members)):
        i = members[m]
        total = 0.0
        for k in range(len(mean)):
            difference = scale[i] * stored(values[i, k]) - mean[k]
            total += difference * difference
        squared[m] = total
    least = squared.min()
    for m in range(len(members)):
        if squared[m] <= least + tie:
            return members[m]
    return members[0]
