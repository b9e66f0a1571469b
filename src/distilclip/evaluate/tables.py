"""Scores as tables for people: one a task, in percent, as GitHub markdown or LaTeX."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distilclip.evaluate.catalogue import CATALOGUE, GROUPS
from distilclip.evaluate.references import REFERENCE_MODEL, reference

TASKS = {
    "zero-shot": "Zero-shot",
    "linear-probe": "Linear probe",
    "knn-probe": "k-nearest-neighbour probe",
    "few-shot": "Few-shot linear probe",
    "retrieval": "Retrieval",
    "agreement": "Agreement with the teacher",
}
METRICS = {
    "mean_per_class": "mean per class",
    "image_to_text_r1": "image to text R@1",
    "text_to_image_r1": "text to image R@1",
    "top1_agreement": "same top-1",
    "cka": "CKA",
}
AVERAGED = ("zero-shot", "linear-probe", "knn-probe", "few-shot")
MOST_COLUMNS = 8  # with more sets than this, sets are rows and models columns

_Key = tuple[str, str]  # set and metric
_Values = Mapping[tuple[str, _Key], float | None]  # by model


@dataclass(frozen=True, kw_only=True)
class Table:
    """The headline scores of one task in percent; each row begins with its name."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    notes: list[str]

    def markdown(self) -> str:
        """A GitHub table under its title, the notes below it."""
        lines = [self.columns, ["---", *["---:"] * (len(self.columns) - 1)], *self.rows]
        body = "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
        return "\n\n".join([f"## {self.title}", body, *self.notes]) + "\n"

    def latex(self) -> str:
        """A `tabular` with booktabs' rules, the title and the notes as comments."""
        head, *rows = (" & ".join(map(_escaped, line)) + r" \\" for line in (self.columns, *self.rows))
        lines = [
            f"% {self.title}",
            rf"\begin{{tabular}}{{l{'r' * (len(self.columns) - 1)}}}",
            r"\toprule",
            head,
            r"\midrule",
            *rows,
            r"\bottomrule",
            r"\end{tabular}",
            *(f"% {note}" for note in self.notes),
        ]
        return "\n".join(lines) + "\n"


def build_tables(rows: Sequence[Mapping[str, Any]]) -> list[Table]:
    """One table for each task that has scores, with the averages of the papers' groups and the reference's numbers.

    A score without a value shows as `-`, and a note says why. An average is over the sets that are there, and its name
    says of how many; a model that lacks one of them has none.
    """
    by_task = {task: [row for row in rows if row["task"] == task and row["headline"]] for task in TASKS}
    return [_build(task, shown) for task, shown in by_task.items() if shown]


def _build(task: str, shown: Sequence[Mapping[str, Any]]) -> Table:
    # A model may lack a score that others have, so columns are gathered over all models.
    keys: list[_Key] = list(dict.fromkeys((row["set"], row["metric"]) for row in shown))
    keys = [key for key in keys if not _is_stand_in(key, keys, shown)]
    models = list(dict.fromkeys(row["model"] for row in shown))
    values: dict[tuple[str, _Key], float | None] = {
        (row["model"], (row["set"], row["metric"])): None if row["value"] is None else 100 * row["value"]
        for row in shown
    }
    references = {key: reference(task, *key) for key in keys}
    if any(value is not None for value in references.values()):
        models.append(REFERENCE_MODEL)
        values.update({(REFERENCE_MODEL, key): value for key, value in references.items()})
    averages = _averages(keys, values, models) if task in AVERAGED else {}
    header = [*averages, *(_header(*key) for key in keys)]
    cells = [
        [
            *(_shown(average[model]) for average in averages.values()),
            *(_shown(values.get((model, key))) for key in keys),
        ]
        for model in models
    ]
    notes = [*_reasons(shown), *dict.fromkeys(note for row in shown for note in _notes(row))]
    if len(header) > MOST_COLUMNS:
        transposed = [[name, *column] for name, column in zip(header, zip(*cells, strict=True), strict=True)]
        return Table(title=TASKS[task], columns=["set", *models], rows=transposed, notes=notes)
    rows = [[model, *line] for model, line in zip(models, cells, strict=True)]
    return Table(title=TASKS[task], columns=["model", *header], rows=rows, notes=notes)


