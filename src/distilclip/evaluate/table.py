"""Scores as tables: for people one a task, models as rows and sets as columns; for machines every score as a line."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

TASKS = {
    "zero-shot": "Zero-shot",
    "linear-probe": "Linear probe",
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
CSV_COLUMNS = (
    *("model", "set", "task", "metric", "value", "low", "high", "chance", "majority"),
    *("num_test", "num_unreadable", "num_classes", "reason", "model_digest"),
)


@dataclass(frozen=True, kw_only=True)
class Table:
    """The headline scores of one task in percent; each row begins with the model's name."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    notes: list[str]

    def markdown(self) -> str:
        """A GitHub table under its title, the notes below it."""
        lines = [self.columns, ["---", *["---:"] * (len(self.columns) - 1)], *self.rows]
        body = "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
        return "\n\n".join([f"## {self.title}", body, *self.notes]) + "\n"


def build_tables(rows: Sequence[dict[str, Any]]) -> list[Table]:
    """One table for each task that has scores. A score without a value shows as `-`, and a note says why."""
    by_task = {task: [row for row in rows if row["task"] == task and row["headline"]] for task in TASKS}
    return [_build(TASKS[task], shown) for task, shown in by_task.items() if shown]


def write_csv(rows: Sequence[dict[str, Any]]) -> str:
    """Every score, one a line, as fractions."""
    text = io.StringIO()
    writer = csv.DictWriter(text, CSV_COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _build(title: str, shown: Sequence[dict[str, Any]]) -> Table:
    # A model may lack a score that others have, so columns are gathered over all models.
    columns = list(dict.fromkeys((row["set"], row["metric"]) for row in shown))
    models = list(dict.fromkeys(row["model"] for row in shown))
    cells = {(row["model"], row["set"], row["metric"]): _percent(row["value"]) for row in shown}
    return Table(
        title=title,
        columns=["model", *(_header(*column) for column in columns)],
        rows=[[model, *(cells.get((model, *column), "-") for column in columns)] for model in models],
        notes=list(dict.fromkeys(note for row in shown if (note := _note(row)))),
    )


def _header(set_name: str, metric: str) -> str:
    return f"{set_name}, {METRICS[metric]}" if metric in METRICS else set_name


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def _note(row: dict[str, Any]) -> str:
    if row["value"] is None:
        return f"{row['set']}: {row['reason']}."
    if row["num_unreadable"]:
        return f"{row['set']}: {row['num_unreadable']} images could not be read and are left out."
    return ""
