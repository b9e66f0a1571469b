"""The comparison: who is teacher, baseline and student, and every headline score of each, with its gain."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

from distilclip.report.load import Results, Score, Training

Role = Literal["teacher", "baseline", "student", "other"]

TASKS = {
    "zero-shot": "Zero-shot",
    "linear-probe": "Linear probe",
    "retrieval": "Retrieval",
    "agreement": "Agreement with the teacher",
}
METRICS = {
    "top1": "top-1",
    "top5": "top-5",
    "mean_per_class": "mean per class",
    "image_to_text_r1": "image→text R@1",
    "text_to_image_r1": "text→image R@1",
}
MAX_COLUMNS = 12  # more than this in one table no longer fits a page, so each task gets its own


@dataclass(frozen=True, kw_only=True)
class Model:
    """One compared model. `series` is its place in the palette, the same in every table and figure."""

    name: str
    role: Role
    series: int
    training: Training | None = None


@dataclass(frozen=True, kw_only=True)
class Column:
    """What one column of scores holds. A mean over sets has the set name `mean` and no size."""

    task: str
    set: str
    metric: str
    chance: float | None = None
    num_test: int | None = None


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One score and its gain over the baseline, as fractions; None where there is none."""

    value: float | None
    gain: float | None
    best: bool


@dataclass(frozen=True, kw_only=True)
class Row:
    """One model's scores, a cell per column."""

    model: Model
    cells: list[Cell]


@dataclass(frozen=True, kw_only=True)
class Table:
    """Scores of all models in some columns, teacher first, then baseline, students and others."""

    columns: list[Column]
    rows: list[Row]

    @property
    def tasks(self) -> list[tuple[str, int]]:
        """Each task's title and how many columns it spans, for the upper header row."""
        return [(title(task), len(list(columns))) for task, columns in groupby(self.columns, lambda c: c.task)]

    @property
    def has_chance(self) -> bool:
        """Whether the chance level of any column is known."""
        return any(column.chance is not None for column in self.columns)

    def select(self, columns: Iterable[Column]) -> Table:
        """The same models in some of the columns."""
        places = [self.columns.index(column) for column in columns]
        rows = [Row(model=row.model, cells=[row.cells[i] for i in places]) for row in self.rows]
        return Table(columns=[self.columns[i] for i in places], rows=rows)

    def of_task(self, task: str) -> Table:
        """The columns of one task."""
        return self.select([column for column in self.columns if column.task == task])

    def split(self) -> list[Table]:
        """One table where it fits, else one per task."""
        if len(self.columns) <= MAX_COLUMNS:
            return [self] if self.columns else []
        return [self.of_task(task) for task, _ in groupby(column.task for column in self.columns)]


def title(task: str) -> str:
    """A task's or metric's name as the page prints it."""
    return TASKS.get(task) or METRICS.get(task) or task.replace("_", " ").replace("-", " ")


def models(results: Results) -> list[Model]:
    """Every model that was scored or trained: the teacher first, then baseline, students and others.

    The teacher is what an embed or train folder names as its teacher; the baseline is the first student whose
    objective has the task term alone.
    """
    trainings, references = results.trainings, _teacher_references(results)
    named = {score.model: _training_of(score, trainings) for score in results.scores}
    digests = {score.model: score.digest for score in results.scores}
    told = {training.path for training in named.values() if training is not None}
    named.update({training.name: training for training in trainings if training.path not in told})

    def is_teacher(name: str) -> bool:
        training = named[name]
        known = {name, digests.get(name, "")} - {""}
        paths = [] if training is None else [training.path.rstrip("/")]
        return any(ref in known or any(ref == p or ref.startswith(p + "/") for p in paths) for ref in references)

    roles: dict[str, Role] = {}
    for name, training in named.items():
        if is_teacher(name):
            roles[name] = "teacher"
        elif training is None:
            roles[name] = "other"
        elif not training.distilled and "baseline" not in roles.values():
            roles[name] = "baseline"
        else:
            roles[name] = "student"
    order: list[Role] = ["teacher", "baseline", "student", "other"]
    ordered = sorted(named, key=lambda name: order.index(roles[name]))
    num_teachers = sum(role == "teacher" for role in roles.values())
    return [
        Model(name=name, role=roles[name], series=max(0, place - num_teachers + 1), training=named[name])
        for place, name in enumerate(ordered)
    ]


