"""State the options of `distilclip search`. Imports neither torch nor numpy."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
from typing import Literal

from distilclip.errors import InputError
from distilclip.options import changeable, check_at_least
from distilclip.stage_folder import folders_of


@dataclass(frozen=True, kw_only=True)
class Config:
    """Flags of `distilclip search MODEL PICTURES QUERY`."""

    model: str = field(metadata={"positional": True})
    """folder of `export --what onnx`, or its `model` folder"""
    pictures: str = field(metadata={"positional": True})
    """folder of pictures, searched with its subfolders; or tars, Parquet, CSV (braces and globs)"""
    query: str = field(metadata={"positional": True})
    """words to look for"""
    out: str = ""
    """folder to write matches.png and result.json to (default: only list the matches)"""
    num_matches: int = 12
    """number of pictures to show, the best first"""
    precision: Literal["fp32", "int8"] = "fp32"
    """which of the exported encoders to use"""
    thumbnail_size: int = 160
    """longer side of each picture on the sheet, in pixels"""
    columns: int = 4
    """number of pictures in a row of the sheet"""
    batch_size: int = changeable(32)
    """number of pictures per forward pass"""

    def __post_init__(self) -> None:
        for package in ("onnxruntime", "tokenizers"):
            if importlib.util.find_spec(package) is None:
                raise InputError(f"search needs {package}, which is not installed: pip install 'distilclip[onnx]'.")
        if not self.query.strip():
            raise InputError("The query is empty: say in words what to look for.")
        check_at_least(self, 1, "num_matches", "columns", "batch_size")
        if not 16 <= self.thumbnail_size <= 1024:
            raise InputError(f"thumbnail_size is {self.thumbnail_size}; it is a side in pixels, from 16 to 1024.")

    def inputs(self) -> list[tuple[str, str]]:
        """Return the finished folders that this stage reads, each with its stage."""
        return folders_of("export", [self.model])
