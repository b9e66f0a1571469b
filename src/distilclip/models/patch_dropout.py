"""Leave patches out of pictures in training (FLIP, Li et al. 2023), in towers that cut pictures into patches."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import timm.layers
from open_clip.transformer import PatchDropout, VisionTransformer
from torch import nn

from distilclip.errors import InputError
from distilclip.models.clip import Clip


def set_patch_dropout(clip: Clip, ratio: float) -> None:
    """Let the image tower leave out `ratio` of the patches, drawn anew for every picture, while it trains.

    The architecture and its weights stay as they are, so evaluation and checkpoints know nothing of it. Raises
    `InputError` for a tower without patches.
    """
    visual = clip.model.visual
    trunk = getattr(visual, "trunk", None)
    if isinstance(visual, VisionTransformer):
        visual.patch_dropout = PatchDropout(ratio).train(visual.training)
    elif trunk is not None and hasattr(trunk, "patch_drop"):
        dropout = timm.layers.PatchDropout(ratio, num_prefix_tokens=trunk.num_prefix_tokens)
        trunk.patch_drop = dropout.train(visual.training)
    else:
        raise InputError(
            f"The image tower of {clip.name} is no vision transformer: it has no patches that --patch-dropout could "
            "leave out. Leave out --patch-dropout."
        )


@contextlib.contextmanager
def every_patch(model: nn.Module) -> Iterator[None]:
    """Use all patches in a block, also in training: a masked picture hides its share already."""
    dropping = [m for m in model.modules() if isinstance(m, PatchDropout | timm.layers.PatchDropout) and m.training]
    for module in dropping:
        module.eval()
    try:
        yield
    finally:
        for module in dropping:
            module.train()
