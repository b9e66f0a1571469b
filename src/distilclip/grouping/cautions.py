"""Say what is doubtful about a balance: a threshold that removes nearly everything is legal, and mostly a mistake.

>>> curve = Curve(
...     threshold=np.array([0.01, 0.02, 0.03]),
...     num_groups=np.array([90, 65, 5]),
...     removed_ratio=np.array([0.1, 0.35, 0.95]),
...     largest_group=np.array([2, 4, 90]),
... )
>>> smaller_threshold(curve, below=0.03)
1
>>> smaller_threshold(curve, below=0.02) is None
True
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from distilclip.grouping.forest import Curve, Forest, threshold_curve
from distilclip.vectors.tolerance import equivalents

# Shares of the valid images (removed, in one group) and of the removed ones (chained) from which on to speak.
MOST_REMOVED, LARGEST_SHARE, MOST_CHAINED = 0.8, 0.1, 0.5
# A threshold that removes a share between these is proposed. CLIP-CID removes 43.7 % of LAION-400M.
USUAL_REMOVED = (0.2, 0.5)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a balance did, in numbers of images; `num_chained` lie farther than the threshold from what is kept."""

    num_valid: int
    num_removed: int
    largest_group: int
    num_chained: int
    threshold: float
    metric: str
    rule: str = "union-find"


def list_cautions(outcome: Outcome, *, forest: Forest, curve: Curve) -> list[str]:
    """Return a text for each doubt: the number, why it matters, and what to try. None is the usual case.

    Args:
        outcome: what the balance did.
        forest: of all pairs searched; it tells what the same threshold in another metric would remove.
        curve: what other thresholds would do; those to try are taken from it.
    """
    cautions = []
    if outcome.num_removed > MOST_REMOVED * outcome.num_valid:
        cautions.append(_much_is_removed(outcome, forest, curve))
    # Two images of a dozen are a pair, not a chain.
    if outcome.largest_group > max(2, LARGEST_SHARE * outcome.num_valid):
        cautions.append(_one_group_is_large(outcome, curve))
    if outcome.num_chained > MOST_CHAINED * outcome.num_removed:
        cautions.append(_most_are_chained(outcome))
    return cautions


def smaller_threshold(curve: Curve, *, below: float) -> int | None:
    """Return the place in a curve that removes a usual share, nearest to the middle; None where no place does."""
    low, high = USUAL_REMOVED
    usual = (curve.threshold < below) & (curve.removed_ratio >= low) & (curve.removed_ratio <= high)
    cost = np.where(usual, np.abs(curve.removed_ratio - (low + high) / 2), np.inf)
    return int(cost.argmin()) if usual.any() else None


def _much_is_removed(outcome: Outcome, forest: Forest, curve: Curve) -> str:
    kept = outcome.num_valid - outcome.num_removed
    place = smaller_threshold(curve, below=outcome.threshold)
    if place is None:
        low, high = USUAL_REMOVED
        advice = f"Try a smaller threshold: none on the curve in result.json removes {low:.0%} to {high:.0%}."
    else:
        advice = f"Try --threshold {curve.threshold[place]:.4g}, which removes {curve.removed_ratio[place]:.1%}."
    return (
        f"{outcome.num_removed / outcome.num_valid:.1%} of the images are removed ({kept:,} of {outcome.num_valid:,} "
        "stay): copies are rarely so many, and pictures that only resemble each other were joined too. "
        f"{advice} {_other_readings(outcome, forest)}"
    )


def _other_readings(outcome: Outcome, forest: Forest) -> str:
    """Say what the threshold would remove if its number was meant in another metric."""
    same = equivalents(outcome.threshold, outcome.metric)
    meant = {name: equivalents(outcome.threshold, name)[outcome.metric] for name in same if name != outcome.metric}
    stricter = {name: value for name, value in meant.items() if value < outcome.threshold}
    if not stricter:
        return ""
    values = np.array(sorted(stricter.values()))
    removed = threshold_curve(forest, thresholds=values, num_valid=outcome.num_valid).removed_ratio
    shares = dict(zip(values.tolist(), removed.tolist(), strict=True))
    readings = [f"{name} (= {value:.3g}, removes {shares[value]:.1%})" for name, value in stricter.items()]
    return (
        f"Check the metric too: {outcome.threshold:.3g} was taken as {outcome.metric} distance; it may have been meant "
        f"as {' or '.join(readings)}."
    )


def _one_group_is_large(outcome: Outcome, curve: Curve) -> str:
    place = smaller_threshold(curve, below=outcome.threshold)
    smaller = "a smaller --threshold"
    if place is not None and curve.largest_group[place] <= LARGEST_SHARE * outcome.num_valid:
        smaller = f"--threshold {curve.threshold[place]:.4g} (largest group {curve.largest_group[place]:,})"
    why = "links between near pictures have chained together what does not belong together."
    if outcome.rule in ("cover", "complete"):
        why = "so many lie below the threshold from one image that is kept; do they all show the same?"
    return (
        f"One group holds {outcome.largest_group:,} of {outcome.num_valid:,} images "
        f"({outcome.largest_group / outcome.num_valid:.1%}): {why} "
        f"Try {smaller}, and look at the largest groups on the report's page."
    )


def _most_are_chained(outcome: Outcome) -> str:
    return (
        f"{outcome.num_chained:,} of {outcome.num_removed:,} removed images "
        f"({outcome.num_chained / outcome.num_removed:.1%}) are farther than the threshold from the image kept for "
        "them: only a chain of others joins the two, so what was kept does not stand for what was removed. Try "
        "--rule cover, which keeps more images of a group until every image is that near to a kept one."
    )
