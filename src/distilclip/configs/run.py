"""State the options of `distilclip run`. Imports neither torch nor numpy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from distilclip.errors import InputError
from distilclip.launch import check_number
from distilclip.options import changeable


@dataclass(frozen=True, kw_only=True)
class Config:
    """Flags of `distilclip run`."""

    recipe: str = changeable("")
    """TOML file, or the name of a recipe in the package; each table is a step"""
    other_recipes: tuple[str, ...] = changeable(())
    """more recipes (`distilclip run A.toml B.toml --out OUT`): each has a folder in OUT named as its file, equal
    steps are computed once, and one report over all replaces the [report] tables"""
    out: str | None = None
    """folder for all steps (default: the recipe's own `out`; required for several recipes)"""
    seed: int | None = changeable(None)
    """replaces the seed of every step that has one"""
    overrides: tuple[str, ...] = changeable(())
    """STAGE.OPTION=VALUE: replaces a value in all steps of a stage, such as train.precision=fp32"""
    dry_run: bool = changeable(False)
    """say which steps are finished, which would be computed and why, and do nothing"""
    only: str | None = changeable(None)
    """run this step alone, such as train/teacher"""
    from_step: str | None = changeable(None)
    """run this step and those after it"""
    stale: Literal["stop", "redo", "replace"] = changeable("stop")
    """with finished steps whose options or inputs have changed since: stop and say why; make them anew and move the
    old folders to OUT-before-N (redo); or make them anew and remove the old ones (replace)"""
    nproc_per_node: str = changeable("auto")
    """processes that train together: a number, or auto: one per GPU, 1 on a CPU. Under torchrun and srun all train"""

    def __post_init__(self) -> None:
        check_number(self.nproc_per_node)
        if not self.recipe:
            raise InputError("run needs a recipe: `distilclip run RECIPE.toml`; `distilclip recipes` lists those here.")
        if self.only and self.from_step:
            raise InputError("--only runs one step, --from-step that one and those after it: give one of them.")
