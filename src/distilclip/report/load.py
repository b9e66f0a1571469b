"""Result folders read into dataclasses: what each stage was told, where it ran, what it found.

Reads the files that docs/formats.md describes and nothing else, so a page can be made on a machine that has neither
the models nor the tars.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from distilclip.data import files
from distilclip.errors import InputError

# The objective's terms (distilclip.train.objective.TERMS, which needs torch) in the words of the page.
TERMS = {
    "task": "contrastive loss of the student's own image and text embeddings",
    "cluster": "CLIP-CID cluster discrimination",
    "instance": "CLIP-CID instance discrimination",
    "relational": "CLIP-KD relational distillation (CRD)",
    "feature": "CLIP-KD feature distillation (FD)",
    "masked": "CLIP-KD masked feature distillation (MFD)",
    "gradient": "CLIP-KD gradient distillation (GD)",
    "interactive": "CLIP-KD interactive contrast (ICL)",
    "augmented": "CLIP-KD augmented features (AFD)",
}


@dataclass(frozen=True, kw_only=True)
class StageFolder:
    """One stage's output folder. `result` is None while the stage is unfinished."""

    path: str
    stage: str
    config: dict[str, Any]
    environment: dict[str, Any]
    result: dict[str, Any] | None


@dataclass(frozen=True, kw_only=True)
class Score:
    """One row of an evaluate folder. `value` and `chance` are fractions; `chance` is None where it is not known."""

    model: str
    digest: str
    set: str
    task: str
    metric: str
    value: float
    num_test: int | None = None
    chance: float | None = None


@dataclass(frozen=True, kw_only=True)
class Series:
    """One logged quantity over the steps of a training run."""

    step: Int[np.ndarray, " n"]
    value: Float[np.ndarray, " n"]


@dataclass(frozen=True, kw_only=True)
class Training:
    """One train folder: what was trained, with which weights, and every number it logged."""

    name: str
    path: str
    weights: dict[str, float]
    num_parameters: int | None
    num_samples_seen: int | None
    teacher: str
    digest: str
    logged: dict[str, Series] = field(default_factory=dict)

    @property
    def num_steps(self) -> int:
        """The last step logged, 0 for an empty log."""
        return max((int(series.step[-1]) for series in self.logged.values()), default=0)

    @property
    def samples_per_second(self) -> float | None:
        """The median over the log, without its first line, which holds the warm-up; None where nothing was logged."""
        series = self.logged.get("samples_per_second")
        if series is None:
            return None
        return float(np.median(series.value[1:] if len(series.value) > 1 else series.value))

    @property
    def terms(self) -> list[str]:
        """The logged terms of the objective, in the order of `TERMS`."""
        return [name for name in TERMS if name in self.logged]

    @property
    def distilled(self) -> bool:
        """Whether any term compared with a teacher."""
        return any(weight for name, weight in self.weights.items() if name != "task")

    @property
    def diagnostics(self) -> list[str]:
        """The logged cosines and agreements with the teacher."""
        return [name for name in self.logged if "cosine" in name or "agreement" in name]


@dataclass(frozen=True, kw_only=True)
class Results:
    """All the stage folders that one page tells about."""

    folders: list[StageFolder]

    def finished(self, stage: str) -> list[StageFolder]:
        """The finished folders of one stage, in the order found."""
        return [folder for folder in self.folders if folder.stage == stage and folder.result is not None]

    @property
    def unfinished(self) -> list[StageFolder]:
        """Folders that were begun and have no result.json."""
        return [folder for folder in self.folders if folder.result is None]

    @property
    def scores(self) -> list[Score]:
        """Every evaluation row found. A row that two folders repeat counts once; the later folder's value stands."""
        rows = [row for folder in self.finished("evaluate") for row in (folder.result or {}).get("rows", [])]
        scores = [_score(row) for row in rows]
        return list({(s.model, s.digest, s.set, s.task, s.metric): s for s in scores}.values())

    @property
    def trainings(self) -> list[Training]:
        """Every finished train folder."""
        return [_training(folder) for folder in self.finished("train")]


