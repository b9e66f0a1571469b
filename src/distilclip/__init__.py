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
    from distilclip import losses as losses
    from distilclip.data.store import Store as Store
    from distilclip.errors import InputError as InputError
    from distilclip.evaluate.retrieval import retrieval as retrieval
    from distilclip.evaluate.zero_shot import zero_shot as zero_shot
    from distilclip.models.clip import Clip as Clip
    from distilclip.models.clip import load_clip as load_clip
    from distilclip.ops.balance import Balance as Balance
    from distilclip.ops.balance import balance as balance
    from distilclip.ops.features import Features as Features
    from distilclip.ops.kmeans import KMeans as KMeans
    from distilclip.ops.kmeans import kmeans as kmeans
    from distilclip.ops.neighbours import Pairs as Pairs
    from distilclip.ops.neighbours import pairs_within as pairs_within
    from distilclip.ops.probe import Probe as Probe
    from distilclip.ops.probe import linear_probe as linear_probe
    from distilclip.train.objective import Objective as Objective
    from distilclip.train.objective import objective as objective

_HOMES = {
    "Balance": "distilclip.ops.balance",
    "Clip": "distilclip.models.clip",
    "Features": "distilclip.ops.features",
    "InputError": "distilclip.errors",
    "KMeans": "distilclip.ops.kmeans",
    "Objective": "distilclip.train.objective",
    "Pairs": "distilclip.ops.neighbours",
    "Probe": "distilclip.ops.probe",
    "Store": "distilclip.data.store",
    "balance": "distilclip.ops.balance",
    "kmeans": "distilclip.ops.kmeans",
    "linear_probe": "distilclip.ops.probe",
    "load_clip": "distilclip.models.clip",
    "objective": "distilclip.train.objective",
    "pairs_within": "distilclip.ops.neighbours",
    "retrieval": "distilclip.evaluate.retrieval",
    "zero_shot": "distilclip.evaluate.zero_shot",
}

__all__ = [*sorted(_HOMES), "losses"]


def __getattr__(name: str) -> Any:
    if name == "losses":
        return importlib.import_module("distilclip.losses")
    if name not in _HOMES:
        raise AttributeError(f"module 'distilclip' has no attribute {name!r}; public names: {', '.join(__all__)}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
