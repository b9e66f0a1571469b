"""Groups of options: a field of a Config may be a dataclass, whose fields are flags of the stage like any other.

Recipes, flags and config.json know the fields by their own names alone, so moving one into a group breaks nothing.
"""

from __future__ import annotations

import dataclasses
import typing
from typing import Any


def option_fields(config_type: Any) -> list[dataclasses.Field[Any]]:
    """The fields of a Config class in order, each group replaced by its own fields."""
    types = typing.get_type_hints(config_type)
    found: list[dataclasses.Field[Any]] = []
    for field in dataclasses.fields(config_type):
        group = types[field.name]
        found += option_fields(group) if dataclasses.is_dataclass(group) else [field]
    return found


def option_values(config: Any) -> dict[str, Any]:
    """The values of a Config by option, groups dissolved."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        values |= option_values(value) if dataclasses.is_dataclass(value) else {field.name: value}
    return values
