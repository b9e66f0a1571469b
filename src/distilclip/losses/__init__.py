"""Compute the losses; each is a pure function of features: `import distilclip as dc; dc.losses.contrastive(...)`."""

from distilclip.losses.cluster import ClusterLoss, cluster, positions, sample_classes
from distilclip.losses.contrastive import contrastive, info_nce, instance
from distilclip.losses.distillation import (
    augmented,
    feature,
    gradient,
    interactive,
    intramodal,
    one_feature,
    queued,
    relational,
)
from distilclip.losses.sigmoid import sigmoid, sigmoid_relational

__all__ = [
    "ClusterLoss",
    "augmented",
    "cluster",
    "contrastive",
    "feature",
    "gradient",
    "info_nce",
    "instance",
    "interactive",
    "intramodal",
    "one_feature",
    "positions",
    "queued",
    "relational",
    "sample_classes",
    "sigmoid",
    "sigmoid_relational",
]
