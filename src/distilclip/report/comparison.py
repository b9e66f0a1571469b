"""Compare the models: each one's headline scores with their intervals, and the gains over the baseline."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from distilclip.report.evidence import Difference, difference, seeds_difference
from distilclip.report.roles import Model
from distilclip.report.seeds import common_name
from distilclip.sets.published import PublishedRow
from distilclip.sets.score import AVERAGED, TASKS, Score, mean_interval_of, mean_of, means, title

MAX_COLUMNS = 12  # a wider table does not fit a page, so each task gets a table of its own


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
    """One score and its difference to the baseline, as fractions; None where there is none.

    `low` and `high` are a 95 % interval over the test images. Of several seeds, `value` is their mean, and `spread`,
    their standard deviation, stands in place of an interval.
    """

    value: float | None
    difference: Difference | None
    best: bool
    low: float | None = None
    high: float | None = None
    spread: float | None = None

    @property
    def gain(self) -> float | None:
        """Return how much higher the score is than the baseline's."""
        return self.difference.value if self.difference is not None else None


@dataclass(frozen=True, kw_only=True)
class Row:
    """The scores of one model, or of all seeds of a recipe, a cell per column."""

    model: Model
    cells: list[Cell]
    num_seeds: int = 1


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

    def has_place_for(self, row: PublishedRow) -> bool:
        """Return whether a published row has a number for any of the sets."""
        return any(row.has(column.task, (column.set,)) for column in self.columns)

    def select(self, columns: Iterable[Column]) -> Table:
        """Return the same models with only some of the columns."""
        places = [self.columns.index(column) for column in columns]
        rows = [replace(row, cells=[row.cells[i] for i in places]) for row in self.rows]
        return Table(columns=[self.columns[i] for i in places], rows=rows)

    def of_task(self, task: str) -> Table:
        """Return the table of one task."""
        return self.select([column for column in self.columns if column.task == task])

    def split(self) -> list[Table]:
        """Return one table where it fits a page, else one for each task."""
        if len(self.columns) <= MAX_COLUMNS:
            return [self] if self.columns else []
        return [self.of_task(task) for task, _ in groupby(column.task for column in self.columns)]


def compare(scores: Sequence[Score], compared: Sequence[Model]) -> Table:
    """Return the headline scores of all models, the seeds of a recipe together, and their gains over the baseline."""
    columns = _headline_columns(scores)
    known = {(s.model, s.task, s.set, s.metric): s for s in scores if s.value is not None}
    seeds = _seeds_of([model for model in compared if any(score.model == model.name for score in scores)])
    grid = [[_measured(known, models, column, columns) for column in columns] for models in seeds]
    baseline = next((g for models, g in zip(seeds, grid, strict=True) if models[0].role == "baseline"), None)
    students = [g for models, g in zip(seeds, grid, strict=True) if models[0].role in ("baseline", "student")]
    best = [
        max((value for measured in column if (value := _value(measured)) is not None), default=None)
        for column in zip(*students, strict=True)
    ]
    rows = []
    for models, measured in zip(seeds, grid, strict=True):
        first, several = models[0], len(models) > 1
        base = baseline if baseline is not None and first.role != "baseline" else [[] for _ in columns]
        ranked = best if len(students) > 1 and first.role in ("baseline", "student") else [None] * len(columns)
        cells = [_cell(ours, theirs, top) for ours, theirs, top in zip(measured, base, ranked, strict=True)]
        named = replace(first, name=common_name([model.name for model in models])) if several else first
        rows.append(Row(model=named, cells=cells, num_seeds=len(models)))
    return Table(columns=columns, rows=rows)


Measured = list[list[Score]]  # of every seed, the scores that a cell is the mean of


def _seeds_of(scored: Sequence[Model]) -> list[list[Model]]:
    """Return the models by recipe, in their order; weights that have two names count once each."""
    found: dict[str, list[Model]] = {}
    for model in scored:
        found.setdefault(model.recipe or f"model {model.name}", []).append(model)
    split = []
    for models in found.values():
        digests = {model.training.digest for model in models if model.training is not None}
        split += [models] if len(digests) == len(models) else [[model] for model in models]
    return split


def _measured(
    known: Mapping[tuple[str, str, str, str], Score], models: Sequence[Model], column: Column, columns: Sequence[Column]
) -> Measured:
    """Return the scores of a cell; only a model with a score on every set has a mean."""
    averaged = [column]
    if column.members:
        averaged = [c for c in columns if c.task == column.task and c.metric and c.set in column.members]
    keys = [[(model.name, c.task, c.set, c.metric) for c in averaged] for model in models]
    return [[known[key] for key in seed] for seed in keys if known.keys() >= set(seed)]


def _value(measured: Measured) -> float | None:
    return statistics.fmean(mean_of(scores) for scores in measured) if measured else None


def _cell(measured: Measured, baseline: Measured, best: float | None) -> Cell:
    value = _value(measured)
    if value is None:
        return Cell(value=None, difference=None, best=False)
    gained = None
    if baseline and len(measured) == len(baseline) == 1:
        gained = difference(measured[0], baseline[0])
    elif baseline:
        gained = seeds_difference(*([mean_of(scores) for scores in seeds] for seeds in (measured, baseline)))
    low, high = (mean_interval_of(measured[0]) if len(measured) == 1 else None) or (None, None)
    spread = statistics.stdev(mean_of(scores) for scores in measured) if len(measured) > 1 else None
    return Cell(value=value, difference=gained, best=_ties(value, best), low=low, high=high, spread=spread)


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
