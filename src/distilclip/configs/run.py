"""State the options of `distilclip run`. Imports neither torch nor numpy."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Config:
    """Flags of `distilclip run`."""

    recipe: str
    """TOML file; each table is a step"""
    other_recipes: tuple[str, ...] = ()
    """more recipes (`distilclip run A.toml B.toml --out OUT`): each has a folder in OUT named as its file, equal
    steps are computed once, and one report over all replaces the [report] tables"""
    out: str | None = None
    """folder for all steps (default: the recipe's own `out`; required for several recipes)"""
    seed: int | None = None
    """replaces the seed of every step that has one"""
    overrides: tuple[str, ...] = ()
    """STAGE.OPTION=VALUE: replaces a value in all steps of a stage, such as train.precision=fp32"""
