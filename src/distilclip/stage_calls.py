"""Call a stage from Python by its options: `dc.stages.balance(store="store", out="groups", metric="cosine", ...)`.

The module of a stage is also its function. It takes every option by its own name, those of the Config's groups too, as
the command line takes flags, and returns what the stage writes into result.json.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import keyword
import numbers
import os
import types
import typing
from collections.abc import Mapping
from typing import Any

from distilclip import folder_lock
from distilclip.errors import InputError, did_you_mean
from distilclip.options import option_fields, option_types


def module_of(stage: str) -> str:
    """Return the name of a stage's module: its own, and `import_` for `import`, which no module can be named."""
    return f"{stage}_" if keyword.iskeyword(stage) else stage


class StageCall(types.ModuleType):
    """The module of a stage, with Config and main, which can be called."""

    Config: Any
    main: Any

    def __call__(self, **options: Any) -> dict[str, Any]:
        """Run the stage with these options, or go on where an earlier call stopped; the folder's result.

        Raises `InputError` for an option that the stage does not have, lacks, or that has a value it cannot have.
        """
        stage = self.__name__.rpartition(".")[2].rstrip("_")
        config = build_config(self.Config, options, stage=stage)
        with folder_lock.held_for_block():
            return self.main(config)

    @property
    def __signature__(self) -> inspect.Signature:
        """What `inspect.signature` and editors show: the options, as keywords."""
        hints = option_types(self.Config)
        parameters = [
            inspect.Parameter(
                field.name, inspect.Parameter.KEYWORD_ONLY, default=_default(field), annotation=hints[field.name]
            )
            for field in option_fields(self.Config)
        ]
        needed_first = sorted(parameters, key=lambda parameter: parameter.default is not inspect.Parameter.empty)
        return inspect.Signature(needed_first, return_annotation=dict[str, Any])


def make_callable(module: types.ModuleType) -> None:
    """Let the module of a stage be called, and list its options in its docstring."""
    module.__class__ = StageCall
    options = describe_options(module.__dict__["Config"])
    lines = [f"    {name}: {' '.join(text.split())}" for name, text in options.items()]
    module.__doc__ = f"{module.__doc__}\n\nOptions:\n" + "\n".join(lines)


def build_config(config_type: Any, options: Mapping[str, Any], *, stage: str) -> Any:
    """Fill a Config, and its groups, from options by name.

    Lists become tuples and paths strings, as the Config states. Raises `InputError` for an unknown or missing option
    and for a value of another kind; the Config's own checks follow.
    """
    fields = {field.name: field for field in option_fields(config_type)}
    for name in options:
        if name not in fields:
            raise InputError(f"{stage} has no option {name!r}. {did_you_mean(name, fields)}")
    empty = inspect.Parameter.empty
    missing = [name for name, field in fields.items() if _default(field) is empty and name not in options]
    if missing:
        raise InputError(f"{stage} needs a value for {', '.join(missing)}.")
    hints = option_types(config_type)
    return _fill(config_type, {name: _convert(value, hints[name], name) for name, value in options.items()})


def describe_options(config_type: Any) -> dict[str, str]:
    """Return the sentence that stands below each option in the source, those of groups included; "" where none does."""
    hints = typing.get_type_hints(config_type)
    kinds = [kind for kind in reversed(config_type.__mro__) if dataclasses.is_dataclass(kind)]
    sentences = {name: text for kind in kinds for name, text in _read_sentences(kind).items()}
    found: dict[str, str] = {}
    for field in dataclasses.fields(config_type):
        group = hints[field.name]
        own = {field.name: sentences.get(field.name, "")}
        found |= describe_options(group) if dataclasses.is_dataclass(group) else own
    return found


def _read_sentences(kind: Any) -> dict[str, str]:
    """Return the sentences below the fields of one dataclass, without those that it inherits."""
    try:
        body: list[Any] = ast.parse(inspect.getsource(kind)).body[0].body  # type: ignore[attr-defined]
    except OSError:  # a program without its sources
        body = []
    return {
        ast.unparse(line.target): str(after.value.value)
        for line, after in itertools.pairwise(body)
        if isinstance(line, ast.AnnAssign) and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
    }


def _fill(config_type: Any, options: dict[str, Any]) -> Any:
    hints = typing.get_type_hints(config_type)
    values: dict[str, Any] = {}
    for field in dataclasses.fields(config_type):
        group = hints[field.name]
        if dataclasses.is_dataclass(group):
            values[field.name] = _fill(group, options)
        elif field.name in options:
            values[field.name] = options[field.name]
    return config_type(**values)


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    return inspect.Parameter.empty if field.default_factory is dataclasses.MISSING else field.default_factory()


def _convert(value: Any, hint: Any, name: str) -> Any:
    """Return the value as the Config holds it; `InputError` for one of another kind."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        (hint,) = (one for one in inner if one is not types.NoneType)
        return None if value is None and types.NoneType in inner else _convert(value, hint, name)
    if origin is typing.Literal:
        if value not in inner:
            raise InputError(f"{name}={value!r} is unknown. {did_you_mean(str(value), map(str, inner))}")
        return value
    if origin is tuple and isinstance(value, list | tuple | str | os.PathLike):
        several = value if isinstance(value, list | tuple) else [value]
        return tuple(_convert(one, inner[0], name) for one in several)
    if origin is dict and isinstance(value, Mapping):
        return {_convert(key, inner[0], name): _convert(one, inner[1], name) for key, one in value.items()}
    if hint is bool and isinstance(value, bool):
        return value
    if (
        hint in (int, float)
        and isinstance(value, numbers.Real)
        and not isinstance(value, bool)
        and hint(value) == value
    ):
        return hint(value)  # numpy's numbers as Python's
    if hint is str and isinstance(value, str | os.PathLike):
        return os.fspath(value)
    raise InputError(f"{name}={value!r}: {getattr(hint, '__name__', hint)} is needed, not {type(value).__name__}.")
