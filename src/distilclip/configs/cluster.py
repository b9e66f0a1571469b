"""State the options of `distilclip cluster`. Imports neither torch nor numpy."""

from __future__ import annotations

from dataclasses import dataclass, field

from distilclip.clustering.fit_options import FitOptions
from distilclip.engine import Engine
from distilclip.options import changeable


@dataclass(frozen=True, kw_only=True)
class Config:
    """Flags of `distilclip cluster`."""

    store: str
    """folder of `embed`"""
    out: str
    """folder to write: centers.safetensors, labels, result.json"""
    fit: FitOptions
    groups: str | None = None
    """folder of `balance` or `select`: cluster kept images only (default: every valid image)"""
    device: str = changeable("auto")
    """auto (CUDA, then MPS, then CPU), or a torch device; each worker of --engine gets a GPU of its own"""
    execution: Engine = field(default_factory=Engine)

    def inputs(self) -> list[tuple[str, str]]:
        """Return the finished folders that this stage reads, each with its stage."""
        return [(self.store, "embed")] + ([(self.groups, "balance")] if self.groups else [])
