"""Build a table of scores for each task, in percent, for the terminal and as GitHub markdown."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distilclip.evaluate.wording_notes import note_wording
from distilclip.sets.published import PublishedRow, published_notes
from distilclip.sets.references import PAPER_ONLY, REFERENCE_MODEL, is_comparable, reference
from distilclip.sets.score import AVERAGED, TASKS, Mean, Score, mean_interval_of, mean_of, means, title

MOST_COLUMNS = 8  # with more sets than this, sets are rows and models columns

_Key = tuple[str, str]  # set and metric
_Cells = Mapping[tuple[str, _Key], "_Cell"]  # by model
_FEATURES = {
    "backbone": "Features before the projection.",
    "embedding": "{model}: embeddings before they are normalised; its image tower has no layer before its projection.",
    "projected": "Projected features.",
}


@dataclass(frozen=True)
class _Cell:
    """A score in percent, and half the width of its 95 % interval; None where there is none."""

    value: float | None
    reach: float | None = None

    @property
    def text(self) -> str:
        """Return `66.0 ±1.9`, without the second number where there is no interval."""
        if self.value is None:
            return "-"
        return f"{self.value:.1f}" + ("" if self.reach is None else f" ±{self.reach:.1f}")


_NONE = _Cell(None)


@dataclass(frozen=True, kw_only=True)
class TaskTable:
    """Hold the headline scores of one task in percent; each row begins with its name.

    Behind a score stands half the width of its 95 % interval, and a note says so.
    """

    title: str
    columns: list[str]
    rows: list[list[str]]
    notes: list[str]

    def markdown(self) -> str:
        """Return a GitHub table under its title, with the notes below it."""
        lines = [self.columns, ["---", *["---:"] * (len(self.columns) - 1)], *self.rows]
        body = "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
        return "\n\n".join([f"## {self.title}", body, *self.notes]) + "\n"


def build_tables(scores: Sequence[Score], published: Sequence[PublishedRow] = ()) -> list[TaskTable]:
    """Build a table for each task that has scores, with the means over the papers' groups and the reference's numbers.

    A score without a value shows as `-`, and a note says why. A mean is over the sets that have a score, and its
    name says of how many; a model that lacks one of them has none. `published` rows follow the models where they have a
    number for any set of the table, as the papers print them.
    """
    by_task = {task: [score for score in scores if score.task == task and score.headline] for task in TASKS}
    return [_build(task, headlines, published) for task, headlines in by_task.items() if headlines]


def table_near_copies(sets: Mapping[str, Mapping[str, Any]]) -> TaskTable:
    """Build the table of the share of each set's test images that have a near copy in the training data.

    `sets` holds by name what `TrainingImages.count_copies` says of each, or a `reason` why it is not known.
    """
    rows, said = [], next((found for found in sets.values() if "share" in found), None)
    for name, found in sets.items():
        counts = [f"{found['num_pictures']:,}", f"{found['num_near']:,}"] if "share" in found else ["-", "-"]
        rows.append([name, *counts, f"{100 * found['share']:.2f}" if "share" in found else "-"])
    notes = [f"{name}: {found['reason']}." for name, found in sets.items() if "reason" in found]
    if said is not None:
        notes.append(
            f"A near copy: an image of {said['training_store']} whose embedding by {said['teacher']} has a cosine of "
            f"{said['threshold']:g} or more."
        )
    columns = ["set", "test images", "with a near copy", "share"]
    return TaskTable(
        title="Copies of test images in the training data (percent)", columns=columns, rows=rows, notes=notes
    )


def _build(task: str, headlines: Sequence[Score], published: Sequence[PublishedRow]) -> TaskTable:
    # A model may lack a score that others have, so columns are gathered over all models.
    keys: list[_Key] = list(dict.fromkeys((score.set, score.metric) for score in headlines))
    keys = [key for key in keys if not _is_stand_in(key, keys, headlines)]
    models = list(dict.fromkeys(score.model for score in headlines))
    values = {(score.model, (score.set, score.metric)): _cell([score]) for score in headlines}
    references = _references(task, keys, headlines)
    if references:
        models.append(REFERENCE_MODEL)
        values.update({(REFERENCE_MODEL, key): _Cell(value) for key, value in references.items()})
    averages = _mean_cells(keys, values, models, headlines) if task in AVERAGED else {}
    header = [*(mean.name for mean in averages), *(_header(*key) for key in keys)]
    cells = [
        [
            *(average[model].text for average in averages.values()),
            *(values.get((model, key), _NONE).text for key in keys),
        ]
        for model in models
    ]
    sets = {name for name, _ in keys}
    shown = [row for row in published if row.has(task, sets)]
    models += [row.name for row in shown]
    cells += [_published_cells(row, task, list(averages), keys) for row in shown]
    notes = [*_reasons(headlines), *dict.fromkeys(note for score in headlines for note in _notes(score))]
    notes += note_wording(headlines)
    if any(cell.reach is not None for cell in values.values()):
        notes.append(
            "± is half the width of the 95 % interval over the test images; another training seed is not in it."
        )
    if references:
        notes.append(_source_of(task, [set_name for set_name, _ in references]))
    notes += published_notes(shown, task, sets)
    if len(header) > MOST_COLUMNS:
        transposed = [[name, *column] for name, column in zip(header, zip(*cells, strict=True), strict=True)]
        return TaskTable(title=TASKS[task], columns=["set", *models], rows=transposed, notes=notes)
    rows = [[model, *line] for model, line in zip(models, cells, strict=True)]
    return TaskTable(title=TASKS[task], columns=["model", *header], rows=rows, notes=notes)


def _published_cells(row: PublishedRow, task: str, averages: Sequence[Mean], keys: Sequence[_Key]) -> list[str]:
    """Return the cells of a published row: of a mean only where the paper's is over the same sets."""
    texts = [row.text(task, mean.name, mean.sets) for mean in averages]
    return [text or _NONE.text for text in (*texts, *(row.text(task, name) for name, _ in keys))]


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


