"""State the options of `distilclip weigh`. Imports neither torch nor numpy."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from distilclip.errors import InputError
from distilclip.mixture import read_parts


@dataclass(frozen=True, kw_only=True)
class Config:
    """Flags of `distilclip weigh`."""

    store: str
    """folder that `embed` wrote"""
    out: str
    """folder to write: a weight for every kept row; `train --row-weights` reads it"""
    groups: str | None = None
    """folder of `balance` or `select`: weigh kept rows only (default: all valid ones)"""
    clusters: str | None = None
    """folder of `cluster`, for --cluster-power and --quota"""
    cluster_power: float | None = None
    """a cluster of n rows has a share of the draws in proportion to n^POWER: 0 the same for all, 1 as it is"""
    quota: float | None = None
    """share of the rows to keep or draw, divided among the clusters by how wide and how far from others each one is
    (density-based pruning)"""
    quota_rows: Literal["all", "farthest"] = "all"
    """what fills the quota of a cluster: all its rows, each with the weight quota / size; or those farthest from its
    center with weight 1, the others with 0, as in the paper"""
    temperature: float = 0.1
    """of the softmax by which --quota divides: the smaller, the less equal"""
    group_power: float | None = None
    """a kept row that stands for a group of n rows, itself included, has the weight n^POWER: 0 counts once, 1 as all"""
    data: tuple[str, ...] = ()
    """shares of the draws: 'a/*.tar=0.7' 'b/*.tar=0.3', all files of the store, as `train --data` takes them"""

    def __post_init__(self) -> None:
        if self.cluster_power is None and self.quota is None and self.group_power is None and not self.data:
            raise InputError("Nothing to weigh by: give --cluster-power, --quota, --group-power or --data.")
        by_cluster = [name for name in ("cluster_power", "quota") if getattr(self, name) is not None]
        if len(by_cluster) > 1:
            raise InputError("--cluster-power and --quota both say how often each cluster is drawn. Give one of them.")
        if by_cluster and self.clusters is None:
            flag = by_cluster[0].replace("_", "-")
            raise InputError(f"--{flag} needs --clusters, a folder of `distilclip cluster`.")
        if self.clusters is not None and not by_cluster:
            raise InputError("--clusters has no effect without --cluster-power or --quota: give one, or leave it out.")
        if self.group_power is not None and self.groups is None:
            raise InputError("--group-power needs --groups, a folder of `distilclip balance`.")
        if self.quota is None and (self.quota_rows != "all" or self.temperature != 0.1):
            raise InputError("--quota-rows and --temperature have no effect without --quota.")
        if self.quota is not None and not 0 < self.quota < 1:
            raise InputError(f"quota is {self.quota}; it is a share of the rows above 0 and below 1.")
        if not 0 < self.temperature < math.inf:
            raise InputError(f"temperature is {self.temperature}; it must be positive.")
        for name in ("cluster_power", "group_power"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 4:
                raise InputError(f"{name} is {value}; it is from 0 (all alike) to 4, mostly at most 1.")
        if self.data and not read_parts(self.data):
            raise InputError("data: give every part its share, as in 'a/*.tar=0.7' 'b/*.tar=0.3'.")

    def inputs(self) -> list[tuple[str, str]]:
        """Return the finished folders that this stage reads, each with its stage."""
        named = ((self.store, "embed"), (self.groups, "balance"), (self.clusters, "cluster"))
        return [(path, stage) for path, stage in named if path is not None]