def compare(scores: Sequence[Score], compared: Sequence[Model]) -> Table:
    """The headline scores of all models: one metric per classification set, R@1 both ways per retrieval set."""
    columns = _headline_columns(scores)
    values = {(s.model, s.task, s.set, s.metric): s.value for s in scores}
    scored = [model for model in compared if any(score.model == model.name for score in scores)]
    grid = {m.name: [_value(values, m.name, column, columns) for column in columns] for m in scored}
    baseline = next((grid[m.name] for m in scored if m.role == "baseline"), [None] * len(columns))
    students = [grid[m.name] for m in scored if m.role in ("baseline", "student")]
    best = [max((value for value in column if value is not None), default=None) for column in zip(*students)]
    rows = []
    for model in scored:
        cells = []
        for place, value in enumerate(grid[model.name]):
            base = baseline[place] if model.role != "baseline" else None
            top = best[place] if len(students) > 1 and model.role in ("baseline", "student") else None
            gain = None if value is None or base is None else value - base
            cells.append(Cell(value=value, gain=gain, best=value is not None and _ties(value, top)))
        rows.append(Row(model=model, cells=cells))
    return Table(columns=columns, rows=rows)


def _ties(value: float, best: float | None) -> bool:
    """Equal as printed, to a tenth of a point."""
    return best is not None and round(100 * value, 1) == round(100 * best, 1)


def _headline_columns(scores: Sequence[Score]) -> list[Column]:
    """Columns by task in the order of `TASKS`, sets as found; a mean leads where a task has several sets."""
    known = [*TASKS, *(score.task for score in scores)]
    columns: list[Column] = []
    for task in dict.fromkeys(known):
        found: dict[tuple[str, str], Score] = {}
        for score in scores:
            if score.task == task:
                found.setdefault((score.set, score.metric), score)
        chosen = [
            Column(task=task, set=s.set, metric=s.metric, chance=s.chance, num_test=s.num_test)
            for s in found.values()
            if _is_headline(s, found)
        ]
        if task in ("zero-shot", "linear-probe") and len(chosen) > 1:
            columns.append(_mean_column(task, chosen))
        columns += chosen
    return columns


def _is_headline(score: Score, found: dict[tuple[str, str], Score]) -> bool:
    """Whether a score's metric is the one its set is known by; `found` holds all scores of the task."""
    if score.task == "retrieval":
        return score.metric.endswith("_r1")
    if score.task in ("zero-shot", "linear-probe"):
        preferred = [metric for metric in ("top1", "mean_per_class") if (score.set, metric) in found]
        return score.metric in (preferred[:1] or [score.metric])
    return True


def _mean_column(task: str, columns: Sequence[Column]) -> Column:
    chances = [column.chance for column in columns if column.chance is not None]
    chance = statistics.fmean(chances) if len(chances) == len(columns) else None
    return Column(task=task, set="mean", metric="", chance=chance)


def _value(
    values: dict[tuple[str, str, str, str], float], model: str, column: Column, columns: Sequence[Column]
) -> float | None:
    """One cell; a mean is given only for a model that has every set of its task."""
    if column.metric:
        return values.get((model, column.task, column.set, column.metric))
    parts = [values.get((model, c.task, c.set, c.metric)) for c in columns if c.task == column.task and c.metric]
    known = [part for part in parts if part is not None]
    return statistics.fmean(known) if len(known) == len(parts) else None


def _training_of(score: Score, trainings: Sequence[Training]) -> Training | None:
    """The train folder that a scored model came from: by path, else by name."""
    for training in trainings:
        path = training.path.rstrip("/")
        if score.model == path or score.model.startswith(path + "/"):
            return training
    for training in trainings:
        if score.model in (training.name, training.path.rstrip("/").rsplit("/", 1)[-1]):
            return training
    return None


def _teacher_references(results: Results) -> set[str]:
    """Every name, path or digest by which a stage says who its teacher is."""
    references: set[str] = set()
    for folder in [*results.finished("embed"), *results.finished("train")]:
        teacher = (folder.result or {}).get("teacher")
        described = [teacher.get("name"), teacher.get("digest")] if isinstance(teacher, dict) else [teacher]
        for value in [*described, folder.config.get("teacher")]:
            if isinstance(value, str) and value:
                references.add(value.rstrip("/"))
    return references