def _mean_cells(
    keys: Sequence[_Key], values: _Cells, models: Sequence[str], headlines: Sequence[Score]
) -> dict[Mean, dict[str, _Cell]]:
    """Return the means of every model; none for a model that lacks one of the sets."""
    measured = {(score.model, (score.set, score.metric)): score for score in headlines if score.value is not None}
    scored = [key for key in keys if any(key == found for _, found in measured)]
    found: dict[Mean, dict[str, _Cell]] = {}
    for mean in means([name for name, _ in keys], scored={name for name, _ in scored}):
        members = [key for key in scored if key[0] in mean.sets]
        found[mean] = {model: _mean_cell(model, members, values, measured) for model in models}
    return found


def _mean_cell(
    model: str, members: Sequence[_Key], values: _Cells, measured: Mapping[tuple[str, _Key], Score]
) -> _Cell:
    known = [value for key in members if (value := values.get((model, key), _NONE).value) is not None]
    if len(known) < len(members):
        return _NONE
    scores = [measured[model, key] for key in members if (model, key) in measured]
    return _cell(scores) if scores else _Cell(statistics.fmean(known))  # the reference has no scores of ours


def _cell(scores: Sequence[Score]) -> _Cell:
    """Return the mean of some scores in percent, with its interval where all have one."""
    if any(score.value is None for score in scores):
        return _NONE
    interval = mean_interval_of(scores)
    return _Cell(100 * mean_of(scores), None if interval is None else 50 * (interval[1] - interval[0]))


def _is_stand_in(key: _Key, keys: Sequence[_Key], headlines: Sequence[Score]) -> bool:
    """Return whether a column has no value while another column of the same set exists."""
    if any((score.set, score.metric) == key and score.value is not None for score in headlines):
        return False
    return any(other != key and other[0] == key[0] for other in keys)


def _header(set_name: str, metric: str) -> str:
    return set_name if metric == "top1" else f"{set_name}, {title(metric)}"


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
    elif "templates_source" in details and score.task == "zero-shot":
        notes.append(f"{score.set}: templates {details['templates_source']}.")
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
