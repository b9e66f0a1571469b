"""Image semantic balance (CLIP-CID, section 3.1): groups of similar images, and the one kept of each."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from distilclip.errors import InputError, did_you_mean
from distilclip.ops import groups
from distilclip.ops.groups import Curve, Forest, ForestBuilder
from distilclip.ops.metric import distance, squared_threshold
from distilclip.ops.neighbours import near_pairs, nearest
from distilclip.ops.points import Points, distinct
from distilclip.ops.representatives import representatives

NUM_CURVE_POINTS = 100


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
    _points: Points = field(repr=False)

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
        return groups.curve(self.forest, thresholds=steps, num_valid=self.num_valid)

    def at(self, threshold: float) -> Balance:
        """What `balance` with another threshold, at most `max_threshold`, would return, without another search."""
        if not 0 < threshold <= self.max_threshold:
            raise InputError(f"threshold={threshold!r}: the search covers (0, {self.max_threshold!r}]. Search wider.")
        return cut(
            self._points,
            self.forest,
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
    forest, saturated = similarity_forest(
        points, valid, threshold=max_threshold, metric=metric, top_k=top_k, memory_gb=memory_gb, device=device
    )
    if target_removed is not None:
        threshold = groups.threshold_for(forest, removed_ratio=target_removed, num_valid=int(valid.sum()))
    assert threshold is not None  # largest_threshold asked for one of the two
    return cut(
        points,
        forest,
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
    top_k: int | None = None,
    memory_gb: float | None = None,
    device: str | torch.device | None = None,
) -> tuple[Forest, float | None]:
    """The search: a minimum spanning forest of all pairs of valid rows closer than `threshold`.

    With `top_k`, of each row's `top_k` nearest only, and the share of rows whose list is full below the threshold:
    such a row may have further neighbours that its list has no place for.
    """
    rows = np.flatnonzero(valid)
    same = distinct(points.values, rows)
    original = same.first[same.position[rows]]
    copied = original != rows
    forest = ForestBuilder(len(points))
    forest.add(original[copied], rows[copied], np.zeros(copied.sum(), np.float32))
    if top_k is None:
        near_pairs(
            points, same.first, threshold=threshold, metric=metric, into=forest, memory_gb=memory_gb, device=device
        )
        return forest.forest(), None
    lists = nearest(points, same.first, k=top_k, metric=metric, memory_gb=memory_gb, device=device)
    near = lists.distance < np.float32(threshold)
    forest.add(np.repeat(same.first, near.sum(axis=1)), lists.row[near], lists.distance[near])
    full = near.sum(axis=1) == top_k
    return forest.forest(), float(full[same.position[rows]].sum()) / max(len(rows), 1)


def cut(
    points: Points,
    forest: Forest,
    *,
    valid: Bool[np.ndarray, " n"],
    threshold: float,
    max_threshold: float,
    metric: str,
    max_radius: float | None = None,
    saturated: float | None = None,
) -> Balance:
    """The groups of a forest at a threshold, and their representatives."""
    group = np.where(valid, forest.below(threshold).groups(), -1)
    representative, squared = representatives(points, group, metric=metric, max_radius=max_radius)
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
        _points=points,
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
