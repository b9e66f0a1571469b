"""Compare the models: who is teacher, baseline and student, each one's headline scores, and the gains."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

from distilclip.report.load import Results, TrainRun
from distilclip.sets.score import AVERAGED, TASKS, Score, means, title

Role = Literal["teacher", "baseline", "student", "other"]

MAX_COLUMNS = 12  # a wider table does not fit a page, so each task gets a table of its own


@dataclass(frozen=True, kw_only=True)
class Model:
    """One compared model. `series` is its place in the palette, the same in every table and figure."""

    name: str
    role: Role
    series: int
    num_parameters: int | None = None
    training: TrainRun | None = None


@dataclass(frozen=True, kw_only=True)
class Column:
    """What one column of scores holds. A mean has `members`, the sets it is taken over, and no metric or size."""

    task: str
    set: str
    metric: str
    chance: float | None = None
    num_test: int | None = None
    members: tuple[str, ...] = ()


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
        """Return each task's title and its number of columns, for the upper header row."""
        return [(title(task), len(list(columns))) for task, columns in groupby(self.columns, lambda c: c.task)]

    @property
    def has_chance(self) -> bool:
        """Return whether the chance level of any column is known."""
        return any(column.chance is not None for column in self.columns)

    def select(self, columns: Iterable[Column]) -> Table:
        """Return the same models with only some of the columns."""
        places = [self.columns.index(column) for column in columns]
        rows = [Row(model=row.model, cells=[row.cells[i] for i in places]) for row in self.rows]
        return Table(columns=[self.columns[i] for i in places], rows=rows)

    def of_task(self, task: str) -> Table:
        """Return the table of one task."""
        return self.select([column for column in self.columns if column.task == task])

    def split(self) -> list[Table]:
        """Return one table where it fits a page, else one for each task."""
        if len(self.columns) <= MAX_COLUMNS:
            return [self] if self.columns else []
        return [self.of_task(task) for task, _ in groupby(column.task for column in self.columns)]


def models(results: Results) -> list[Model]:
    """Return every model that was scored or trained: the teacher first, then baseline, students and others.

    Scores and trainings are joined by the digest of the weights. A teacher is a model that an embed, train or evaluate
    folder names as its teacher. The baseline is the first student that was trained with the task term alone. Any other
    model without a train folder is `other`.
    """
    teachers = _teachers(results)
    by_digest = {training.digest: training for training in reversed(results.trainings)}
    digests = {score.model: score.model_digest for score in results.scores}
    named = {name: by_digest.get(digest) for name, digest in digests.items()}
    for unscored in results.trainings:
        if unscored.digest not in digests.values():
            name = unscored.path if unscored.name in named else unscored.name
            named[name], digests[name] = unscored, unscored.digest

    roles: dict[str, Role] = {}
    for name, training in named.items():
        path = training.path.rstrip("/") if training is not None else None
        if {name, digests[name]} & teachers or (path and any(f"{t}/".startswith(f"{path}/") for t in teachers)):
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
        Model(
            name=name,
            role=roles[name],
            series=max(0, place - num_teachers + 1),
            num_parameters=results.num_parameters.get(digests[name]),
            training=named[name],
        )
        for place, name in enumerate(ordered)
    ]


def compare(scores: Sequence[Score], compared: Sequence[Model]) -> Table:
    """Return the headline scores of all models, and their gains over the baseline."""
    columns = _headline_columns(scores)
    values = {(s.model, s.task, s.set, s.metric): s.value for s in scores}
    scored = [model for model in compared if any(score.model == model.name for score in scores)]
    grid = {m.name: [_value(values, m.name, column, columns) for column in columns] for m in scored}
    baseline = next((grid[m.name] for m in scored if m.role == "baseline"), [None] * len(columns))
    students = [grid[m.name] for m in scored if m.role in ("baseline", "student")]
    best = [
        max((value for value in column if value is not None), default=None) for column in zip(*students, strict=True)
    ]
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
    """Return whether a value equals the best one as printed, to a tenth of a point."""
    return best is not None and round(100 * value, 1) == round(100 * best, 1)


def _headline_columns(scores: Sequence[Score]) -> list[Column]:
    """Return the columns by task, in the order of `TASKS`; means come first where a task has several sets.

    A set on which no model has a score is left out, and the name of a mean says so.
    """
    columns: list[Column] = []
    for task in dict.fromkeys([*TASKS, *(score.task for score in scores)]):
        found: dict[tuple[str, str], Score] = {}
        for score in scores:
            if score.task == task and score.value is not None and score.headline:
                found.setdefault((score.set, score.metric), score)
        chosen = [
            Column(task=task, set=s.set, metric=s.metric, chance=s.chance, num_test=s.num_test) for s in found.values()
        ]
        if task in AVERAGED:
            columns += _mean_columns(task, chosen, [s.set for s in scores if s.task == task and s.headline])
        columns += chosen
    return columns


def _mean_columns(task: str, columns: Sequence[Column], sets: Sequence[str]) -> list[Column]:
    """Return the means over `columns`; `sets` are all sets of the task, also those without a score."""
    found = []
    for mean in means(sets, scored={column.set for column in columns}):
        chances = [column.chance for column in columns if column.set in mean.sets]
        known = [chance for chance in chances if chance is not None]
        chance = statistics.fmean(known) if len(known) == len(chances) else None
        found.append(Column(task=task, set=mean.name, metric="", chance=chance, members=mean.sets))
    return found


def _value(
    values: dict[tuple[str, str, str, str], float | None], model: str, column: Column, columns: Sequence[Column]
) -> float | None:
    """Return the value of one cell; only a model with a score on every set has a mean."""
    if not column.members:
        return values.get((model, column.task, column.set, column.metric))
    averaged = [c for c in columns if c.task == column.task and c.metric and c.set in column.members]
    parts = [values.get((model, c.task, c.set, c.metric)) for c in averaged]
    known = [part for part in parts if part is not None]
    return statistics.fmean(known) if len(known) == len(parts) else None


def _teachers(results: Results) -> set[str]:
    """Return every name, path and digest by which a stage names its teacher."""
    found = [folder.config.get("teacher") for folder in results.finished("train")]
    for folder in results.finished("evaluate"):
        found += (folder.config.get("teacher") or "").split("=", 1)  # MODEL, or NAME=MODEL
    for folder in results.finished("embed"):
        teacher = folder.result["teacher"]
        found += [folder.config.get("model"), teacher["name"], teacher["digest"]]
    return {value.rstrip("/") for value in found if value}
