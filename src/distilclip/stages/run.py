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
import itertools
import os
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, Literal

from distilclip import files, folder_lock, launch, stage_folder
from distilclip.config import (
    STEP_STAGES,
    build,
    config_type_of,
    field_names,
    read_recipe,
    recipe_values,
    step_names,
    step_paths,
)
from distilclip.configs.run import Config
from distilclip.errors import InputError, did_you_mean
from distilclip.messages import say
from distilclip.progress import summarise
from distilclip.stage_calls import module_of
from distilclip.step_references import find_references, resolve

if TYPE_CHECKING:
    from distilclip.distributed import Orders


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step of a run. `path` is `train/teacher`, or `RECIPE/train/teacher` with several recipes.

    Its folder is `config.out`: `path` below the folder of the run, or the folder of the earlier step that it equals.
    """

    stage: str
    path: str
    config: Any


@dataclass(frozen=True, kw_only=True)
class Standing:
    """How a step stands: `state` in a word, and why it is stale."""

    step: Step
    state: Literal["finished", "unfinished", "to do", "longer", "stale", "left out"]
    reasons: Sequence[str] = ()

    def __str__(self) -> str:
        return f"{self.step.path}: {self.state}" + (f" ({'; '.join(self.reasons)})" if self.reasons else "")


def main(config: Config) -> dict[str, Any]:
    """Run all steps; every config is checked before the first step starts.

    Where torchrun or Slurm started several processes, the first runs the steps, and all train.
    """
    out, steps, summary = _several(config) if config.other_recipes else _one(config)
    rank, world = launch.find_place()
    if world == 1:
        return _run(config, out, steps, summary, None)
    if config.nproc_per_node != "auto":
        raise InputError(f"--nproc-per-node {config.nproc_per_node}: {world} processes run already; leave it out.")
    from distilclip.distributed import Orders

    orders = Orders()
    if rank > 0:
        return _follow(steps, orders)
    try:
        return _run(config, out, steps, summary, orders)
    finally:
        orders.end()


def _follow(steps: Sequence[Step], orders: Orders) -> dict[str, Any]:
    """Train what the first process says, as often as it says so."""
    by_path = {step.path: step for step in steps}
    while path := orders.take():
        importlib.import_module("distilclip.stages.train").main(by_path[path].config)
    orders.confirm_end()
    return {}


def _run(
    config: Config, out: str, steps: Sequence[Step], summary: dict[str, Any], orders: Orders | None
) -> dict[str, Any]:
    """Run the steps in this process; those that train also in others."""
    chosen = _choose(steps, config)
    standings = predict(steps, chosen)
    if config.dry_run:
        print("\n".join(str(standing) for standing in standings))
        return {}
    stale = [standing for standing in standings if standing.state == "stale"]
    if stale and config.stale == "stop":
        raise InputError(_explain_stale(stale, out))
    folder = stage_folder.open_folder(out, stage="run", config=dataclasses.replace(config, out=out))
    shared, before = _shared(steps, out), _unused_folder(out)
    for number, step in enumerate(steps, start=1):
        standing = look_at(step, steps) if step.path in chosen else Standing(step=step, state="left out")
        note = f"is {shared[step.path]}" if step.path in shared else "finished before"
        if standing.state in ("finished", "left out"):
            folder_lock.remove_stale(step.config.out)
            say(f"{number}/{len(steps)} {step.path} ({standing.state if standing.state == 'left out' else note})")
            continue
        say(f"{number}/{len(steps)} {standing}" if standing.reasons else f"{number}/{len(steps)} {step.path}")
        if standing.state == "stale":
            if config.stale == "stop":  # what it reads came out differently
                raise InputError(_explain_stale([standing], out))
            _put_away(step.config.out, files.join(before, step.path) if config.stale == "redo" else None)
        started = time.perf_counter()
        with folder_lock.held_for_block():
            result = _run_step(step, orders, nproc_per_node=config.nproc_per_node)
        say(f"    {summarise(result, seconds=time.perf_counter() - started, out=step.config.out)}")
    if len(chosen) < len(steps):
        folder_lock.release(out)
    if len(chosen) < len(steps) or (folder.finished and folder.result() == {"stage": "run", **summary}):
        return {"stage": "run", **summary}
    return folder.finish(summary)


def _run_step(step: Step, orders: Orders | None, *, nproc_per_node: str) -> dict[str, Any]:
    """Run one step here, or where it trains in as many processes as there are or are wanted."""
    config = step.config
    if step.stage == "train" and orders is not None:
        orders.give(step.path)
    elif step.stage == "train":
        count = launch.count_processes(nproc_per_node, device=config.device, batch_size=config.batch_size)
        if count > 1:
            launch.run_in_processes("train", stage_folder.config_values(config), num_processes=count)
            return stage_folder.Folder(config.out, "train").result()
    return importlib.import_module(f"distilclip.stages.{module_of(step.stage)}").main(config)


def look_at(step: Step, steps: Sequence[Step]) -> Standing:
    """Say how a step stands now, from the small files of its folder."""
    config = step.config
    folder = stage_folder.Folder(config.out, step.stage)
    changes = stage_folder.find_changes(config.out, stage=step.stage, config=config, inputs=config.inputs())
    if not changes and step.stage == "report" and folder.finished:
        changes = _changed_sources(folder.result()["sources"], config.folders, steps)
    if changes:
        return Standing(step=step, state="stale", reasons=changes)
    if stage_folder.is_outgrown(config.out, config):
        return Standing(step=step, state="longer", reasons=["goes on to a larger value"])
    if folder.finished:
        return Standing(step=step, state="finished")
    return Standing(step=step, state="unfinished" if files.exists(folder.child("config.json")) else "to do")


def predict(steps: Sequence[Step], chosen: Collection[str]) -> list[Standing]:
    """Say how all steps stand, before any is run; a finished one that reads a stale one is stale, too."""
    found: list[Standing] = []
    anew: dict[str, str] = {}
    for step in steps:
        if step.path not in chosen:
            found.append(Standing(step=step, state="left out"))
            continue
        standing = look_at(step, steps)
        read = [anew[path] for path, _ in step.config.inputs() if path in anew]
        if step.stage == "report":
            read = list(anew.values())
        if read and standing.state != "to do":
            reasons = [*standing.reasons, f"it reads {', '.join(dict.fromkeys(read))}, made anew"]
            standing = Standing(step=step, state="stale", reasons=reasons)
        if standing.state in ("stale", "longer"):
            anew[step.config.out] = step.path
        found.append(standing)
    return found


def _choose(steps: Sequence[Step], config: Config) -> list[str]:
    """Return the paths of the steps that `--only` and `--from-step` leave."""
    paths = [step.path for step in steps]
    name = config.only or config.from_step
    if name is None:
        return paths
    if name not in paths:
        flag = "--only" if config.only else "--from-step"
        raise InputError(f"{flag} {name!r}: the recipe has no such step. {did_you_mean(name, paths)}")
    return [name] if config.only else paths[paths.index(name) :]


def _changed_sources(sources: Mapping[str, str], folders: Sequence[str], steps: Sequence[Step]) -> list[str]:
    """Say which steps a page does not show as they are now."""
    places = tuple(files.join(folder, "") for folder in folders)
    told = [step for step in steps if step.stage not in ("report", "corpus")]
    shown = [step for step in told if files.join(step.config.out, "").startswith(places)]
    records = {step.path: (step.config.out, stage_folder.read_finished(step.config.out)) for step in shown}
    changed = [
        path
        for path, (folder, record) in records.items()
        if record is not None and sources.get(folder) != stage_folder.result_digest(folder)
    ]
    return [f"{', '.join(changed)} changed since it was made"] if changed else []


def _explain_stale(stale: Sequence[Standing], out: str) -> str:
    lines = [f"  {standing}" for standing in stale]
    return "\n".join(
        [
            f"{out} holds steps that would come out differently now:",
            *lines,
            "Make them anew with --stale redo, which moves the old folders beside, or --stale replace, which removes "
            "them; or choose another --out.",
        ]
    )


def _unused_folder(out: str) -> str:
    numbers = itertools.count(1)
    return next(path for path in (f"{out.rstrip('/')}-before-{n}" for n in numbers) if not files.is_folder(path))


def _put_away(path: str, place: str | None) -> None:
    """Move the folder of a stale step to `place`, or remove it. Raises `InputError` where another process writes it."""
    folder_lock.hold(path)
    folder_lock.release(path)
    if place is None:
        say(f"    removes {path}")
        files.remove_folder(path)
    elif files.is_url(path):
        raise InputError(f"{path} cannot be moved: run again with --stale replace, or with another --out.")
    else:
        say(f"    moves {path} to {place}")
        os.makedirs(os.path.dirname(place), exist_ok=True)
        os.rename(path, place)


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
        for name in step_names(changed[stage], config_type_of(stage)):
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
    report = build(config_type_of("report"), values, stage="report")
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
        config_type = config_type_of(stage)
        resolved = {key: resolve(value, folders) for key, value in values[path].items()}
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
        for path, name in step_paths(table, stage).items():
            values[path] = recipe_values(tables, config_type_of(stage), stage=stage, name=name, source=source)
            if "out" in values[path]:
                raise InputError(f"{source}, [{stage}]: a step's folder is its name below the run's; leave out `out`.")
    return values


def _in_order(values: dict[str, dict[str, Any]], *, source: str) -> list[str]:
    """Return the steps in the order of the file, but each after the steps it refers to."""
    waiting = {path: find_references(v.values(), path, list(values), source) for path, v in values.items()}
    order: list[str] = []
    while waiting:
        ready = next((path for path, needed in waiting.items() if needed <= set(order)), None)
        if ready is None:
            raise InputError(f"{source}: the steps {sorted(waiting)} wait for one another; check their @ references.")
        order.append(ready)
        del waiting[ready]
    return order
