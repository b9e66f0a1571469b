"""Run every step of a recipe in one folder, each after the steps that it uses. Finished steps are skipped.

`[train.teacher]` is the step `train/teacher` and writes `OUT/train/teacher`. Elsewhere in the recipe `@train/teacher`
stands for that folder, and `@` alone for the folder of the run.

Several recipes have a folder each, `OUT/RECIPE`, and one report over all of them, `OUT/report`. A step that equals a
step of an earlier recipe, with equal inputs, is computed once; `@` then stands for the folder where it was.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from distilclip import files, stage_folder
from distilclip.config import build, field_names, read_recipe, recipe_values, step_names
from distilclip.configs.run import Config
from distilclip.errors import InputError, did_you_mean
from distilclip.progress import say, summarise

REFERENCE = re.compile(r"(?:^|(?<=[=:]))@([\w./-]*)")
STEP_STAGES = ("corpus", "embed", "balance", "cluster", "train", "evaluate", "export", "report")


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step of a run. `path` is `train/teacher`, or `RECIPE/train/teacher` with several recipes.

    Its folder is `config.out`: `path` below the folder of the run, or the folder of the earlier step that it equals.
    """

    stage: str
    path: str
    config: Any


def main(config: Config) -> dict[str, Any]:
    """Run all steps; every config is checked before the first step starts."""
    if config.other_recipes:
        out, steps, summary = _several(config)
    else:
        out, steps, summary = _one(config)
    folder = stage_folder.open_folder(out, stage="run", config=dataclasses.replace(config, out=out))
    shared = _shared(steps, out)
    for number, step in enumerate(steps, start=1):
        finished = stage_folder.Folder(step.config.out, step.stage).finished
        state = f" (is {shared[step.path]})" if step.path in shared else " (finished before)" if finished else ""
        say(f"{number}/{len(steps)} {step.path}{state}")
        started = time.perf_counter()
        result = importlib.import_module(f"distilclip.stages.{step.stage}").main(step.config)
        if not state:
            say(f"    {summarise(result, seconds=time.perf_counter() - started, out=step.config.out)}")
    if folder.finished and folder.result() == {"stage": "run", **summary}:
        return folder.result()
    return folder.finish(summary)


def _one(config: Config) -> tuple[str, list[Step], dict[str, Any]]:
    """Return the folder, the steps and the result of a run of one recipe."""
    tables = override(read_recipe(config.recipe), config.overrides)
    out = config.out or tables.get("out")
    if not out:
        raise InputError(f'{config.recipe} names no `out` folder: add `out = "runs/NAME"` or give --out.')
    steps = read_steps(tables, out=out, seed=config.seed, source=config.recipe)
    return out, steps, {"recipe": tables, "steps": [step.path for step in steps]}


def _several(config: Config) -> tuple[str, list[Step], dict[str, Any]]:
    """Return the folder, the steps and the result of a run of several recipes."""
    if not config.out:
        raise InputError("Several recipes need --out, the folder for theirs and for the report over all.")
    paths = (config.recipe, *config.other_recipes)
    names = [PurePath(path).stem for path in paths]
    for name, path in zip(names, paths, strict=True):
        if [*names, "report"].count(name) > 1:
            raise InputError(f"{path}: its folder would be {name}, and so would another's. Rename the recipe's file.")
    tables = {name: override(read_recipe(path), config.overrides) for name, path in zip(names, paths, strict=True)}
    steps = read_all_steps(tables, out=config.out, seed=config.seed)
    summary = {"recipes": tables, "steps": [step.path for step in steps], "shared": _shared(steps, config.out)}
    return config.out, steps, summary


