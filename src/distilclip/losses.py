"""The losses by their public names: `import distilclip as dc; dc.losses.contrastive(...)`."""

from distilclip.ops.clusterloss import ClusterLoss, cluster, sample_classes
from distilclip.ops.contrastive import contrastive, info_nce, instance
from distilclip.ops.mimicry import augmented, feature, gradient, interactive, mask_patches, relational
from distilclip.ops.sigmoid import sigmoid, sigmoid_relational

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
