"""State which rows of a balance are joined and which are kept, as one checked value."""

from __future__ import annotations

import numbers
from dataclasses import dataclass
from typing import Literal, get_args

from distilclip.errors import InputError, did_you_mean
from distilclip.vectors.metric import Metric, check_distance, check_metric

RuleName = Literal["union-find", "topk", "cover", "complete"]
"""Join rows by every pair below the threshold and keep one of each group, as CLIP-CID's figures do; or join only by
lists of each row's nearest, as its text says; or keep as many as it takes that one is near to every row removed; or
join groups only while all their rows are near each other."""


WHY_NO_LISTS = "the lists of old rows change where new rows are nearer, and they are not kept. Run it from scratch."
"""Why lists of each row's nearest cannot be extended when rows are added."""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Says which rows are joined and which are kept; the arguments of `balance`, checked.

    Raises:
        InputError: arguments that contradict each other or lie outside their range.
    """

    metric: Metric
    threshold: float | None = None
    rule: RuleName = "union-find"
    top_k: int | None = None
    target_removed: float | None = None
    max_threshold: float | None = None

    def __post_init__(self) -> None:
        check_metric(self.metric)
        if self.rule not in get_args(RuleName):
            raise InputError(f"rule={self.rule!r} is unknown. {did_you_mean(str(self.rule), get_args(RuleName))}")
        whole = isinstance(self.top_k, numbers.Integral) and self.top_k >= 1
        if not (whole if self.rule == "topk" else self.top_k is None):
            raise InputError(
                f"top_k={self.top_k!r} with rule={self.rule!r}: topk takes a positive whole top_k, others none."
            )
        if (self.threshold is None) == (self.target_removed is None):
            raise InputError("Give either threshold or target_removed (with max_threshold), not both and not neither.")
        for name in ("threshold", "max_threshold"):
            if getattr(self, name) is not None:
                check_distance(name, getattr(self, name))
        if self.target_removed is not None:
            share = self.target_removed
            if not (isinstance(share, numbers.Real) and 0 < share < 1):
                raise InputError(f"target_removed={share!r} must lie between 0 and 1.")
            if self.max_threshold is None:
                raise InputError("target_removed needs max_threshold: how far to search for the threshold it needs.")
        if self.threshold is not None and self.threshold > self.farthest:
            raise InputError(f"max_threshold={self.max_threshold!r} is below threshold={self.threshold!r}.")

    @property
    def farthest(self) -> float:
        """How far to search, in the metric's unit."""
        farthest = self.threshold if self.max_threshold is None else self.max_threshold
        assert farthest is not None  # there is a max_threshold where there is no threshold
        return farthest
