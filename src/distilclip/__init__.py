"""Small CLIP models from large ones: embed, balance, cluster, distil, evaluate, report.

    import distilclip as dc

    balance = dc.balance(embeddings, threshold=0.07, metric="sqeuclidean")
    balance.keep, balance.removed_ratio, balance.curve

Names are imported on first use, so that `import distilclip` is immediate.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distilclip import losses, stages
    from distilclip.clustering.kmeans import KMeans as KMeans
    from distilclip.clustering.kmeans import kmeans as kmeans
    from distilclip.data.store import Store as Store
    from distilclip.distributed import rows_of_this_rank as rows_of_this_rank
    from distilclip.errors import InputError as InputError
    from distilclip.evaluate.zero_shot import zero_shot as zero_shot
    from distilclip.grouping.balance import Balance as Balance
    from distilclip.grouping.balance import balance as balance
    from distilclip.grouping.explanation import Explanation as Explanation
    from distilclip.grouping.near_pairs import Pairs as Pairs
    from distilclip.grouping.near_pairs import pairs_within as pairs_within
    from distilclip.losses.features import Features as Features
    from distilclip.losses.features import RankRows as RankRows
    from distilclip.measures.probe import Probe as Probe
    from distilclip.measures.probe import linear_probe as linear_probe
    from distilclip.measures.retrieval import retrieval as retrieval
    from distilclip.models.clip import Clip as Clip
    from distilclip.models.clip import load_clip as load_clip
    from distilclip.train.objective import Objective as Objective
    from distilclip.train.objective import objective as objective

    __version__: str

_HOMES = {
    "Balance": "distilclip.grouping.balance",
    "Clip": "distilclip.models.clip",
    "Explanation": "distilclip.grouping.explanation",
    "Features": "distilclip.losses.features",
    "InputError": "distilclip.errors",
    "KMeans": "distilclip.clustering.kmeans",
    "Objective": "distilclip.train.objective",
    "Pairs": "distilclip.grouping.near_pairs",
    "Probe": "distilclip.measures.probe",
    "RankRows": "distilclip.losses.features",
    "Store": "distilclip.data.store",
    "balance": "distilclip.grouping.balance",
    "kmeans": "distilclip.clustering.kmeans",
    "linear_probe": "distilclip.measures.probe",
    "load_clip": "distilclip.models.clip",
    "objective": "distilclip.train.objective",
    "pairs_within": "distilclip.grouping.near_pairs",
    "retrieval": "distilclip.measures.retrieval",
    "rows_of_this_rank": "distilclip.distributed",
    "zero_shot": "distilclip.evaluate.zero_shot",
}

__all__ = [*sorted(_HOMES), "losses", "stages"]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("distilclip")
    if name in ("losses", "stages"):
        return importlib.import_module(f"distilclip.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'distilclip' has no attribute {name!r}; public names: {', '.join(__all__)}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
