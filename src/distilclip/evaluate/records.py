"""Scores for machines: CSV with a line for each, and CLIP_benchmark's records with a file for each."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

CSV_COLUMNS = (
    *("model", "set", "task", "metric", "value", "low", "high", "chance", "majority"),
    *("num_test", "num_unreadable", "num_classes", "headline", "reason", "model_digest"),
)
CLIP_BENCHMARK_TASKS = {
    "zero-shot": "zeroshot_classification",
    "linear-probe": "linear_probe",
    "retrieval": "zeroshot_retrieval",
}
_CLASSIFICATION = {"top1": "acc1", "top5": "acc5", "mean_per_class": "mean_per_class_recall"}
CLIP_BENCHMARK_METRICS: dict[str, dict[str, str]] = {
    "zero-shot": _CLASSIFICATION,
    "linear-probe": {metric: f"lp_{name}" for metric, name in _CLASSIFICATION.items()},
    "retrieval": {
        **{f"image_to_text_r{k}": f"text_retrieval_recall@{k}" for k in (1, 5, 10)},
        **{f"text_to_image_r{k}": f"image_retrieval_recall@{k}" for k in (1, 5, 10)},
    },
}


def write_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Every score, one a line, as fractions."""
    text = io.StringIO()
    writer = csv.DictWriter(text, CSV_COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def clip_benchmark_records(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The scores that CLIP_benchmark has too, as its JSON files (`clip_benchmark build` reads them), by file name.

    Where it says `pretrained`, the beginning of the weights' digest stands.
    """
    records: dict[str, dict[str, Any]] = {}
    names: dict[tuple[str, str, str], str] = {}
    for row in rows:
        metric = CLIP_BENCHMARK_METRICS.get(row["task"], {}).get(row["metric"])
        if metric is None or row["value"] is None:
            continue
        measured = row["model"], row["set"], row["task"]
        if measured not in names:
            name = re.sub(r"[^\w.+-]", "_", "_".join(measured))
            twice = f"_{len(names)}" if f"{name}.json" in records else ""  # `a/b` and `a_b` are two models
            names[measured] = f"{name}{twice}.json"
        record = records.setdefault(
            names[measured],
            {
                "dataset": row["set"],
                "model": row["model"],
                "pretrained": row["model_digest"][:12],
                "task": CLIP_BENCHMARK_TASKS[row["task"]],
                "metrics": {},
                "language": "en",
            },
        )
        record["metrics"][metric] = row["value"]
    return records
