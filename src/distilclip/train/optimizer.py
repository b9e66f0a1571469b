"""Build AdamW with the papers' parameter groups, and give each step its learning rate."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from distilclip.train.parallel import local
from distilclip.train.settings import Optimization, TowerTraining

# Positions and class tokens, as open_clip, timm and transformers name them.
POSITIONS = {
    "positional_embedding",
    "class_embedding",
    "pos_embed",
    "cls_token",
    "relative_position_bias_table",
    "position_embeddings",
}


def build_optimizer(
    parameters: Mapping[str, nn.Parameter], optimization: Optimization, towers: TowerTraining | None = None
) -> torch.optim.AdamW:
    """Return AdamW over the named parameters that are trained, at the rates of `towers`. No decay on biases, norms,
    scales and positions (anything of fewer than two dimensions). Class centers have an optimizer of their own
    (train.class_head).
    """
    towers = towers or TowerTraining()
    groups: dict[tuple[bool, bool, float], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        if parameter.requires_grad:
            decays = parameter.ndim >= 2 and not any(part in POSITIONS for part in name.split("."))
            key = decays, isinstance(parameter, DTensor), towers.learning_rate_ratio(name)  # kernels take no mixture
            groups.setdefault(key, []).append(parameter)
    lists: list[dict[str, Any]] = [
        {
            "params": params,
            "weight_decay": optimization.weight_decay if decays else 0.0,
            "peak": optimization.learning_rate * ratio,
        }
        for (decays, _, ratio), params in sorted(groups.items(), key=lambda item: item[0], reverse=True)
    ]
    betas = optimization.beta1, optimization.beta2
    return torch.optim.AdamW(lists, lr=optimization.learning_rate, betas=betas, eps=optimization.eps, fused=True)


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The share of the peak learning rate at each step: linear warm-up, then down to `final_ratio`.

    `cosine` is half a cosine. `constant` stays at the peak and goes down in a straight line over the last
    `cooldown_steps` (WSD: Hu et al. 2024). The step after the last one would have the final ratio.
    """

    num_steps: int
    warmup_steps: int = 0
    shape: Literal["cosine", "constant"] = "cosine"
    final_ratio: float = 0.0
    cooldown_steps: int = 0

    def share(self, step: int) -> float:
        """Return the share of a step, counted from 0.

        Example: of 110 steps of a cosine with 10 of warm-up, step 0 has 0.1, step 9 has 1, step 60 has 0.5.
        """
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        falling = self.num_steps - self.warmup_steps
        if self.shape == "constant":
            falling = min(falling, self.cooldown_steps)
        progress = min(1.0, max(0.0, (step - self.num_steps + falling) / max(1, falling)))
        left = 1 - progress if self.shape == "constant" else 0.5 * (1 + math.cos(math.pi * progress))
        return self.final_ratio + (1 - self.final_ratio) * left


def set_learning_rate(optimizer: torch.optim.Optimizer, share: float) -> float:
    """Give every group its peak times `share`, and return the learning rate of a group whose ratio is 1."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * share
    return float(optimizer.defaults["lr"] * share)


class Average:
    """average <- decay x average + (1 - decay) x weights after every step; buffers that are no floats are copied.

    Starts as the initial weights. Under FSDP2 each process averages the part that it holds.
    """

    def __init__(self, model: nn.Module, *, decay: float) -> None:
        self.decay = decay
        self.values: dict[str, Tensor] = {name: value.detach().clone() for name, value in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the weights of a step."""
        pairs = [(local(self.values[name]), local(value)) for name, value in model.state_dict().items()]
        floats = [pair for pair in pairs if pair[0].is_floating_point()]
        get_ema_multi_avg_fn(self.decay)([a for a, _ in floats], [b for _, b in floats], None)
        for average, value in pairs:
            if not average.is_floating_point():
                average.copy_(value)
