"""Zero-shot, linear probe, retrieval and agreement with a teacher, of any number of models on any number of sets."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table as RichTable

from distilclip import run
from distilclip.data import files
from distilclip.data.policy import ErrorPolicy, OnError
from distilclip.data.samples import MAX_PIXELS
from distilclip.devices import resolve_device
from distilclip.errors import InputError, did_you_mean
from distilclip.evaluate.classes import read_templates, templates_digest
from distilclip.evaluate.dataset import LabelledSet, PairSet
from distilclip.evaluate.encode import Encoding
from distilclip.evaluate.prompts import prompts_of
from distilclip.evaluate.protocol import ALL_TASKS, Protocol, View
from distilclip.evaluate.scores import Task
from distilclip.evaluate.sets import load_set, parse_spec
from distilclip.evaluate.table import Table, build_tables, write_csv
from distilclip.models.clip import Clip, load_clip

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Flags of `distilclip evaluate`."""

    out: str
    """folder to write: result.json, table.md, table.csv"""
    models: tuple[str, ...]
    """train folders, checkpoints, open_clip names or hf-hub:ORG/NAME, each also as NAME=MODEL"""
    sets: tuple[str, ...]
    """evaluation sets, folder:PATH, tar:PATH or pairs:PATH, each also as NAME=KIND:PATH"""
    weights: tuple[str, ...] = ()
    """weights files of models given as open_clip names, as NAME=FILE (one model: FILE)"""
    tasks: tuple[Task, ...] = ALL_TASKS
    """what to measure, where it applies: agreement needs --teacher, the probe a set with training images"""
    teacher: str | None = None
    """the model to agree with: the name of one of --models, or a model of its own"""
    teacher_weights: str | None = None
    """weights file of a teacher given as an open_clip name"""
    templates: str | None = None
    """prompt templates in place of the sets' own: a text file, one a line, or openai/CLIP's prompts.md#SET"""
    probe_features: Literal["backbone", "projected"] = "backbone"
    """of the linear probe: before the projection as in CLIP's protocol, or the unit embeddings"""
    probe_l2: float | None = None
    """penalty of the linear probe (1 / C of scikit-learn; default: CLIP's sweep from 1e-6 to 1e6)"""
    precision: Literal["fp32", "bf16"] = "fp32"
    """of the towers (autocast); similarities are always float32"""
    batch_size: int = 64
    """images or texts at once"""
    seed: int = 0
    """of the probe's held-out rows and the bootstrap"""
    on_error: OnError = "raise"
    """an image that cannot be read stops the run, or is left out and counted"""
    max_bad_ratio: float = 0.01
    """the share of a split's images that may be left out"""
    max_pixels: int = MAX_PIXELS
    """larger images count as unreadable"""
    device: str = run.execution("auto")
    """auto (CUDA, then MPS, then CPU), or a torch device"""
    num_workers: int = run.execution(2)
    """processes that read and decode; 0 does it in the main one"""

    def __post_init__(self) -> None:
        for flag, values in (("--models", self.models), ("--sets", self.sets), ("--tasks", self.tasks)):
            if not values:
                raise InputError(f"{flag} is empty; name at least one.")
        _unique([name for name, _ in map(split_model, self.models)], flag="--models")
        _unique([parse_spec(spec)[0] for spec in self.sets], flag="--sets")
        weights_by_name(self.weights, [split_model(spec)[0] for spec in self.models])
        if self.teacher_weights and not self.teacher:
            raise InputError("--teacher-weights needs --teacher.")
        if self.tasks == ("agreement",) and not self.teacher:
            raise InputError("The task agreement needs --teacher.")
        if self.probe_l2 is not None and not self.probe_l2 > 0:
            raise InputError(f"--probe-l2 is {self.probe_l2}; it must be positive.")
        if self.batch_size < 1 or self.num_workers < 0 or self.seed < 0:
            raise InputError("--batch-size must be at least 1, --num-workers and --seed at least 0.")
        ErrorPolicy(self.on_error, self.max_bad_ratio)


def main(config: Config) -> dict[str, Any]:
    """Measure what is not measured yet, a file per model and set, then write the tables; the folder's result."""
    models = dict(map(split_model, config.models))
    inputs = run.folders_of("train", list(models.values()))
    folder = run.open_folder(config.out, stage="evaluate", config=config, inputs=inputs)
    if folder.finished:
        return folder.result()
    parts = {
        (model, spec): folder.child("parts", f"{i:02}-{j:02}.json")
        for i, model in enumerate(models)
        for j, spec in enumerate(config.sets)
    }
    missing = [key for key, path in parts.items() if not files.exists(path)]
    datasets = {spec: load_set(spec) for spec in dict.fromkeys(spec for _, spec in missing)}
    protocol = _protocol(config)
    teacher = _Teacher(config, protocol)
    weights = weights_by_name(config.weights, list(models))
    for model in dict.fromkeys(model for model, _ in missing):
        clip = load_clip(models[model], weights=weights.get(model), device=resolve_device(config.device))
        clip = dataclasses.replace(clip, name=model)
        digest = clip.digest
        for spec in (spec for name, spec in missing if name == model):
            dataset = datasets[spec]
            view = teacher.view(dataset) if teacher.differs_from(digest) else None
            scores = protocol.measure(clip, dataset, teacher=view)
            part = {
                "model": {"name": model, "digest": digest, **_describe_model(clip)},
                "set": {"name": dataset.name, **_describe_set(dataset, protocol)},
                "rows": [score.row(model=model, digest=digest) for score in scores],
            }
            run.write_json(parts[model, spec], part)
    found = [run.read_json(path) for path in parts.values()]
    rows = [row for part in found for row in part["rows"]]
    tables = build_tables(rows)
    files.write_bytes(folder.child("table.md"), "\n".join(table.markdown() for table in tables).encode())
    files.write_bytes(folder.child("table.csv"), write_csv(rows).encode())
    _print(tables)
    by_name = {kind: {part[kind]["name"]: part[kind] for part in found} for kind in ("model", "set")}
    return folder.finish(
        {"rows": rows, "models": list(by_name["model"].values()), "sets": list(by_name["set"].values())}
    )


