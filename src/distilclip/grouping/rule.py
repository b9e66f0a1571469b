"""State which rows of a balance are joined and which are kept, as one checked value."""

from __future__ import annotations

import numbers
from dataclasses import dataclass

from distilclip.errors import InputError, did_you_mean
from distilclip.grouping.forest import Forest, threshold_for
from distilclip.vectors.metric import Tolerance, check_distance, check_metric


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Says which rows are joined and which are kept; the arguments of `balance`, checked.

    Raises:
        InputError: arguments that contradict each other or lie outside their range.
    """

    metric: str
    threshold: float | None = None
    mode: str = "threshold"
    top_k: int | None = None
    max_radius: float | None = None
    target_removed: float | None = None
    max_threshold: float | None = None

    def __post_init__(self) -> None:
        check_metric(self.metric)
        if self.mode not in ("threshold", "topk"):
            raise InputError(f"mode={self.mode!r} is unknown. {did_you_mean(str(self.mode), ('threshold', 'topk'))}")
        whole = isinstance(self.top_k, numbers.Integral) and self.top_k >= 1
        if not (whole if self.mode == "topk" else self.top_k is None):
            raise InputError(
                f"top_k={self.top_k!r} with mode={self.mode!r}: topk mode takes a positive whole top_k, "
                "threshold mode none."
            )
        if (self.threshold is None) == (self.target_removed is None):
            raise InputError("Give either threshold or target_removed (with max_threshold), not both and not neither.")
        for name in ("threshold", "max_threshold", "max_radius"):
            if getattr(self, name) is not None:
                check_distance(name, getattr(self, name))
        if self.target_removed is not None:
            share = self.target_removed
            if not (isinstance(share, numbers.Real) and 0 < share < 1):
                raise InputError(f"target_removed={share!r} must lie between 0 and 1.")
            if self.max_threshold is None:
                raise InputError("target_removed needs max_threshold: how far to search for the threshold it needs.")
        if self.threshold is not None and self.threshold > self.reach.threshold:
            raise InputError(f"max_threshold={self.max_threshold!r} is below threshold={self.threshold!r}.")

    @property
    def reach(self) -> Tolerance:
        """How far to search."""
        farthest = self.threshold if self.max_threshold is None else self.max_threshold
        assert farthest is not None  # there is a max_threshold where there is no threshold
        return Tolerance(farthest, self.metric)

    @property
    def radius(self) -> Tolerance | None:
        """How far a row may be from the one kept for it."""
        return None if self.max_radius is None else Tolerance(self.max_radius, self.metric)

    def tolerance(self, forest: Forest, num_valid: int) -> Tolerance:
        """Return the threshold given, or the one that removes the share of the valid rows that is asked for."""
        threshold = self.threshold
        if threshold is None:
            assert self.target_removed is not None
            threshold = threshold_for(forest, removed_ratio=self.target_removed, num_valid=num_valid)
        return Tolerance(threshold, self.metric)
