"""State the options of `distilclip pack`. Imports neither torch nor numpy."""

from __future__ import annotations

from dataclasses import dataclass, field

from distilclip.engine import Engine
from distilclip.errors import InputError
from distilclip.options import check_at_least


@dataclass(frozen=True, kw_only=True)
class Config:
    """Flags of `distilclip pack`."""

    store: str
    """folder that `embed` wrote: the pairs and the teacher's embeddings of them"""
    out: str
    """folder to write: the kept pairs, shuffled, with all that training needs of them; `train --pack` reads it"""
    groups: str | None = None
    """folder of `balance` or `select`: pack kept rows only (default: all valid ones)"""
    clusters: str | None = None
    """folder of `cluster`: labels and centers for the cluster term"""
    data: tuple[str, ...] = ()
    """where the pairs lie now, if not where they were embedded; the same files in the same order"""
    max_side: int = 256
    """pixels of the shorter side of the pictures: larger ones are made smaller, others keep their file's bytes"""
    quality: int = 90
    """JPEG quality of the pictures that are made smaller, from 1 to 100"""
    packet_rows: int = 16
    """number of pairs that lie side by side and are read by one request; they stay neighbours in every epoch's order"""
    shard_rows: int = 65536
    """number of pairs in a file, nearly; a worker holds the pictures of two such files in memory"""
    seed: int = 0
    """seed of the order"""
    execution: Engine = field(default_factory=Engine)

    def __post_init__(self) -> None:
        check_at_least(self, 1, "max_side", "packet_rows", "shard_rows")
        check_at_least(self, 0, "seed")
        if not 1 <= self.quality <= 100:
            raise InputError(f"quality is {self.quality}; it must be from 1 to 100.")

    def inputs(self) -> list[tuple[str, str]]:
        """Return the finished folders that this stage reads, each with its stage."""
        named = ((self.store, "embed"), (self.groups, "balance"), (self.clusters, "cluster"))
        return [(path, stage) for path, stage in named if path is not None]
