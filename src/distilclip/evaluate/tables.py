"""Build a table of scores for each task, in percent, for the terminal and as GitHub markdown."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distilclip.sets.references import PAPER_ONLY, REFERENCE_MODEL, is_comparable, reference
from distilclip.sets.score import AVERAGED, TASKS, Score, means, title

MOST_COLUMNS = 8  # with more sets than this, sets are rows and models columns

_Key = tuple[str, str]  # set and metric
_Values = Mapping[tuple[str, _Key], float | None]  # by model
_FEATURES = {
    "backbone": "Features before the projection.",
    "embedding": "{model}: embeddings before they are normalised; its image tower has no layer before its projection.",
    "projected": "Projected features.",
}


@dataclass(frozen=True, kw_only=True)
class TaskTable:
    """Hold the headline scores of one task in percent; each row begins with its name."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    notes: list[str]

    def markdown(self) -> str:
        """Return a GitHub table under its title, with the notes below it."""
        lines = [self.columns, ["---", *["---:"] * (len(self.columns) - 1)], *self.rows]
        body = "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
        return "\n\n".join([f"## {self.title}", body, *self.notes]) + "\n"


def build_tables(scores: Sequence[Score]) -> list[TaskTable]:
    """Build a table for each task that has scores, with the means over the papers' groups and the reference's numbers.

    A score without a value shows as `-`, and a note says why. A mean is over the sets that have a score, and its
    name says of how many; a model that lacks one of them has none.
    """
    by_task = {task: [score for score in scores if score.task == task and score.headline] for task in TASKS}
    return [_build(task, headlines) for task, headlines in by_task.items() if headlines]


def _build(task: str, headlines: Sequence[Score]) -> TaskTable:
    # A model may lack a score that others have, so columns are gathered over all models.
    keys: list[_Key] = list(dict.fromkeys((score.set, score.metric) for score in headlines))
    keys = [key for key in keys if not _is_stand_in(key, keys, headlines)]
    models = list(dict.fromkeys(score.model for score in headlines))
    values: dict[tuple[str, _Key], float | None] = {
        (score.model, (score.set, score.metric)): None if score.value is None else 100 * score.value
        for score in headlines
    }
    references = _references(task, keys, headlines)
    if references:
        models.append(REFERENCE_MODEL)
        values.update({(REFERENCE_MODEL, key): value for key, value in references.items()})
    averages = _mean_values(keys, values, models) if task in AVERAGED else {}
    header = [*averages, *(_header(*key) for key in keys)]
    cells = [
        [
            *(_format(average[model]) for average in averages.values()),
            *(_format(values.get((model, key))) for key in keys),
        ]
        for model in models
    ]
    notes = [*_reasons(headlines), *dict.fromkeys(note for score in headlines for note in _notes(score))]
    if references:
        notes.append(_source_of(task, [set_name for set_name, _ in references]))
    if len(header) > MOST_COLUMNS:
        transposed = [[name, *column] for name, column in zip(header, zip(*cells, strict=True), strict=True)]
        return TaskTable(title=TASKS[task], columns=["set", *models], rows=transposed, notes=notes)
    rows = [[model, *line] for model, line in zip(models, cells, strict=True)]
    return TaskTable(title=TASKS[task], columns=["model", *header], rows=rows, notes=notes)


def _references(task: str, keys: Sequence[_Key], headlines: Sequence[Score]) -> dict[_Key, float]:
    """Return the reference's numbers, without sets that were measured in another way; none if nothing is comparable."""
    comparable: dict[_Key, bool] = {}  # of the sets that have a score
    for score in headlines:
        if score.value is not None:
            key = score.set, score.metric
            comparable[key] = comparable.get(key, True) and is_comparable(task, score.details)
    known = {key: value for key in keys if comparable.get(key, True) and (value := reference(task, *key)) is not None}
    return known if comparable.keys() & known.keys() else {}


def _source_of(task: str, sets: Sequence[str]) -> str:
    """Say where the reference's numbers come from."""
    papers = [name for name in sets if name in PAPER_ONLY.get(task, ())]
    if len(papers) == len(sets):
        return f"{REFERENCE_MODEL}: from the CLIP paper."
    exceptions = f"; {', '.join(papers)} from the CLIP paper" if papers else ""
    return f"{REFERENCE_MODEL}: its weights run again{exceptions}."


def _mean_values(keys: Sequence[_Key], values: _Values, models: Sequence[str]) -> dict[str, dict[str, float | None]]:
    """Return the means of every model, by the name of the mean; None for a model that lacks one of the sets."""
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


def _is_stand_in(key: _Key, keys: Sequence[_Key], headlines: Sequence[Score]) -> bool:
    """Return whether a column has no value while another column of the same set exists."""
    if any((score.set, score.metric) == key and score.value is not None for score in headlines):
        return False
    return any(other != key and other[0] == key[0] for other in keys)


def _header(set_name: str, metric: str) -> str:
    return set_name if metric == "top1" else f"{set_name}, {title(metric)}"


def _format(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _reasons(headlines: Sequence[Score]) -> list[str]:
    """Say why scores are missing, sets with the same reason together."""
    sets: dict[str, dict[str, None]] = {}
    for score in headlines:
        if score.value is None:
            sets.setdefault(score.reason, {})[score.set] = None
    return [f"{', '.join(names)}: {reason}." for reason, names in sets.items()]


def _notes(score: Score) -> list[str]:
    """Say what a reader must know about a score."""
    if score.value is None:
        return []
    notes = []
    if score.num_unreadable:
        notes.append(f"{score.set}: {score.num_unreadable} images could not be read and are left out.")
    details = score.details
    expected, found = details.get("published_num_test"), score.num_test + score.num_unreadable
    of_images = score.task != "agreement" and score.metric != "text_to_image_r1"
    if expected and of_images and expected != found:
        notes.append(f"{score.set}: {found:,} test images; the published set has {expected:,}.")
    if score.metric == "image_to_text_r1":
        notes.append(_retrieval_rule(score.set, score.num_test, details))
    if "features" in details:
        notes.append(_FEATURES[details["features"]].format(model=score.model))
    if details.get("own_templates"):
        notes.append("Templates of one's own (--templates), not the sets'.")
    elif details.get("clips_prompts", True) is None and score.task == "zero-shot":
        notes.append(f"{score.set}: class names and templates are those in its folder, which may not be CLIP's.")
    elif details.get("clips_prompts") is False and score.task == "zero-shot":
        notes.append(
            f"{score.set}: class names are the set's own labels, in one template, not CLIP's prompts. Install "
            "clip-benchmark (extra `eval`), or give --prompts."
        )
    return notes


def _retrieval_rule(name: str, num_images: int, details: Mapping[str, Any]) -> str:
    """Say what was searched, and what counts as found."""
    which = "any own caption counts" if details["captions"] == "all" else "the first caption of each image only"
    prefix = f", behind {details['caption_prefix']!r}" if details["caption_prefix"] else ""
    return f"{name}: {num_images:,} images, {details['num_captions']:,} captions; {which}{prefix}."
