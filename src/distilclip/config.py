"""Turn recipes and flags into a stage's Config.

A recipe is nothing but saved flags. TOML, or a folder's config.json, becomes flags; the user's own flags follow; tyro
parses them all. So recipes and flags are checked by the same code, and flags win. Only this file knows tyro.
"""

from __future__ import annotations

import importlib
import itertools
import json
import os
import re
import tomllib
from collections.abc import Sequence
from typing import Any, TypeVar

from distilclip import files, messages
from distilclip.errors import InputError, did_you_mean
from distilclip.options import option_fields, option_types
from distilclip.stage_calls import build_config, module_of
from distilclip.step_references import find_references, resolve

C = TypeVar("C")

STEP_STAGES = (
    "corpus",
    "embed",
    "import",
    "balance",
    "select",
    "cluster",
    "weigh",
    "pack",
    "train",
    "evaluate",
    "export",
    "report",
)
"""What a recipe may have steps of."""

ALIASES = {
    "lr": "learning-rate",
    "wd": "weight-decay",
    "warmup": "warmup-steps",
    "epochs": "num-epochs",
    "force-patch-dropout": "patch-dropout",
    "workers": "num-workers",
    "pretrained": "weights",
    "report-to": "track",
    "train-data": "data",
}
"""Flags of open_clip and others, and ours that mean the same."""
HINTS = {
    "batch-size-per-gpu": "--batch-size counts the pairs of a step over all processes: give it N times as much.",
    "local-batch-size": "--batch-size counts the pairs of a step over all processes: give it N times as much.",
    "accum-freq": "--micro-batch says how many pairs a process holds at once; gradients stay the same.",
    "model": "train calls it --student.",
    "pretrained": "train calls it --init: weights:FILE, or inherit:TEACHER.",
    "resume": "the same command goes on from the last checkpoint in --out.",
    "amp": "--precision bf16, fp16 or fp32.",
    "lock-image": "--freeze image, with --init.",
    "lock-text": "--freeze text, with --init.",
    "lr-scheduler": "--schedule cosine or constant.",
    "epochs-cooldown": "--cooldown is a share of all steps.",
}
"""What to say about flags of open_clip and others that have no equal here."""


def parse(config_type: type[C], argv: Sequence[str], *, stage: str, description: str = "") -> C:
    """Parse `[RECIPE[#STEP]] [--flag value ...]` into a stage's Config.

    `RECIPE` is a config.json, or a TOML file whose `[stage]` table holds the flags (with `#name`, its `[stage.name]`
    table); its `@` references, and an `out` that is missing there, are those of `distilclip run RECIPE`. A Config with
    a field `recipe` gets the path itself, and further paths as `other_recipes`. A Config with fields marked
    `positional` gets them in their order: `distilclip search MODEL PICTURES QUERY`.

    Raises `InputError` for a recipe with an unknown key or stage. For a bad flag, tyro prints a message and exits.
    """
    import tyro

    argv = translate_aliases(argv, config_type)
    flags: list[str] = []
    positional = bool(argv) and not argv[0].startswith("-")
    if positional and not argv[0].endswith(".json") and "recipe" in field_names(config_type):
        flags = ["--recipe", argv.pop(0)]
        others = list(itertools.takewhile(lambda word: not word.startswith("-"), argv))
        if others:
            flags, argv = [*flags, "--other-recipes", *others], argv[len(others) :]
    elif positional and not argv[0].endswith((".json", ".toml")) and (names := positional_names(config_type)):
        while names and argv and not argv[0].startswith("-"):
            flags += [f"--{names.pop(0)}", argv.pop(0)]
    elif positional:
        path, _, name = argv.pop(0).partition("#")
        given = {a.split("=")[0].removeprefix("--").replace("-", "_") for a in argv if a.startswith("--")}
        tables = read_recipe(path)
        values = recipe_values(tables, config_type, stage=stage, name=name, source=path)
        if path.endswith(".toml"):
            values = _place_step(tables, values, path=f"{stage}/{name}" if name else stage, source=path)
        flags = as_flags({k: v for k, v in values.items() if k not in given})
    return tyro.cli(
        config_type,
        args=_with_values([*flags, *argv], config_type),
        prog=f"distilclip {stage}",
        description=description,
        config=(tyro.conf.FlagConversionOff, tyro.conf.OmitSubcommandPrefixes, tyro.conf.OmitArgPrefixes),
    )