def load(paths: Sequence[str]) -> Results:
    """Every stage folder under `paths` (folders or URLs, searched recursively), save pages and the runs' own summaries.

    Raises `InputError` for a path that is not there, and when none of them holds a finished stage.
    """
    found: dict[str, StageFolder] = {}
    for path in paths:
        if not files.exists(path):
            raise InputError(f"{path} (from --folders) does not exist. Name the folder of a run, or of its stages.")
        for place in _folders_with(path, ("config.json", "result.json")):
            folder = _read_folder(place)
            if folder is not None and folder.stage not in ("run", "demo", "report"):
                found[place] = folder
    results = Results(folders=list(found.values()))
    if all(folder.result is None for folder in results.folders):
        raise InputError(
            f"No result.json under {', '.join(paths)}: there is nothing to report yet. "
            "Run a stage to its end first, `distilclip run RECIPE` for all of them."
        )
    return results


def _folders_with(path: str, names: tuple[str, ...]) -> list[str]:
    """The folders under `path`, itself included, that hold one of the named files; sorted by depth, then name."""
    if files.is_url(path):
        fs, inner = files.filesystem(path)
        matches = [fs.unstrip_protocol(p) for p in fs.find(inner) if p.rsplit("/", 1)[-1] in names]
        places = {match.rsplit("/", 1)[0] for match in matches}
    else:
        walked = os.walk(path)
        places = {folder for folder, _, members in walked if any(name in members for name in names)}
    return sorted(places, key=lambda place: (place.count("/"), place))


def _read_folder(path: str) -> StageFolder | None:
    """A stage's folder, or None for a folder whose config.json is something else's (a model's, say)."""
    config = _read_object(files.join(path, "config.json"))
    result = _read_object(files.join(path, "result.json"))
    stage = (result or config or {}).get("stage")
    if not isinstance(stage, str):
        return None
    environment = _read_object(files.join(path, "env.json")) or {}
    config = {name: value for name, value in (config or {}).items() if name != "stage"}
    return StageFolder(path=path, stage=stage, config=config, environment=environment, result=result)


def _read_object(path: str) -> dict[str, Any] | None:
    """A JSON object, or None where there is no such file."""
    if not files.exists(path):
        return None
    try:
        value = json.loads(files.read_bytes(path))
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON ({error}). Remove it and run its stage again.") from error
    return value if isinstance(value, dict) else None


def _score(row: dict[str, Any]) -> Score:
    num_classes = row.get("num_classes")
    chance = row.get("chance", 1 / num_classes if num_classes and row["task"] != "retrieval" else None)
    return Score(
        model=str(row["model"]),
        digest=str(row.get("model_digest", "")),
        set=str(row["set"]),
        task=str(row["task"]),
        metric=str(row["metric"]),
        value=float(row["value"]),
        num_test=row.get("num_test"),
        chance=chance,
    )


def _training(folder: StageFolder) -> Training:
    result = folder.result or {}
    objective = result.get("objective") or {}
    weights = {name: float(objective[name]) for name in TERMS if objective.get(name)}
    return Training(
        name=str(result.get("name") or os.path.basename(folder.path)),
        path=folder.path,
        weights=weights,
        num_parameters=result.get("num_parameters"),
        num_samples_seen=result.get("num_samples_seen"),
        teacher=str(folder.config.get("teacher") or ""),
        digest=str(result.get("digest", "")),
        logged=_read_log(files.join(folder.path, "metrics.jsonl")),
    )


def _read_log(path: str) -> dict[str, Series]:
    """Every numeric column of a metrics.jsonl over its steps; a last line cut by a kill is left out."""
    columns: dict[str, list[tuple[int, float]]] = {}
    for line in _lines(path):
        for name, value in line.items():
            if name != "step" and isinstance(value, (int, float)) and math.isfinite(value):
                columns.setdefault(name, []).append((int(line["step"]), float(value)))
    return {
        name: Series(step=np.array([step for step, _ in pairs]), value=np.array([value for _, value in pairs]))
        for name, pairs in columns.items()
    }


def _lines(path: str) -> Iterable[dict[str, Any]]:
    def parse() -> Iterator[dict[str, Any]]:
        for line in files.read_bytes(path).decode().splitlines():
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                return

    return parse() if files.exists(path) else ()
