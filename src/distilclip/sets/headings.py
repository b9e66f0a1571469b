"""What every table of scores calls tasks and metrics, and which sets it averages. Imports no torch: reports use it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from distilclip.sets.catalogue import CATALOGUE, GROUPS

TASKS = {
    "zero-shot": "Zero-shot",
    "linear-probe": "Linear probe",
    "knn-probe": "k-nearest-neighbour probe",
    "few-shot": "Few-shot linear probe",
    "retrieval": "Retrieval",
    "agreement": "Agreement with the teacher",
}
METRICS = {
    "top1": "top-1",
    "top5": "top-5",
    "mean_per_class": "mean per class",
    **{f"image_to_text_r{k}": f"image to text R@{k}" for k in (1, 5, 10)},
    **{f"text_to_image_r{k}": f"text to image R@{k}" for k in (1, 5, 10)},
    "top1_agreement": "same top-1",
    "top5_agreement": "shared top-5",
    "cka": "CKA",
    "cosine": "cosine",
    "kl": "KL, nats",
}
AVERAGED = ("zero-shot", "linear-probe", "knn-probe", "few-shot")
"""Tasks whose scores may be averaged over sets."""


@dataclass(frozen=True)
class Mean:
    """A mean over sets; `name` says over how many and, where some are without a score, of how many."""

    name: str
    sets: tuple[str, ...]


def title(name: str) -> str:
    """The name of a task or metric in words; `16_shot` is 16-shot."""
    return TASKS.get(name) or METRICS.get(name) or name.replace("_shot", "-shot").replace("_", " ")


def means(sets: Sequence[str], *, scored: Collection[str]) -> list[Mean]:
    """The means of a task: over each group of the papers' sets and, where there are sets of one's own, over all.

    `sets` are those of the task, `scored` those that some model has a score on. A variant of a set takes part in none,
    and one set has no mean.
    """
    groups = {"papers' ": GROUPS["paper"], "robustness ": GROUPS["robustness"]}
    counted = tuple(dict.fromkeys(name for name in sets if name not in CATALOGUE or CATALOGUE[name].group != "variant"))
    if not CATALOGUE.keys() >= set(counted):
        groups[""] = counted
    found = []
    for group, members in groups.items():
        there = tuple(name for name in counted if name in members and name in scored)
        if len(there) > 1:
            of_all = f" of {len(members)}" if len(there) < len(members) else ""
            found.append(Mean(f"mean of {len(there)}{of_all} {group}sets", there))
    return found