def _place_step(tables: dict[str, Any], values: dict[str, Any], *, path: str, source: str) -> dict[str, Any]:
    """Return a step's values with folders for its `@` references, and its own folder, as `distilclip run` has them."""
    stages = [stage for stage, table in tables.items() if stage in STEP_STAGES and isinstance(table, dict)]
    paths = [step for stage in stages for step in step_paths(tables[stage], stage)]
    out = tables.get("out")
    if not isinstance(out, str):
        if find_references(values.values(), path, paths, source):
            raise InputError(f'{source} names no `out` folder, in which @ references lie: add `out = "runs/NAME"`.')
        return values
    find_references(values.values(), path, paths, source)  # checks them
    folders = {"": out, **{step: files.join(out, step) for step in paths}}
    return {"out": folders.get(path, files.join(out, path)), **{k: resolve(v, folders) for k, v in values.items()}}


def config_type_of(stage: str) -> Any:
    """Return the Config class of a stage."""
    return importlib.import_module(f"distilclip.configs.{module_of(stage)}").Config


def translate_aliases(argv: Sequence[str], config_type: Any) -> list[str]:
    """Replace flags by which other tools know an option, and say so; `InputError` for one that has no equal here."""
    known = {name.replace("_", "-") for name in field_names(config_type)}
    words = []
    for word in argv:
        flag, separator, value = word.removeprefix("--").partition("=")
        if word.startswith("--") and flag not in known:
            if (ours := ALIASES.get(flag)) in known:
                messages.say(f"--{flag} is called --{ours} here")
                word = f"--{ours}{separator}{value}"
            elif flag in HINTS and "student" in known:
                raise InputError(f"There is no --{flag}: {HINTS[flag]}")
        words.append(word)
    return words


def take_message_flags(argv: list[str]) -> dict[str, str]:
    """Remove --log-level, --log-format and --quiet from the words; the arguments of `messages.set_up_messages`."""
    found: dict[str, str] = {}
    for flag, name in (("--log-level", "level"), ("--log-format", "style")):
        for place in range(len(argv) - 1, -1, -1):
            word = argv[place]
            if word == flag:
                if place + 1 == len(argv):
                    raise InputError(f"{flag} needs a value.")
                found[name] = argv[place + 1]
                del argv[place : place + 2]
            elif word.startswith(f"{flag}="):
                found[name] = word.partition("=")[2]
                del argv[place]
    if "--quiet" in argv:
        argv.remove("--quiet")
        found["level"] = "warning"
    return found


def packaged_recipes() -> dict[str, str]:
    """Return the paths of the package's recipes by name; in a checkout they lie in `recipes/`."""
    package = os.path.dirname(os.path.abspath(__file__))
    for folder in (os.path.join(package, "recipes"), os.path.join(package, "..", "..", "recipes")):
        if os.path.isdir(folder):
            names = sorted(name for name in os.listdir(folder) if name.endswith(".toml"))
            return {name.removesuffix(".toml"): os.path.normpath(os.path.join(folder, name)) for name in names}
    return {}


def first_comment(path: str) -> str:
    """Return the first sentence of a recipe's comment."""
    with open(path, encoding="utf-8") as file:
        lines = itertools.takewhile(lambda line: line.startswith("#"), file)
        text = " ".join(line.lstrip("# ").strip() for line in lines)
    return re.split(r"(?<=[a-z\d])\.\s(?=[A-Z])", text, maxsplit=1)[0].rstrip(".") + "."


def find_recipe(name: str) -> str:
    """Return the path of a recipe: a file, or the name of one in the package. `InputError` where there is neither."""
    if files.exists(name) and not files.is_folder(name):
        return name
    known = packaged_recipes()
    if name.removesuffix(".toml") in known:
        return known[name.removesuffix(".toml")]
    raise InputError(
        f"The recipe {name!r} does not exist: it is no file, and none in the package. {did_you_mean(name, known)}"
    )


