"""State the options of `distilclip verify`. Imports neither torch nor numpy."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Config:
    """Flags of `distilclip verify FOLDER`."""

    folder: str = field(metadata={"positional": True})
    """folder of a stage, or of a run with all its steps"""
    repair: bool = False
    """remove what is damaged, and result.json with it: the stage, run again, makes only that anew"""
    sources: Literal["none", "sizes", "keys"] = "none"
    """compare the files that a store was made from as well, where they are still there: their sizes, or their keys"""
    out: str | None = None
    """JSON file to write what was found to, as well"""