def override(tables: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Return a recipe's tables with the values of `STAGE.OPTION=VALUE` in place of its own, in every step of the stage.

    Raises `InputError` for another form and for a stage that the recipe has not; `read_steps` checks the options.
    """
    changed = copy.deepcopy(tables)
    for text in overrides:
        place, _, value = text.partition("=")
        stage, _, option = place.partition(".")
        if not (stage and option and value):
            raise InputError(f"--overrides {text!r} is not of the form STAGE.OPTION=VALUE.")
        if stage not in STEP_STAGES or not isinstance(changed.get(stage), dict):
            raise InputError(f"--overrides {text!r}: the recipe has no [{stage}]. {did_you_mean(stage, changed)}")
        for name in step_names(changed[stage], _config_type(stage)):
            changed[stage][name].pop(option, None)
        changed[stage][option] = value
    return changed


def _shared(steps: Sequence[Step], out: str) -> dict[str, str]:
    """Return, for each step that equals a step of an earlier recipe, the path of that step."""
    below = files.join(out, "")
    places = {step.path: step.config.out.removeprefix(below) for step in steps}
    return {path: place for path, place in places.items() if path != place}


def read_all_steps(tables: Mapping[str, dict[str, Any]], *, out: str, seed: int | None) -> list[Step]:
    """Return the steps of several recipes, which are given by name, and the report over all of them.

    Raises `InputError` as `read_steps` does.
    """
    steps: list[Step] = []
    for name, own_tables in tables.items():
        kept = {stage: table for stage, table in own_tables.items() if stage != "report"}
        own = read_steps(kept, out=files.join(out, name), seed=seed, source=name, earlier=steps)
        steps += [dataclasses.replace(step, path=f"{name}/{step.path}") for step in own]
    values = {
        "folders": list(dict.fromkeys(step.config.out for step in steps)),
        "out": files.join(out, "report"),
        "title": ", ".join(tables),
    }
    report = build(_config_type("report"), values, stage="report")
    return [*steps, Step(stage="report", path="report", config=report)]


def read_steps(
    tables: dict[str, Any], *, out: str, seed: int | None, source: str, earlier: Sequence[Step] = ()
) -> list[Step]:
    """Return the recipe's steps, each after the steps it uses; `@` references become folders of this run.

    A step that equals one of `earlier` gets that step's config, with its folder.

    Raises:
        InputError: an unknown stage, an unknown reference, or steps that wait for one another.
    """
    values = _step_values(tables, source=source)
    if not values:
        raise InputError(f"{source} has no steps. Add a table such as [embed].")
    steps = []
    folders = {"": out}
    for path in _in_order(values, source=source):
        stage = path.partition("/")[0]
        config_type = _config_type(stage)
        resolved = {key: _resolve(value, folders) for key, value in values[path].items()}
        resolved["out"] = files.join(out, path)
        if seed is not None and "seed" in field_names(config_type):
            resolved["seed"] = seed
        config = build(config_type, resolved, stage=stage)
        config = next((step.config for step in earlier if _equal(config, step.config)), config)
        folders[path] = config.out
        steps.append(Step(stage=stage, path=path, config=config))
    return steps


def _equal(one: Any, other: Any) -> bool:
    """Return whether two steps' configs are the same except for the folder."""
    return type(one) is type(other) and dataclasses.replace(one, out=other.out) == other


def _step_values(tables: dict[str, Any], *, source: str) -> dict[str, dict[str, Any]]:
    """Return the path and the values of every step, in the order of the file."""
    values = {}
    for stage, table in tables.items():
        if not isinstance(table, dict):
            if stage != "out":
                raise InputError(f"{source}: {stage!r} stands outside a table; only `out` may do that.")
            continue
        if stage not in STEP_STAGES:
            raise InputError(f"{source}: no stage [{stage}]. {did_you_mean(stage, STEP_STAGES)}")
        config_type = _config_type(stage)
        for name in step_names(table, config_type) or [""]:
            path = f"{stage}/{name}" if name else stage
            values[path] = recipe_values(tables, config_type, stage=stage, name=name, source=source)
            if "out" in values[path]:
                raise InputError(f"{source}, [{stage}]: a step's folder is its name below the run's; leave out `out`.")
    return values


def _in_order(values: dict[str, dict[str, Any]], *, source: str) -> list[str]:
    """Return the steps in the order of the file, but each after the steps it refers to."""
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
    """Return the steps that a step's values name; `@` alone, the folder of the run, names all others."""
    found: set[str] = set()
    for value in values:
        if isinstance(value, list):
            found |= _references(value, path, paths, source)
        for reference in REFERENCE.findall(value) if isinstance(value, str) else []:
            step = _step_of(reference, paths)
            if reference and step is None:
                raise InputError(f"{source}, [{path}]: @{reference} is no step. {did_you_mean(reference, paths)}")
            found |= {step} if step else set(paths) - {path}
    return found


def _step_of(reference: str, paths: Iterable[str]) -> str | None:
    """Return the step whose folder, or a file in it, is named by a reference."""
    return next((path for path in paths if reference == path or reference.startswith(f"{path}/")), None)


def _resolve(value: Any, folders: Mapping[str, str]) -> Any:
    """Replace the references in a value: a step's name by its folder, `@` alone by the folder of the run."""
    if isinstance(value, list):
        return [_resolve(item, folders) for item in value]
    if not isinstance(value, str):
        return value

    def place(match: re.Match[str]) -> str:
        step = _step_of(match.group(1), folders) or ""
        return folders[step] + match.group(1)[len(step) :]

    return REFERENCE.sub(place, value)


def _config_type(stage: str) -> Any:
    return importlib.import_module(f"distilclip.configs.{stage}").Config
