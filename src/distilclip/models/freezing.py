"""Keep one tower as it is while the other is trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from torch import nn

from distilclip.errors import InputError
from distilclip.models.clip import Clip


def freeze_tower(clip: Clip, tower: Literal["image", "text"], *, fresh: Sequence[str] = ()) -> None:
    """Let no step change a tower's weights (Zhai et al. 2022 lock the image tower so: LiT).

    `fresh` are the names of weights that are still random. Raises `InputError` where the tower has some of them.
    """
    random = [name for name in fresh if _tower_of(name) == tower]
    if random:
        raise InputError(
            f"--freeze {tower} would keep {len(random)} random tensors (such as {random[0]}): --init gives them no "
            "weights. Begin with weights:FROM or inherit:TEACHER, or train this tower too."
        )
    for name, parameter in clip.model.named_parameters():
        if _tower_of(name) == tower:
            parameter.requires_grad_(False)


def begin_training(model: Any) -> None:
    """Set a model to training mode; what is frozen runs as in evaluation (no dropout, batch norms keep statistics)."""
    model.train()
    children: list[nn.Module] = list(model.children())
    for child in children:
        parameters = list(child.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            child.eval()


def _tower_of(name: str) -> str:
    """Return the tower of a weight of a model, empty for its scale and bias."""
    if name.startswith("logit_"):
        return ""
    return "image" if name.startswith("visual.") else "text"
