"""List the options of a Config, with those of its groups.

A field of a Config may be a dataclass, a group: its fields are flags of the stage as any other. Recipes, flags and
config.json know an option by its own name alone, so moving one into a group breaks nothing.
"""

from __future__ import annotations

import dataclasses
import functools
import typing
from typing import Any

from distilclip.errors import InputError


def changeable(default: Any) -> Any:
    """Declare a config field that says how to compute, not what: it may differ between a run and its resumption."""
    return dataclasses.field(default=default, metadata={"changeable": True})


def extendable(default: Any) -> Any:
    """Declare a config field that may grow: a folder made with a smaller value goes on to the larger one."""
    return dataclasses.field(default=default, metadata={"extendable": True})


def option_fields(config_type: Any) -> tuple[dataclasses.Field[Any], ...]:
    """Return the fields of a Config class in order, each group replaced by its own fields."""
    return _find_fields(config_type)


@functools.cache  # a recipe of nine steps asks 400 times, and each time all type hints would be read
def _find_fields(config_type: Any) -> tuple[dataclasses.Field[Any], ...]:
    types = typing.get_type_hints(config_type)
    found: list[dataclasses.Field[Any]] = []
    for field in dataclasses.fields(config_type):
        group = types[field.name]
        found += option_fields(group) if dataclasses.is_dataclass(group) else [field]
    return tuple(found)


def option_types(config_type: Any) -> dict[str, Any]:
    """Return the types of a Config's options by name, with those of its groups."""
    found: dict[str, Any] = {}
    for name, kind in typing.get_type_hints(config_type).items():
        found |= option_types(kind) if dataclasses.is_dataclass(kind) else {name: kind}
    return found


def option_values(config: Any) -> dict[str, Any]:
    """Return the values of a Config by option, with those of its groups."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        values |= option_values(value) if dataclasses.is_dataclass(value) else {field.name: value}
    return values


def check_at_least(options: Any, least: int, *names: str) -> None:
    """Raise `InputError` naming the first of these options whose value is less; one that is None is not given."""
    for name in names:
        value = getattr(options, name)
        if value is not None and value < least:
            raise InputError(f"{name} is {value}; it must be at least {least}.")
