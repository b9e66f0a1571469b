"""State the options of `distilclip select`. Imports neither torch nor numpy."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from distilclip.engine import Engine
from distilclip.errors import InputError
from distilclip.options import changeable, check_at_least
from distilclip.sets.specs import is_set

ScoreName = Literal["clip-score", "neg-clip-loss", "norm-sim", "column"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """Flags of `distilclip select`."""

    store: str
    """folder that `embed` wrote"""
    out: str
    """folder to write: the score of every pair and which pairs are kept; later stages read it as --groups"""
    score: ScoreName
    """clip-score: how well the caption fits the picture (cosine); neg-clip-loss: that, less what the pair has in common
    with random others; norm-sim: the picture's largest similarity to one of --targets; column: one of --values"""
    top: float | None = None
    """keep this share of the pairs, those with the highest scores"""
    at_least: float | None = None
    """keep the pairs with this score or a higher one"""
    below: float | None = None
    """keep the pairs with a lower score than this: with norm-sim, what is no copy of a picture of --targets"""
    groups: str | None = None
    """folder of `balance` or of another `select`: score and keep only pairs that it keeps (default: all valid ones)"""
    targets: tuple[str, ...] = ()
    """pictures that norm-sim compares with: stores of the same teacher, or evaluation sets as `evaluate --sets` takes
    them, which the teacher of --store embeds; with --below, the report lists the copies of their pictures"""
    data_root: str | None = None
    """folder of the published sets among --targets, as evaluate has it"""
    values: str | None = None
    """scores of your own, for column: a .parquet with rows named by shard and row or by key, a .npy, or a folder"""
    column: str = "score"
    """column of --values that holds the score"""
    num_others: int = 4096
    """number of random pairs that neg-clip-loss compares every pair with"""
    seed: int = 0
    """random seed that draws these"""
    num_workers: int = changeable(2)
    """number of processes that read and decode the pictures of evaluation sets (0: the main process does it)"""
    device: str = changeable("auto")
    """auto (CUDA, then MPS, then CPU) or a torch device; on Ray, cuda gives each worker a GPU of its own"""
    execution: Engine = field(default_factory=Engine)

    def __post_init__(self) -> None:
        if sum(value is not None for value in (self.top, self.at_least, self.below)) != 1:
            raise InputError("select needs one of --top (a share, such as 0.3), --at-least and --below (scores).")
        if self.top is not None and not 0 < self.top <= 1:
            raise InputError(f"top is {self.top!r}; it is a share above 0 and at most 1.")
        for name, score in (("targets", "norm-sim"), ("values", "column")):
            if bool(getattr(self, name)) != (self.score == score):
                verb = "needs" if self.score == score else "has no use for"
                raise InputError(f"--score {self.score} {verb} --{name}.")
        check_at_least(self, 2, "num_others")

    def inputs(self) -> list[tuple[str, str]]:
        """Return the finished folders that this stage reads, each with its stage."""
        groups = [(self.groups, "balance")] if self.groups else []
        targets = [(path, "embed") for path in self.targets if not is_set(path)]
        return [(self.store, "embed"), *groups, *targets]
