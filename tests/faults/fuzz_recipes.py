"""Recipes with wrong types, unknown keys, odd references and damaged text."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from distilclip.config import STEP_STAGES, config_type_of, parse
from tests.faults.fuzz_runner import Door, Lost, command, damaged

RECIPE: dict[str, Any] = {
    "out": "runs/fuzz",
    "corpus": {"num_pairs": 60, "shard_size": 30, "image_size": 32},
    "embed": {"data": ["@corpus/train/*.tar"], "model": "@train/first"},
    "balance": {"store": "@embed", "metric": "cosine", "threshold": 0.01},
    "cluster": {"store": "@embed", "groups": "@balance", "num_centers": 5},
    "train": {
        "first": {"data": ["@corpus/train/*.tar"], "student": "ViT-B-32", "num_steps": 2, "warmup_steps": 1},
        "second": {
            "store": "@embed",
            "clusters": "@cluster",
            "objective": "clip-cid",
            "student": "ViT-B-32",
            "num_steps": 2,
            "warmup_steps": 1,
        },
    },
    "evaluate": {"models": ["@train/second"], "sets": ["folder:pictures"]},
    "report": {"folders": ["@"]},
}
_ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(
        [
            "@",
            "@nope",
            "@train",
            "@train/second",
            "@../../x",
            "@embed/../..",
            "1e-3",
            "cosine",
            "@@",
            "-1",
            "--help",
            "#",
            "a=b",
        ]
    ),
    st.lists(st.one_of(st.integers(), st.text(max_size=4), st.just("@embed")), max_size=3),
    st.dictionaries(st.text(max_size=4), st.integers(), max_size=2),
    st.just([[1], ["a"]]),
)
_KEYS = st.one_of(
    st.sampled_from(
        [
            "out",
            "seed",
            "data",
            "store",
            "threshold",
            "terms",
            "objective",
            "student",
            "lr",
            "epochs",
            "stage",
            "__class__",
            "../x",
            "a.b",
            "",
        ]
    ),
    st.text(max_size=6),
)


@st.composite
def recipes(draw: Callable[..., Any]) -> dict[str, Any]:
    """The recipe with one to three changes."""
    recipe = copy.deepcopy(RECIPE)
    for _ in range(draw(st.integers(1, 3))):
        table = recipe
        while tables := [key for key, value in table.items() if isinstance(value, dict)]:
            if draw(st.integers(0, 3)) == 0:
                break
            table = table[draw(st.sampled_from(tables))]
        names = sorted(table)
        change = draw(st.sampled_from(["value", "value", "key", "remove", "rename"]))
        if change == "key" or not names:
            table[draw(_KEYS)] = draw(_ODD)
            continue
        name = draw(st.sampled_from(names))
        if change == "value":
            table[name] = draw(_ODD)
        else:
            value = table.pop(name)
            if change == "rename":
                table[draw(_KEYS)] = value
    return recipe


def as_toml(recipe: dict[str, Any], path: tuple[str, ...] = ()) -> str:
    """The recipe as TOML; what TOML has no word for is left out."""
    lines = [f"[{'.'.join(map(_quote, path))}]"] if path else []
    tables = []
    for key, value in recipe.items():
        if isinstance(value, dict):
            tables.append(as_toml(value, (*path, key)))
        elif value is not None:
            lines.append(f"{_quote(key)} = {_value(value)}")
    return "\n".join([*lines, *tables])


def _quote(text: str) -> str:
    words = (f"\\U{ord(c):08X}" if ord(c) < 32 or ord(c) > 126 or c in '"\\' else c for c in text)
    return f'"{"".join(words)}"'


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return str(value) if math.isfinite(value) else "nan" if math.isnan(value) else f"{'-' if value < 0 else ''}inf"
    if isinstance(value, list):
        return f"[{', '.join(map(_value, value))}]"
    return _quote(value) if isinstance(value, str) else str(value)


def run_recipe(case: bytes, folder: Path) -> bool:
    """Run `distilclip run RECIPE --dry-run`."""
    path = folder / "case.toml"
    path.write_bytes(case)
    before = sorted(folder.rglob("*"))
    code, _ = command(["run", str(path), "--dry-run"])
    if sorted(folder.rglob("*")) != before:
        raise Lost("a dry run wrote files")
    return code == 0


def parse_values(case: tuple[str, dict[str, Any]], folder: Path) -> bool:
    """Read the values of a config.json as the options of a stage."""
    stage, values = case
    path = folder / "case.json"
    path.write_text(json.dumps({"stage": stage, **values}))
    parse(config_type_of(stage), [str(path)], stage=stage)
    return True


@st.composite
def configs(draw: Callable[..., Any]) -> tuple[str, dict[str, Any]]:
    """A stage, and values for its options of all kinds."""
    from distilclip.config import field_names

    stage = draw(st.sampled_from(STEP_STAGES))
    names = sorted(field_names(config_type_of(stage)))
    table = RECIPE.get(stage, {})
    base = table.get("second", table)
    values = {
        **base,
        "out": "runs/x",
        **{draw(st.sampled_from(names)): draw(_ODD) for _ in range(draw(st.integers(0, 3)))},
    }
    if draw(st.integers(0, 5)) == 0:
        values[draw(_KEYS)] = draw(_ODD)
    return stage, values


_TOML = recipes().map(lambda recipe: as_toml(recipe).encode())
DOORS = (
    Door(name="recipes, run --dry-run", cases=_TOML | _TOML | damaged(_TOML), enter=run_recipe, share=0.04),
    Door(name="config.json, every stage", cases=configs(), enter=parse_values, share=0.03),
)
