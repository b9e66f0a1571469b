"""Read the folders of stages: their configs, where they ran, scores, and logs of training.

Only files that docs/formats.md describes are read, so a page can be made on a machine without the models and tars.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from jaxtyping import Float, Int

from distilclip import files, stage_folder
from distilclip.errors import InputError
from distilclip.sets.score import Score
from distilclip.sets.specs import VALIDATED
from distilclip.stage_folder import StageRecord


@dataclass(frozen=True, kw_only=True)
class Series:
    """One logged quantity over the steps of a training."""

    step: Int[np.ndarray, " n"]
    value: Float[np.ndarray, " n"]


@dataclass(frozen=True, kw_only=True)
class TrainRun:
    """One train folder: what was trained, with which weights, and every number it logged.

    The name is the folder's; `digest` is that of the trained weights, as evaluate folders have it too.
    """

    name: str
    path: str
    weights: dict[str, float]
    """of the terms that have one"""
    words: dict[str, str]
    """what each term is, as `train` wrote it down; empty for a term of an older folder"""
    num_parameters: int
    num_samples_seen: int
    digest: str
    architecture: str = ""
    """of the student, as `train --student` named it"""
    remarks: list[str] = field(default_factory=list)
    """how it drew its rows, where not each of them alike with its own caption"""
    logged: dict[str, Series] = field(default_factory=dict)

    @property
    def num_steps(self) -> int:
        """Return the last step of the log, 0 for an empty log."""
        return max((int(series.step[-1]) for series in self.logged.values()), default=0)

    @property
    def samples_per_second(self) -> float | None:
        """Return the median over the log without its first line, which has the warm-up; None for no log."""
        return self._median("samples_per_second")

    @property
    def seconds(self) -> float | None:
        """Return how long the logged steps took together, by their speeds; None for no log."""
        speed = self.logged.get("samples_per_second")
        if speed is None or not self.num_steps or not (speed.value > 0).all():
            return None
        steps = np.diff(speed.step, prepend=0)
        return float((steps * self.num_samples_seen / self.num_steps / speed.value).sum())

    @property
    def data_share(self) -> float | None:
        """Return the share of the time spent waiting for data, a median as `samples_per_second`."""
        return self._median("data_share")

    @property
    def terms(self) -> list[str]:
        """The logged terms of the objective."""
        return [name for name in self.words if name in self.logged]

    @property
    def distilled(self) -> bool:
        """Return whether any term compared the student with a teacher."""
        return any(weight for name, weight in self.weights.items() if name != "task")

    def _median(self, name: str) -> float | None:
        series = self.logged.get(name)
        if series is None:
            return None
        return float(np.median(series.value[1:] if len(series.value) > 1 else series.value))

    @property
    def diagnostics(self) -> list[str]:
        """Return the names of the logged cosines and agreements with the teacher."""
        names = [name for name in self.logged if not name.startswith(VALIDATED)]
        return [name for name in names if "cosine" in name or "agreement" in name]

    @property
    def validations(self) -> list[str]:
        """Return the columns of a validation that are drawn: of every set the first metric of each task, and losses."""
        return [
            name
            for name in self.logged
            if name.startswith(VALIDATED) and name.rsplit("/", 1)[-1] in ("top1", "text_to_image_r1", "loss")
        ]


@dataclass(frozen=True, kw_only=True)
class Results:
    """The content of one page: the stage folders, and the scores and trainings in them.

    `num_parameters` is that of each evaluated model, by the digest of its weights.
    """

    folders: list[StageRecord]
    scores: list[Score]
    trainings: list[TrainRun]
    num_parameters: dict[str, int]

    def finished(self, stage: str) -> list[StageRecord]:
        """Return the finished folders of one stage, in the order found."""
        return _finished(self.folders, stage)

    @property
    def unfinished(self) -> list[StageRecord]:
        """Return the folders that were begun and have no result."""
        return [folder for folder in self.folders if not folder.result]


def load(paths: Sequence[str]) -> Results:
    """Read every stage folder under `paths`, folders or URLs, at any depth; pages and summaries of runs are left out.

    Raises `InputError` for a path that is not there, and when none of them holds a finished stage.
    """
    found: dict[str, StageRecord] = {}
    for path in paths:
        if not files.exists(path):
            raise InputError(f"{path} (from --folders) does not exist. Name the folder of a run, or of its stages.")
        for place in _folders_with(path, ("config.json", "result.json")):
            folder = stage_folder.read_record(place)
            if folder is not None and folder.stage not in ("run", "demo", "report"):
                found[place] = folder
    folders = list(found.values())
    if not any(folder.result for folder in folders):
        raise InputError(
            f"No result.json under {', '.join(paths)}: there is nothing to report yet. "
            "Run a stage to its end first, `distilclip run RECIPE` for all of them."
        )
    evaluations = _finished(folders, "evaluate")
    return Results(
        folders=folders,
        scores=_scores(evaluations),
        num_parameters={m["digest"]: m["num_parameters"] for folder in evaluations for m in folder.result["models"]},
        trainings=[_training(folder) for folder in _finished(folders, "train")],
    )


def _finished(folders: Sequence[StageRecord], stage: str) -> list[StageRecord]:
    return [folder for folder in folders if folder.stage == stage and folder.result]


def _folders_with(path: str, names: tuple[str, ...]) -> list[str]:
    """Return the folders under `path`, with itself, that hold one of the named files; sorted by depth, then name."""
    if files.is_url(path):
        fs, inner = files.filesystem(path)
        matches = [fs.unstrip_protocol(p) for p in fs.find(inner) if p.rsplit("/", 1)[-1] in names]
        places = {match.rsplit("/", 1)[0] for match in matches}
    else:
        walked = os.walk(path)
        places = {folder for folder, _, members in walked if any(name in members for name in names)}
    return sorted(places, key=lambda place: (place.count("/"), place))


def _scores(folders: Sequence[StageRecord]) -> list[Score]:
    """Return every score. Where two folders have the same one, the later folder's value counts.

    Different models of one name (three seeds of a student, say) get the beginning of their digests in the name.
    """
    rows = [Score.from_row(row) for folder in folders for row in folder.result["rows"]]
    scores = {(s.model, s.model_digest, s.set, s.task, s.metric): s for s in rows}.values()
    digests: dict[str, set[str]] = {}
    for score in scores:
        digests.setdefault(score.model, set()).add(score.model_digest)
    return [
        score if len(digests[score.model]) == 1 else replace(score, model=f"{score.model} {score.model_digest[:7]}")
        for score in scores
    ]


def _training(folder: StageRecord) -> TrainRun:
    result = folder.result
    logged = _read_log(files.join(folder.path, "metrics.jsonl"))
    # Older folders do not say which values of the objective are terms: those with a column of their own.
    words = result.get("terms") or {name: "" for name in result["objective"] if name in logged}
    weights = {name: float(result["objective"][name]) for name in words if result["objective"].get(name)}
    return TrainRun(
        name=folder.path.rstrip("/").rsplit("/", 1)[-1],
        path=folder.path,
        weights=weights,
        words=words,
        num_parameters=result["num_parameters"],
        num_samples_seen=result["num_samples_seen"],
        digest=result["digest"],
        architecture=str(folder.config.get("student", "")),
        remarks=_remarks(folder),
        logged=logged,
    )


def _remarks(folder: StageRecord) -> list[str]:
    """Say by which weights a training drew its rows, and with whose captions."""
    weights = folder.config.get("row_weights")
    found = [] if weights is None else [f"rows weighed by {weights.rstrip('/').rsplit('/', 1)[-1]}"]
    if captions := folder.result.get("captions"):
        found.append(f"{captions['num_captions']:,} captions of groups")
    return found


def _read_log(path: str) -> dict[str, Series]:
    """Read every numeric column of a metrics.jsonl over its steps; none where there is no such file."""
    columns: dict[str, list[tuple[int, float]]] = {}
    for line in stage_folder.read_metrics(path) if files.exists(path) else ():
        for name, value in line.items():
            if name != "step" and isinstance(value, (int, float)) and math.isfinite(value):
                columns.setdefault(name, []).append((line["step"], value))
    return {
        name: Series(step=np.array([step for step, _ in pairs]), value=np.array([value for _, value in pairs], float))
        for name, pairs in columns.items()
    }
