"""What the folders of a run say about a model: how it was trained, on what, by which teacher, and how good it is."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from typing import Any

from distilclip import files
from distilclip.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Stage:
    """The config and the result of a finished folder."""

    config: dict[str, Any]
    result: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Records:
    """What was found; None or empty where the model has no such record, or its folder is gone."""

    train: Stage | None = None
    embed: Stage | None = None
    balance: Stage | None = None
    cluster: Stage | None = None
    scores: list[dict[str, Any]] = field(default_factory=list)


def find_records(model: str, *, digest: str, evaluation: str | None = None) -> Records:
    """The records behind `model` (a train folder, or a checkpoint in one), followed through its inputs.

    Args:
        model: the model as the user named it.
        digest: that of its weights; of `evaluation`, only rows of these weights count.
        evaluation: a folder of `evaluate`.

    Raises:
        InputError: `evaluation` has no row of these weights.
    """
    scores = []
    if evaluation is not None:
        rows = _read(files.join(evaluation, "result.json"))["rows"]
        scores = [row for row in rows if row["model_digest"] == digest]
        if not scores:
            others = {row["model_digest"]: row["model"] for row in rows}
            raise InputError(
                f"{evaluation} (from --evaluation) has no score of {model}, whose weights have SHA-256 {digest}, but "
                f"of {', '.join(f'{name} ({found})' for found, name in others.items()) or 'no model'}. "
                "Evaluate the model that is exported."
            )
    train = _stage(model, "train") or _stage(os.path.dirname(os.path.dirname(model.rstrip("/"))), "train")
    if train is None:
        return Records(scores=scores)
    found = {
        stage: _stage(_first(train.config.get(option)), stage)
        for stage, option in (("embed", "store"), ("balance", "groups"), ("cluster", "clusters"))
    }
    return Records(train=train, scores=scores, **found)


def _stage(folder: str | None, stage: str) -> Stage | None:
    if not folder:
        return None
    paths = [files.join(folder, name) for name in ("config.json", "result.json")]
    if not all(map(files.exists, paths)):
        return None
    config, result = map(_read, paths)
    return Stage(config=config, result=result) if config.get("stage") == stage else None


def _first(value: str | list[str] | None) -> str | None:
    """Of several stores, the first: groups and clusters are of that one."""
    return next(iter(value), None) if isinstance(value, list) else value


def _read(path: str) -> dict[str, Any]:
    return json.loads(files.read_bytes(path))
