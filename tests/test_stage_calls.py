"""Stages from Python, by their options."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import distilclip as dc
from distilclip import cli, config
from distilclip.errors import InputError
from distilclip.options import option_fields, option_values
from distilclip.stage_calls import build_config, describe_options, module_of


def config_of(stage: str) -> Any:
    return importlib.import_module(f"distilclip.configs.{module_of(stage)}").Config


def test_there_is_a_function_for_every_stage_of_the_command_line() -> None:
    assert set(dir(dc.stages)) == {module_of(name) for name in cli.STAGES}
    for name in map(module_of, cli.STAGES):
        stage = getattr(dc.stages, name)
        assert callable(stage)
        assert stage is importlib.import_module(f"distilclip.stages.{name}")


@pytest.mark.parametrize("name", cli.STAGES)
def test_the_signature_lists_every_option_by_its_own_name(name: str) -> None:
    stage = getattr(dc.stages, module_of(name))
    signature = inspect.signature(stage)
    fields = {field.name: field for field in option_fields(config_of(name))}
    assert set(signature.parameters) == set(fields)
    for parameter in signature.parameters.values():
        assert parameter.kind is inspect.Parameter.KEYWORD_ONLY
        needed = {fields[parameter.name].default, fields[parameter.name].default_factory} == {dataclasses.MISSING}
        assert (parameter.default is inspect.Parameter.empty) == needed
        assert f"    {parameter.name}: " in stage.__doc__
    assert sum(text != "" for text in describe_options(config_of(name)).values()) > 0.8 * len(fields)


@pytest.mark.parametrize(
    ("stage", "options"),
    [
        ("embed", {"data": ["a.tar", "b.tar"], "out": "o", "model": "m", "batch_size": 7}),
        ("balance", {"store": "s", "out": "o", "metric": "cosine", "threshold": 0.5, "engine": "processes"}),
        ("cluster", {"store": "s", "groups": "g", "out": "o", "num_centers": 5, "tolerance": 0.1}),
        ("train", {"out": "o", "student": "ViT-B-32", "data": ["a.tar"], "terms": {"task": 2.0}, "batch_size": 8}),
        ("export", {"what": "keys", "store": "s", "out": "o"}),
    ],
)
def test_options_make_the_config_that_the_same_flags_make(stage: str, options: dict[str, Any]) -> None:
    built = build_config(config_of(stage), options, stage=stage)
    assert built == config.build(config_of(stage), options, stage=stage)
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}
    assert option_values(built) == {**option_values(built), **given}


def test_balance_runs_and_returns_its_result(
    tmp_path: Path, tiny_clip_folder: str, pair_tars: Callable[..., list[str]]
) -> None:
    """The end-to-end use, with the values that a notebook has: paths, lists and numpy's numbers."""
    store, groups = tmp_path / "store", tmp_path / "groups"
    dc.stages.embed(data=pair_tars(shards=2, rows=8), out=store, model=tiny_clip_folder, num_workers=np.int64(0))
    options = {"store": store, "out": groups, "metric": "cosine", "threshold": np.float32(1e-4)}
    result = dc.stages.balance(**options)
    assert result["num_valid"] == 16
    assert json.loads((groups / "result.json").read_text())["num_kept"] == result["num_kept"]
    assert dc.stages.balance(**options) == result  # found finished


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"out": "o", "store": "s", "metric": "cosine", "treshold": 0.1}, "balance has no option 'treshold'. Did you"),
        ({"out": "o", "store": "s"}, "balance needs a value for metric"),
        ({"out": "o", "store": "s", "metric": "cosin", "threshold": 0.1}, "metric='cosin' is unknown. Did you mean"),
        ({"out": "o", "store": "s", "metric": "cosine", "threshold": "0.1"}, "threshold='0.1': float is needed"),
        ({"out": "o", "store": "s", "metric": "cosine", "top_k": 2.5}, "top_k=2.5: int is needed, not float"),
        ({"out": "o", "store": None, "metric": "cosine", "threshold": 0.1}, "store=None: str is needed"),
        ({"out": "o", "store": "s", "metric": "cosine", "threshold": -0.1}, "threshold=-0.1: a distance"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        dc.stages.balance(**options)


def test_an_unknown_stage_is_named() -> None:
    with pytest.raises(AttributeError, match=r"no stage 'balence'. Did you mean 'balance'"):
        dc.stages.balence  # noqa: B018


def test_the_list_of_stages_imports_nothing_heavy() -> None:
    code = (
        "import sys, distilclip, distilclip.cli; "
        "assert {name.rstrip('_') for name in dir(distilclip.stages)} == set(distilclip.cli.STAGES); "
        "heavy = {'torch', 'numpy', 'tyro'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
