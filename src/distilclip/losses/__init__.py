"""The losses by their public names: `import distilclip as dc; dc.losses.contrastive(...)`."""

from distilclip.losses.cluster import ClusterLoss, cluster, sample_classes
from distilclip.losses.contrastive import contrastive, info_nce, instance
from distilclip.losses.distillation import augmented, feature, gradient, interactive, mask_patches, relational
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
    "mask_patches",
    "relational",
    "sample_classes",
    "sigmoid",
    "sigmoid_relational",
]
