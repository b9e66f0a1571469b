"""Every step of one recipe in one folder, each after those it uses; finished steps are skipped.

`[train.teacher]` is the step `train/teacher` and writes `OUT/train/teacher`; elsewhere in the recipe
`@train/teacher` stands for that folder, and a bare `@` for the run's own.
"""

from __future__ import annotations

import dataclasses
import importlib
import re
import time
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from distilclip import config as recipes
from distilclip import run
from distilclip.data import files
from distilclip.errors import InputError, did_you_mean

REFERENCE = re.compile(r"(?:^|(?<=[=:]))@([\w./-]*)")
STEP_STAGES = ("corpus", "embed", "balance", "cluster", "train", "evaluate", "report")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Flags of `distilclip run`."""

    recipe: str
    """TOML file whose tables are the steps"""
    out: str | None = None
    """folder for all steps (default: the recipe's own `out`)"""
    seed: int | None = None
    """replaces the seed of every step that has one"""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step of a recipe: `train/teacher` is stage `train`, named `teacher`."""

    stage: str
    name: str
    config: Any

    @property
    def path(self) -> str:
        """Its folder below the run's."""
        return f"{self.stage}/{self.name}" if self.name else self.stage


def main(config: Config) -> dict[str, Any]:
    """Run all steps; every config is checked before the first step starts."""
    tables = recipes.read_recipe(config.recipe)
    out = config.out or tables.get("out")
    if not out:
        raise InputError(f'{config.recipe} names no `out` folder: add `out = "runs/NAME"` or give --out.')
    steps = read_steps(tables, out=out, seed=config.seed, source=config.recipe)
    folder = run.open_folder(out, stage="run", config=dataclasses.replace(config, out=out))
    console = Console(stderr=True)
    for number, step in enumerate(steps, start=1):
        state = " (finished before)" if run.Folder(step.config.out, step.stage).finished else ""
        console.print(f"[bold]{number}/{len(steps)} {step.path}[/bold]{state}", highlight=False)
        started = time.perf_counter()
        importlib.import_module(f"distilclip.stages.{step.stage}").main(step.config)
        if not state:
            console.print(f"    {time.perf_counter() - started:.1f} s", highlight=False)
    summary = {"recipe": tables, "steps": [step.path for step in steps]}
    if folder.finished and folder.result() == {"stage": "run", **summary}:
        return folder.result()
    return folder.finish(summary)


def read_steps(tables: dict[str, Any], *, out: str, seed: int | None, source: str) -> list[Step]:
    """The recipe's steps with their configs, `@` references replaced by folders of this run, each after those it uses.

    Raises `InputError` for an unknown stage, an unknown reference, and steps that wait for one another.
    """
    values = _step_values(tables, source=source)
    if not values:
        raise InputError(f"{source} has no steps. Add a table such as [embed].")
    steps = []
    for path in _in_order(values, source=source):
        stage, _, name = path.partition("/")
        config_type = _config_type(stage)
        resolved = {key: _resolve(value, out) for key, value in values[path].items()}
        resolved["out"] = files.join(out, path)
        if seed is not None and "seed" in recipes.field_names(config_type):
            resolved["seed"] = seed
        steps.append(Step(stage=stage, name=name, config=recipes.build(config_type, resolved, stage=stage)))
    return steps


def _step_values(tables: dict[str, Any], *, source: str) -> dict[str, dict[str, Any]]:
    """Path and values of every step, in the order of the file."""
    values = {}
    for stage, table in tables.items():
        if not isinstance(table, dict):
            if stage != "out":
                raise InputError(f"{source}: {stage!r} stands outside a table; only `out` may.")
            continue
        if stage not in STEP_STAGES:
            raise InputError(f"{source}: no stage [{stage}]. {did_you_mean(stage, STEP_STAGES)}")
        config_type = _config_type(stage)
        for name in recipes.step_names(table, config_type) or [""]:
            path = f"{stage}/{name}" if name else stage
            values[path] = recipes.recipe_values(tables, config_type, stage=stage, name=name, source=source)
            if "out" in values[path]:
                raise InputError(f"{source}, [{stage}]: a step's folder is its name below the run's; leave out `out`.")
    return values


def _in_order(values: dict[str, dict[str, Any]], *, source: str) -> list[str]:
    """Steps in the order of the file, but each after the steps it refers to."""
    waiting = {path: _references(list(v.values()), path, list(values), source) for path, v in values.items()}
    order: list[str] = []
    while waiting:
        ready = next((path for path, needed in waiting.items() if needed <= set(order)), None)
        if ready is None:
            raise InputError(f"{source}: the steps {sorted(waiting)} wait for one another; check their @ references.")
        order.append(ready)
        del waiting[ready]
    return order


def _references(values: list[Any], path: str, paths: list[str], source: str) -> set[str]:
    """The steps that a step's values name; a bare `@`, the run's folder, names all others."""
    found: set[str] = set()
    for value in values:
        if isinstance(value, list):
            found |= _references(value, path, paths, source)
        for reference in REFERENCE.findall(value) if isinstance(value, str) else []:
            step = next((p for p in paths if reference == p or reference.startswith(f"{p}/")), None)
            if reference and step is None:
                raise InputError(f"{source}, [{path}]: @{reference} is no step. {did_you_mean(reference, paths)}")
            found |= {step} if step else set(paths) - {path}
    return found


def _resolve(value: Any, out: str) -> Any:
    if isinstance(value, list):
        return [_resolve(item, out) for item in value]
    if not isinstance(value, str):
        return value
    return REFERENCE.sub(lambda match: files.join(out, match.group(1)) if match.group(1) else out, value)


def _config_type(stage: str) -> Any:
    return importlib.import_module(f"distilclip.stages.{stage}").Config