def _with_values(argv: Sequence[str], config_type: Any) -> list[str]:
    """Replace `--list` alone by `--list True`: a switch takes a value as every flag does, so a recipe can set it."""
    switches = {f"--{f.name}".replace("_", "-") for f in option_fields(config_type) if f.type in ("bool", bool)}
    found: list[str] = []
    for place, word in enumerate(argv):
        found.append(word)
        if word in switches and (place + 1 == len(argv) or argv[place + 1].startswith("--")):
            found.append("True")
    return found


def build(config_type: type[C], values: dict[str, Any], *, stage: str) -> C:
    """Turn plain values into a Config, as the same flags would be.

    Values of the right kinds need no parser, which takes a tenth of a second for each step of a recipe.
    """
    types = option_types(config_type)
    as_text = {n: json.dumps(v) if isinstance(v, dict) and types.get(n) is str else v for n, v in values.items()}
    try:
        return build_config(config_type, {n: v for n, v in as_text.items() if v is not None}, stage=stage)
    except InputError:  # words for numbers, from --overrides; or a real error, which the parser words as ever
        return parse(config_type, as_flags(values), stage=stage)


def read_recipe(path: str) -> dict[str, Any]:
    """Read a recipe file's tables; a config.json is a recipe with one stage."""
    path = find_recipe(path)
    try:
        content = files.read_bytes(path).decode()
        if path.endswith(".json"):
            values = json.loads(content)
            stage = values.pop("stage")
            if not isinstance(stage, str):
                raise ValueError(f"its stage is {stage!r}")
            return {stage: values}
        return tomllib.loads(content)
    except InputError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"The recipe {path} cannot be read: {error!r:.200}.") from error


def field_names(config_type: Any) -> set[str]:
    """Return the names of a Config class's options, with those of its groups."""
    return {field.name for field in option_fields(config_type)}


def positional_names(config_type: Any) -> list[str]:
    """Return the options that may be given without their flags, before all others."""
    return [field.name for field in option_fields(config_type) if field.metadata.get("positional")]


def step_names(table: dict[str, Any], config_type: type) -> list[str]:
    """Return the names of a stage's steps: a sub-table that is no option is a step, such as `[train.teacher]`."""
    fields = field_names(config_type)
    return [key for key, value in table.items() if isinstance(value, dict) and key not in fields]


def step_paths(table: dict[str, Any], stage: str) -> dict[str, str]:
    """Return the steps of a stage's table by path, such as `train/teacher`, each with its name; `train` has none."""
    names = step_names(table, config_type_of(stage)) or [""]
    return {f"{stage}/{name}" if name else stage: name for name in names}


def recipe_values(
    recipe: dict[str, Any], config_type: type, *, stage: str, name: str = "", source: str = "recipe"
) -> dict[str, Any]:
    """Return one step's values: the stage's table, then the step's own table over it. Unknown keys are errors."""
    if stage not in recipe:
        tables = [key for key, value in recipe.items() if isinstance(value, dict)]
        raise InputError(f"{source} has no [{stage}] table. {did_you_mean(stage, tables)}")
    table = recipe[stage]
    steps = step_names(table, config_type)
    if name and name not in steps:
        raise InputError(f"{source} has no [{stage}.{name}] table. {did_you_mean(name, steps)}")
    if steps and not name:
        raise InputError(f"{source} has several {stage} steps: choose one as {source}#NAME, NAME one of {steps}.")
    values = {key: value for key, value in table.items() if key not in steps}
    values.update(table[name] if name else {})
    fields = field_names(config_type)
    for key in values:
        if key not in fields:
            raise InputError(
                f"{source}, [{stage}{'.' + name if name else ''}]: unknown key {key!r}. {did_you_mean(key, fields)}"
            )
    return values


def as_flags(values: dict[str, Any]) -> list[str]:
    """Return values as command-line flags; `None` is left to the default."""
    flags: list[str] = []
    for key, value in values.items():
        if value is None:
            continue
        flags.append("--" + key.replace("_", "-"))
        if isinstance(value, dict) and all(isinstance(v, int | float) for v in value.values()):
            flags += [str(part) for item in value.items() for part in item]
        elif isinstance(value, dict):
            flags.append(json.dumps(value))
        elif isinstance(value, list | tuple):
            flags += [str(v) for v in value]
        else:
            flags.append(str(value))
    return flags
