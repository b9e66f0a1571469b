"""State the options of `distilclip demo`. Imports neither torch nor numpy."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Config:
    """Flags of `distilclip demo`."""

    out: str = "runs/demo"
    """folder for everything"""
    seed: int = 0
    """seed of the corpus and of all trainings"""