def _averages(keys: Sequence[_Key], values: _Values, models: Sequence[str]) -> dict[str, dict[str, float | None]]:
    """Means over the papers' groups and, where there are sets of one's own, over all; each says over how many."""
    names = {key[0] for key in keys}
    groups = {group: members for group, members in GROUPS.items() if names & set(members)}
    own = names - set(CATALOGUE)
    if own:
        groups = {**groups, "": tuple(names)}
    measured = [model for model in models if model != REFERENCE_MODEL]
    found: dict[str, dict[str, float | None]] = {}
    for group, members in groups.items():
        there = [k for k in keys if k[0] in members and any(values.get((m, k)) is not None for m in measured)]
        if len(there) < 2:
            continue
        of_all = f" of {len(members)}" if group and len(there) < len(members) else ""
        title = {"paper": "papers' ", "robustness": "robustness ", "": ""}.get(group, f"{group} ")
        name = f"mean of {len(there)}{of_all} {title}sets"
        found[name] = {model: _mean([values.get((model, key)) for key in there]) for model in models}
    return found


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if len(known) == len(values) else None


def _is_stand_in(key: _Key, keys: Sequence[_Key], shown: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a column without any value stands for one of the same set that has some."""
    if any((row["set"], row["metric"]) == key and row["value"] is not None for row in shown):
        return False
    return any(other != key and other[0] == key[0] for other in keys)


def _header(set_name: str, metric: str) -> str:
    metric = METRICS.get(metric, metric.replace("_", "-") if metric.endswith("_shot") else "")
    return f"{set_name}, {metric}" if metric else set_name


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _reasons(shown: Sequence[Mapping[str, Any]]) -> list[str]:
    """Why scores are missing, sets with the same reason together."""
    sets: dict[str, dict[str, None]] = {}
    for row in shown:
        if row["value"] is None:
            sets.setdefault(row["reason"], {})[row["set"]] = None
    return [f"{', '.join(names)}: {reason}." for reason, names in sets.items()]


def _notes(row: Mapping[str, Any]) -> list[str]:
    """What a reader must know of a score that there is."""
    if row["value"] is None:
        return []
    notes = []
    if row["num_unreadable"]:
        notes.append(f"{row['set']}: {row['num_unreadable']} images could not be read and are left out.")
    details = row.get("details", {})
    expected, found = details.get("published_num_test"), row["num_test"] + row["num_unreadable"]
    of_images = row["task"] != "agreement" and row["metric"] != "text_to_image_r1"
    if expected and of_images and expected != found:
        notes.append(f"{row['set']}: {found:,} test images; the published set has {expected:,}.")
    if row["metric"] == "image_to_text_r1":
        notes.append(_retrieval_rule(row["set"], row["num_test"], details))
    if "features" in details:
        notes.append(
            {"backbone": "Features before the projection.", "projected": "Projected features."}[details["features"]]
        )
    if details.get("clips_prompts") is False and row["task"] == "zero-shot":
        notes.append(
            f"{row['set']}: class names are the set's own labels, in one template, not CLIP's prompts. Install "
            "clip-benchmark (extra `eval`), or give --prompts."
        )
    return notes


def _retrieval_rule(name: str, num_images: int, details: Mapping[str, Any]) -> str:
    """What was searched, and what counts as found."""
    which = "any own caption counts" if details["captions"] == "all" else "the first caption of each image only"
    prefix = f", behind {details['caption_prefix']!r}" if details["caption_prefix"] else ""
    return f"{name}: {num_images:,} images, {details['num_captions']:,} captions; {which}{prefix}."


def _escaped(text: str) -> str:
    return re.sub(r"([&%$#_{}])", r"\\\1", text)
