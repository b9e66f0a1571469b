"""The folders that `train` reads, made from 24 tiny pairs, and short trainings on them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from distilclip import stage_folder
from distilclip.clustering.fit_options import FitOptions
from distilclip.data.crops import Crops
from distilclip.mixture import Weighting
from distilclip.stages import balance, cluster, embed, train
from distilclip.train.settings import Checkpoints, Execution, LearningCurve, Optimization, TowerTraining, Validation


@dataclasses.dataclass(frozen=True)
class Prepared:
    """Folders of the stages before `train`."""

    tars: list[str]
    store: str
    groups: str
    clusters: str


def prepare(pair_tars: Callable[..., list[str]], teacher: str, folder: Path) -> Prepared:
    """Pairs, and what the stages before `train` make of them."""
    tars = pair_tars(shards=2, rows=12)
    store, groups, clusters = (str(folder / name) for name in ("store", "groups", "clusters"))
    embed.main(embed.Config(data=tuple(tars), out=store, model=teacher, num_workers=0))
    balance.main(balance.Config(store=store, out=groups, metric="cosine", threshold=1e-4))
    cluster.main(cluster.Config(store=store, groups=groups, out=clusters, fit=FitOptions(num_centers=5)))
    return Prepared(tars=tars, store=store, groups=groups, clusters=clusters)


def config(out: Path, architecture: str, **values: Any) -> train.Config:
    """Four steps of eight pairs; `values` are options by their flags' names, whatever group they are in."""
    narrow = json.loads(architecture) | {"embed_dim": 8}  # another width than the teacher's: projections are needed
    defaults = {"student": json.dumps(narrow), "batch_size": 8, "num_steps": 4, "warmup_steps": 1, "num_workers": 0}
    values = {"precision": "fp32", "checkpoint_every": 2, **defaults, **values}
    groups = {}
    kinds = {"optimization": Optimization, "checkpoints": Checkpoints, "execution": Execution, "crops": Crops}
    kinds |= {
        "learning_curve": LearningCurve,
        "towers": TowerTraining,
        "validation": Validation,
        "weighting": Weighting,
    }
    for name, group in kinds.items():
        fields = {field.name for field in dataclasses.fields(group)}
        groups[name] = group(**{key: values.pop(key) for key in list(values) if key in fields})
    return train.Config(out=str(out), **groups, **values)


def final_digest(out: Path) -> str:
    """Digest of the trained weights."""
    return json.loads((out / "result.json").read_text())["digest"]


def steady_metrics(out: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what depends on the clock."""
    lines = list(stage_folder.read_metrics(str(out / "metrics.jsonl")))
    return [{k: v for k, v in line.items() if k != "samples_per_second" and not k.endswith("_share")} for line in lines]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
