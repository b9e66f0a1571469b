"""Write scores for other programs: as CSV, and as the JSON records of CLIP_benchmark."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from typing import Any

from distilclip.sets.score import Score

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


def write_csv(scores: Sequence[Score]) -> str:
    """Return CSV with a line for every score, as fractions."""
    text = io.StringIO()
    writer = csv.DictWriter(text, CSV_COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(score.row() for score in scores)
    return text.getvalue()


def clip_benchmark_records(scores: Sequence[Score]) -> dict[str, dict[str, Any]]:
    """Return the scores that CLIP_benchmark has too, as its JSON records (for `clip_benchmark build`), by file name.

    Where it says `pretrained`, the beginning of the weights' digest stands.
    """
    records: dict[str, dict[str, Any]] = {}
    names: dict[tuple[str, str, str], str] = {}
    for score in scores:
        metric = CLIP_BENCHMARK_METRICS.get(score.task, {}).get(score.metric)
        if metric is None or score.value is None:
            continue
        measured = score.model, score.set, score.task
        if measured not in names:
            name = re.sub(r"[^\w.+-]", "_", "_".join(measured))
            twice = f"_{len(names)}" if f"{name}.json" in records else ""  # `a/b` and `a_b` are two models
            names[measured] = f"{name}{twice}.json"
        record = records.setdefault(
            names[measured],
            {
                "dataset": score.set,
                "model": score.model,
                "pretrained": score.model_digest[:12],
                "task": CLIP_BENCHMARK_TASKS[score.task],
                "metrics": {},
                "language": "en",
            },
        )
        record["metrics"][metric] = score.value
    return records
