"""Compute image features before the projection into the shared space, on which CLIP's linear probe is fitted.

Where the projection sits differs from tower to tower. open_clip's transformers multiply by `proj`. Its timm towers have
a projection of their own after the trunk (`timm_proj` "linear" or "mlp"), or use the trunk's classifier as one
(`timm_proj` null: MobileCLIP, EVA, PE-Core). Attention pooling (CLIP's ResNets, timm's "abs_attn" and "rot_attn") ends
with a projection that cannot be taken apart from it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor

Backbone = Literal["backbone", "embedding"]
"""Which features are had: those before the projection, or the embedding, before it is normalised."""


def backbone_kind(visual: Any) -> Backbone:
    """Return whether an image tower has features before a projection; otherwise its output, the embedding, is used."""
    trunk = getattr(visual, "trunk", None)
    if trunk is None:
        projects = getattr(visual, "proj", None) is not None
    else:
        layers = {name for name, _ in visual.head.named_children()}
        projects = bool(layers & {"proj", "mlp"}) or _classifies(trunk)
    return "backbone" if projects else "embedding"


def backbone_features(visual: Any, pixels: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n width"]:
    """Return the image tower's features before its projection, or its output where it has none; not normalised."""
    trunk = getattr(visual, "trunk", None)
    if trunk is not None:
        if _classifies(trunk):
            return trunk.forward_head(trunk.forward_features(pixels), pre_logits=True).float()
        features = trunk(pixels)
        pool = getattr(visual.head, "pool", None)
        return (features if pool is None else pool(features)).float()
    with _remove_projection(visual):
        found = visual(pixels)
    # CoCa's tower gives the tokens, too.
    return (found[0] if isinstance(found, tuple) else found).float()


@contextlib.contextmanager
def _remove_projection(visual: Any) -> Iterator[None]:
    projection = getattr(visual, "proj", None)
    if projection is None:
        yield
        return
    visual.proj = None
    try:
        yield
    finally:
        visual.proj = projection


def _classifies(trunk: Any) -> bool:
    return bool(getattr(trunk, "num_classes", 0))
