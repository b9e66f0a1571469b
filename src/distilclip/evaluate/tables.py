"""Scores as tables for people: one a task, in percent, as GitHub markdown or LaTeX."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distilclip.sets.headings import AVERAGED, TASKS, means, title
from distilclip.sets.references import PAPER_ONLY, REFERENCE_MODEL, is_comparable, reference

MOST_COLUMNS = 8  # with more sets than this, sets are rows and models columns

_Key = tuple[str, str]  # set and metric
_Values = Mapping[tuple[str, _Key], float | None]  # by model
_FEATURES = {
    "backbone": "Features before the projection.",
    "embedding": "{model}: embeddings before they are normalised; its image tower has no layer before its projection.",
    "projected": "Projected features.",
}
_LATEX = {
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
    **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"},
}


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
    references = _references(task, keys, shown)
    if references:
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
    if references:
        notes.append(_source_of(task, [set_name for set_name, _ in references]))
    if len(header) > MOST_COLUMNS:
        transposed = [[name, *column] for name, column in zip(header, zip(*cells, strict=True), strict=True)]
        return Table(title=TASKS[task], columns=["set", *models], rows=transposed, notes=notes)
    rows = [[model, *line] for model, line in zip(models, cells, strict=True)]
    return Table(title=TASKS[task], columns=["model", *header], rows=rows, notes=notes)


def _references(task: str, keys: Sequence[_Key], shown: Sequence[Mapping[str, Any]]) -> dict[_Key, float]:
    """The reference's numbers; none on a set that was measured otherwise, none at all where none is to compare with."""
    comparable: dict[_Key, bool] = {}  # of the sets that have a score
    for row in shown:
        if row["value"] is not None:
            key = row["set"], row["metric"]
            comparable[key] = comparable.get(key, True) and is_comparable(task, row["details"])
    known = {key: value for key in keys if comparable.get(key, True) and (value := reference(task, *key)) is not None}
    return known if comparable.keys() & known.keys() else {}


def _source_of(task: str, sets: Sequence[str]) -> str:
    """Where the reference's numbers come from."""
    papers = [name for name in sets if name in PAPER_ONLY.get(task, ())]
    if len(papers) == len(sets):
        return f"{REFERENCE_MODEL}: from the CLIP paper."
    exceptions = f"; {', '.join(papers)} from the CLIP paper" if papers else ""
    return f"{REFERENCE_MODEL}: its weights run again{exceptions}."


def _averages(keys: Sequence[_Key], values: _Values, models: Sequence[str]) -> dict[str, dict[str, float | None]]:
    """The means of every model by their name; none of a model that lacks one of the sets."""
    measured = [model for model in models if model != REFERENCE_MODEL]
    scored = [key for key in keys if any(values.get((model, key)) is not None for model in measured)]
    found = means([name for name, _ in keys], scored={name for name, _ in scored})
    return {
        mean.name: {
            model: _mean([values.get((model, key)) for key in scored if key[0] in mean.sets]) for model in models
        }
        for mean in found
    }


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if len(known) == len(values) else None


def _is_stand_in(key: _Key, keys: Sequence[_Key], shown: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a column without any value stands for one of the same set that has some."""
    if any((row["set"], row["metric"]) == key and row["value"] is not None for row in shown):
        return False
    return any(other != key and other[0] == key[0] for other in keys)


def _header(set_name: str, metric: str) -> str:
    return set_name if metric == "top1" else f"{set_name}, {title(metric)}"


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
        notes.append(_FEATURES[details["features"]].format(**row))
    if details.get("own_templates"):
        notes.append("Templates of one's own (--templates), not the sets'.")
    elif details.get("clips_prompts", True) is None and row["task"] == "zero-shot":
        notes.append(f"{row['set']}: class names and templates are those in its folder, which may not be CLIP's.")
    elif details.get("clips_prompts") is False and row["task"] == "zero-shot":
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
    return "".join(_LATEX.get(sign, sign) for sign in text)
