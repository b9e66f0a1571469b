"""State the options of `distilclip select`. Imports neither torch nor numpy."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from distilclip.engine import Engine
from distilclip.errors import InputError
from distilclip.options import changeable, check_at_least
from distilclip.sets.specs import is_set

ScoreName = Literal["clip-score", "neg-clip-loss", "norm-sim", "column"]
Within = Literal["all", "folder", "cluster"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """Flags of `distilclip select`."""

    store: str
    """folder that `embed` wrote"""
    out: str
    """folder to write: the score of every pair and which pairs are kept; later stages read it as --groups"""
    score: ScoreName | None = None
    """clip-score: how well the caption fits the picture (cosine); neg-clip-loss: that, less what the pair has in common
    with random others; norm-sim: the picture's largest similarity to one of --targets; column: one of --values. Without
    one, all is kept that every folder of --groups keeps"""
    top: float | None = None
    """keep this share of the pairs, those with the highest scores"""
    at_least: float | None = None
    """keep the pairs with this score or a higher one"""
    below: float | None = None
    """keep the pairs with a lower score than this: with norm-sim, what is no copy of a picture of --targets"""
    within: Within = "all"
    """take the share of --top of all pairs, of those in each folder of shards (one for each data set), or of those in
    each cluster of --clusters"""
    clusters: str | None = None
    """folder of `cluster`, for --within cluster"""
    groups: tuple[str, ...] = ()
    """folders of `balance` or of other `select`s: score and keep only pairs that all of them keep (default: all valid
    ones)"""
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
    """auto (CUDA, then MPS, then CPU) or a torch device; each worker of --engine gets a GPU of its own"""
    execution: Engine = field(default_factory=Engine)

    def __post_init__(self) -> None:
        num_cuts = sum(value is not None for value in (self.top, self.at_least, self.below))
        if self.score is None:
            if num_cuts or len(self.groups) < 2:
                raise InputError(
                    "select needs a --score (such as clip-score), or several --groups without --top, --at-least and "
                    "--below: then it keeps what all of them keep."
                )
        elif num_cuts != 1:
            raise InputError("select needs one of --top (a share, such as 0.3), --at-least and --below (scores).")
        if self.top is not None and not 0 < self.top <= 1:
            raise InputError(f"top is {self.top!r}; it is a share above 0 and at most 1.")
        for name, score in (("targets", "norm-sim"), ("values", "column")):
            if bool(getattr(self, name)) != (self.score == score):
                verb = "needs" if self.score == score else "has no use for"
                raise InputError(
                    f"{f'--score {self.score}' if self.score else 'select without a score'} {verb} --{name}."
                )
        if self.within != "all" and self.top is None:
            raise InputError(f"--within {self.within} says of what --top is a share: it needs --top.")
        if (self.within == "cluster") != (self.clusters is not None):
            raise InputError("--within cluster and --clusters FOLDER belong together: give both or neither.")
        check_at_least(self, 2, "num_others")

    def inputs(self) -> list[tuple[str, str]]:
        """Return the finished folders that this stage reads, each with its stage."""
        groups = [(path, "balance") for path in self.groups]
        clusters = [(self.clusters, "cluster")] if self.clusters else []
        targets = [(path, "embed") for path in self.targets if not is_set(path)]
        return [(self.store, "embed"), *groups, *clusters, *targets]