class _Teacher:
    """The teacher's views of the sets, each made when it is first needed; the model too is loaded only then."""

    def __init__(self, config: Config, protocol: Protocol) -> None:
        self._config, self._protocol = config, protocol
        self._views: dict[str, View] = {}

    def differs_from(self, digest: str) -> bool:
        """Whether there is a teacher to agree with, other than this model itself."""
        wanted = self._config.teacher is not None and "agreement" in self._config.tasks
        return wanted and self._digest != digest

    def view(self, dataset: LabelledSet | PairSet) -> View:
        """The teacher's view of a set."""
        if dataset.name not in self._views:
            self._views[dataset.name] = self._protocol.view(self._clip, dataset)
        return self._views[dataset.name]

    @cached_property
    def _clip(self) -> Clip:
        config = self._config
        assert config.teacher is not None
        models = dict(map(split_model, config.models))
        name, spec = split_model(config.teacher)
        weights = config.teacher_weights
        if config.teacher in models:
            name, spec = config.teacher, models[config.teacher]
            weights = weights or weights_by_name(config.weights, list(models)).get(name)
        clip = load_clip(spec, weights=weights, device=resolve_device(config.device))
        return dataclasses.replace(clip, name=f"{name} (teacher)")

    @cached_property
    def _digest(self) -> str:
        return self._clip.digest


def split_model(spec: str) -> tuple[str, str]:
    """Name and model of `[NAME=]MODEL`; the name is else the last part of the model's path or id."""
    match = re.fullmatch(r"([\w.+-]+)=(.+)", spec)
    if match:
        return match[1], match[2]
    return re.split(r"[/:]", spec.rstrip("/"))[-1], spec


def weights_by_name(weights: Sequence[str], names: Sequence[str]) -> dict[str, str]:
    """Weights files by model; a bare file is the only model's. Raises `InputError` for a name that no model has."""
    found = {}
    for value in weights:
        match = re.fullmatch(r"([\w.+-]+)=(.+)", value)
        if match is None and len(names) > 1:
            raise InputError(f"--weights {value!r} does not say whose weights it holds: write NAME={value}.")
        name, path = (match[1], match[2]) if match else (names[0], value)
        if name not in names:
            raise InputError(f"--weights {value!r}: no model is called {name!r}. {did_you_mean(name, names)}")
        found[name] = path
    return found


def _unique(names: Sequence[str], *, flag: str) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(f"{flag} has two entries called {twice[0]!r}: name them, as in NAME={twice[0]}.")


def _protocol(config: Config) -> Protocol:
    return Protocol(
        tasks=config.tasks,
        templates=None if config.templates is None else _templates(config.templates),
        probe_features=config.probe_features,
        probe_l2=config.probe_l2,
        seed=config.seed,
        on_error=config.on_error,
        max_bad_ratio=config.max_bad_ratio,
        encoding=Encoding(
            batch_size=config.batch_size,
            dtype=PRECISIONS[config.precision],
            max_pixels=config.max_pixels,
            num_workers=config.num_workers,
        ),
    )


def _templates(source: str) -> tuple[str, ...]:
    path, _, name = source.partition("#")
    return prompts_of(path, name).templates if name else read_templates(path)


def _describe_model(clip: Clip) -> dict[str, Any]:
    return {"num_parameters": clip.num_parameters, "dim": clip.dim, "preprocessing": clip.preprocess_cfg}


def _describe_set(dataset: LabelledSet | PairSet, protocol: Protocol) -> dict[str, Any]:
    if isinstance(dataset, PairSet):
        return {"num_images": len(dataset.images), "num_captions": len(dataset.captions)}
    templates = protocol.templates_of(dataset)
    splits = {"test": dataset.test, "train": dataset.train, "validation": dataset.validation}
    return {
        **{f"num_{name}": len(split.images) for name, split in splits.items() if split is not None},
        "num_classes": len(dataset.classes),
        "metric": dataset.metric,
        "templates": list(templates),
        "templates_digest": templates_digest(templates),
    }


def _print(tables: Sequence[Table]) -> None:
    console = Console(highlight=False)
    for table in tables:
        printed = RichTable(table.columns[0], title=table.title, title_justify="left")
        for column in table.columns[1:]:
            printed.add_column(column, justify="right")
        for row in table.rows:
            printed.add_row(*row)
        console.print(printed, *table.notes, sep="\n")
