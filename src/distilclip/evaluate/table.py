"""Scores as tables: models as rows and headline scores as columns for people, every score as a line for machines."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

TASKS = ("zero-shot", "linear-probe", "retrieval", "agreement")
SHORT = {
    "image_to_text_r1": "image to text R@1",
    "text_to_image_r1": "text to image R@1",
    "top1_agreement": "top-1",
    "cka": "CKA",
    "mean_per_class": "mean per class",
}
CSV_COLUMNS = ["model", "set", "task", "metric", "value", "low", "high", "chance", "majority"] + [
    "num_test",
    "num_unreadable",
    "num_classes",
    "reason",
    "model_digest",
]


@dataclass(frozen=True, kw_only=True)
class Table:
    """Formatted cells; `columns` are the headers, each row begins with the model's name."""

    columns: list[str]
    rows: list[list[str]]
    notes: list[str]

    def markdown(self) -> str:
        """A GitHub table, the notes below it."""
        lines = [self.columns, ["---", *["---:"] * (len(self.columns) - 1)], *self.rows]
        body = "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)
        return body + "".join(f"\n{note}\n" for note in self.notes)


def build_table(rows: Sequence[dict[str, Any]]) -> Table:
    """The headline scores in percent, `-` where a score has no value, which a note explains."""
    columns: dict[tuple[str, str, str], None] = {}
    values: dict[tuple[str, tuple[str, str, str]], float | None] = {}
    notes: dict[str, None] = {}
    for row in rows:
        if not row["headline"]:
            continue
        column = (row["task"], row["set"], row["metric"])
        columns[column] = None
        values[row["model"], column] = row["value"]
        if row["value"] is None:
            notes[f"{row['set']}, {row['task']}: {row['reason']}."] = None
        elif row["num_unreadable"]:
            notes[f"{row['set']}: {row['num_unreadable']} images could not be read and are left out."] = None
    ordered = sorted(columns, key=lambda column: TASKS.index(column[0]))
    models = list(dict.fromkeys(row["model"] for row in rows))
    return Table(
        columns=["model", *(_header(*column) for column in ordered)],
        rows=[[model, *(_percent(values.get((model, column))) for column in ordered)] for model in models],
        notes=list(notes),
    )


def write_csv(rows: Sequence[dict[str, Any]]) -> str:
    """Every score, one a line."""
    text = io.StringIO()
    writer = csv.DictWriter(text, CSV_COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _header(task: str, set_name: str, metric: str) -> str:
    what = f" {SHORT[metric]}" if metric in SHORT else ""
    return f"{set_name} {task}{what}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"
