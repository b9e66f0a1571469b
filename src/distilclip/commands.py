"""Answer the commands that are no stages: list or print the recipes of the package, and print shell completions."""

from __future__ import annotations

import argparse
import importlib
import typing
from collections.abc import Callable, Sequence

from distilclip import config
from distilclip.errors import InputError, did_you_mean
from distilclip.options import option_fields, option_types
from distilclip.stage_calls import module_of

SHELLS = ("bash", "zsh", "tcsh")


def recipes(argv: Sequence[str]) -> str:
    """Return a list of the package's recipes, or the text of the one that is named."""
    known = config.packaged_recipes()
    if not argv or argv[0] in ("-h", "--help"):
        lines = [f"  {name:20} {config.first_comment(path)}" for name, path in known.items()]
        return "\n".join(["Recipes: `distilclip run NAME`, or `distilclip recipes NAME > my.toml`.", "", *lines])
    name = argv[0].removesuffix(".toml")
    if name not in known:
        raise InputError(f"There is no recipe {name!r} in the package. {did_you_mean(name, known)}")
    with open(known[name], encoding="utf-8") as file:
        return file.read().rstrip("\n")


def completion(argv: Sequence[str]) -> str:
    """Return one completion script for all stages and their flags, made by shtab."""
    import shtab

    from distilclip.cli import STAGES

    shell = argv[0] if argv else ""
    if shell not in SHELLS:
        raise InputError(f"completion needs the name of a shell, as in `distilclip completion bash`: {SHELLS}.")
    parser = argparse.ArgumentParser("distilclip")
    stages = parser.add_subparsers()
    for name, words in STAGES.items():
        stage = stages.add_parser(name, help=words.replace("`", "'").replace("%", "%%"))
        stage.add_argument("recipe", nargs="?").complete = shtab.FILE  # type: ignore[attr-defined]
        options = importlib.import_module(f"distilclip.configs.{module_of(name)}").Config
        types = option_types(options)
        for option in option_fields(options):
            kind = types[option.name]
            choices = typing.get_args(kind) if typing.get_origin(kind) is typing.Literal else None
            flag = stage.add_argument(f"--{option.name.replace('_', '-')}", choices=choices)
            if choices is None:
                flag.complete = shtab.FILE  # type: ignore[attr-defined]
    for name, choices in (("recipes", tuple(config.packaged_recipes())), ("completion", SHELLS)):
        stages.add_parser(name).add_argument("name", choices=choices)
    return shtab.complete(parser, shell)


COMMANDS: dict[str, Callable[[Sequence[str]], str]] = {"recipes": recipes, "completion": completion}
