"""Every step of one recipe, in the order of its tables, in one folder; finished steps are skipped.

`[train.teacher]` is the step `train/teacher` and writes `OUT/train/teacher`; elsewhere in the recipe
`@train/teacher` stands for that folder.
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
        raise InputError(f"{config.recipe} names no `out` folder: add `out = \"runs/NAME\"` or give --out.")
    steps = read_steps(tables, out=out, seed=config.seed, source=config.recipe)
    console = Console(stderr=True)
    for number, step in enumerate(steps, start=1):
        folder = run.Folder(step.config.out, step.stage)
        state = " (finished before)" if folder.finished else ""
        console.print(f"[bold]{number}/{len(steps)} {step.path}[/bold]{state}", highlight=False)
        started = time.perf_counter()
        importlib.import_module(f"distilclip.stages.{step.stage}").main(step.config)
        if not state:
            console.print(f"    {time.perf_counter() - started:.1f} s", highlight=False)
    summary = {"stage": "run", "recipe": tables, "steps": [step.path for step in steps]}
    run.write_json(files.join(out, "result.json"), summary)
    return summary


def read_steps(tables: dict[str, Any], *, out: str, seed: int | None, source: str) -> list[Step]:
    """The recipe's steps with their configs, `@` references replaced by folders of this run.

    Raises `InputError` for an unknown stage and for a reference to a step that does not come before it.
    """
    steps: list[Step] = []
    for stage, table in tables.items():
        if not isinstance(table, dict):
            if stage != "out":
                raise InputError(f"{source}: {stage!r} stands outside a table; only `out` may.")
            continue
        if stage not in STEP_STAGES:
            raise InputError(f"{source}: no stage [{stage}]. {did_you_mean(stage, STEP_STAGES)}")
        config_type = importlib.import_module(f"distilclip.stages.{stage}").Config
        for name in recipes.step_names(table, config_type) or [""]:
            path = f"{stage}/{name}" if name else stage
            values = recipes.recipe_values(tables, config_type, stage=stage, name=name, source=source)
            known = [step.path for step in steps]
            values = {k: _resolve(v, out=out, known=known, where=f"{source}, [{path}]") for k, v in values.items()}
            values["out"] = files.join(out, path)
            if seed is not None and any(f.name == "seed" for f in dataclasses.fields(config_type)):
                values["seed"] = seed
            steps.append(Step(stage=stage, name=name, config=recipes.build(config_type, values, stage=stage)))
    if not steps:
        raise InputError(f"{source} has no steps. Add a table such as [embed].")
    return steps


def _resolve(value: Any, *, out: str, known: list[str], where: str) -> Any:
    if isinstance(value, list):
        return [_resolve(v, out=out, known=known, where=where) for v in value]
    if not isinstance(value, str):
        return value
    for reference in re.findall(r"(?:^|[=:])@([\w./-]*)", value):
        if reference and not any(reference == step or reference.startswith(f"{step}/") for step in known):
            raise InputError(
                f"{where}: @{reference} is no step before this one. {did_you_mean(reference, known or ['none'])}"
            )
    return re.sub(r"(^|[=:])@", lambda match: f"{match.group(1)}{out}/", value).rstrip("/")
