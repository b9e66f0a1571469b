"""What a model makes of each class: accuracy, the class it is most taken for, and the confusion matrix."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from distilclip.sets.classes import Classes


def per_class_table(labels: Int[Tensor, " n"], predictions: Int[Tensor, " n"], classes: Classes) -> str:
    """CSV with a line for each class: label, name, images, top-1 (a share of 1), and what it is most mistaken for."""
    rows = []
    confusion = _confusion(labels, predictions, len(classes))
    for number, row in enumerate(confusion):
        total, right = int(row.sum()), int(row[number])
        mistakes = row.clone()
        mistakes[number] = 0
        worst = int(mistakes.argmax()) if mistakes.any() else None
        shown = (classes.names[worst], int(mistakes[worst])) if worst is not None else ("", 0)
        rows.append((classes.labels[number], classes.names[number], total, right / total if total else "", *shown))
    return _csv(("label", "name", "num_test", "top1", "most_mistaken_for", "times"), rows)


def confusion_table(labels: Int[Tensor, " n"], predictions: Int[Tensor, " n"], classes: Classes) -> str:
    """CSV with a line for each pair of classes that occurs: true class, predicted class, images."""
    confusion = _confusion(labels, predictions, len(classes))
    rows = [(classes.names[i], classes.names[j], int(confusion[i, j])) for i, j in confusion.nonzero().tolist()]
    return _csv(("true", "predicted", "num_test"), rows)


def _confusion(labels: Int[Tensor, " n"], predictions: Int[Tensor, " n"], num_classes: int) -> Int[Tensor, "k k"]:
    pairs = labels * num_classes + predictions
    return torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)


def _csv(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([columns, *rows])
    return text.getvalue()
