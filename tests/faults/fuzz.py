"""Drill: made-up and damaged inputs through every way in; each ends in accounted rows or in one clear error line."""

from __future__ import annotations

import importlib
import json
import time
from pathlib import Path

import torch

from tests.conftest import TINY_CLIP
from tests.faults import fuzz_images, fuzz_recipes, fuzz_stores, fuzz_tables, fuzz_tars
from tests.faults.fuzz_runner import Door, outcome, run_door
from tests.faults.outcome import Outcome, Size

SEED = 14
NUM_CASES = {"small": 120, "full": 12_000}
LEAST = 4
DOORS: tuple[Door, ...] = (
    *fuzz_tars.DOORS,
    *fuzz_images.DOORS,
    *fuzz_tables.DOORS,
    *fuzz_stores.DOORS,
    *fuzz_recipes.DOORS,
)


def drill(folder: Path, *, size: Size) -> list[Outcome]:
    """Run the cases of every door."""
    from distilclip.cli import STAGES
    from distilclip.models.clip import create_clip
    from distilclip.stage_calls import module_of

    torch.set_num_threads(1)
    for name in STAGES:
        importlib.import_module(f"distilclip.configs.{module_of(name)}")
    for name in ("embed", "verify", "run"):
        importlib.import_module(f"distilclip.stages.{name}")
    create_clip(json.dumps(TINY_CLIP), seed=7).save(str(folder / "teacher"))
    found = []
    for number, door in enumerate(DOORS):
        started = time.monotonic()
        num_cases = max(LEAST, round(NUM_CASES[size] * door.share))
        ran = run_door(door, folder / f"door{number}", num_cases=num_cases, seed=SEED + number)
        found.append(
            outcome(
                door,
                ran,
                promise=f"Made-up and damaged input ({door.name}) ends in accounted rows, or in one clear error line.",
                how=f"hypothesis makes cases with seed {SEED + number}, in a child with limits on time and memory",
                seconds=time.monotonic() - started,
            )
        )
    return found
