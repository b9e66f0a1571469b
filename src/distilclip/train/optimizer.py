"""Build AdamW with the papers' parameter groups, and give each step its learning rate."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from distilclip.train.parallel import local
from distilclip.train.settings import Optimization

# Positions and class tokens, as open_clip, timm and transformers name them.
POSITIONS = {
    "positional_embedding",
    "class_embedding",
    "pos_embed",
    "cls_token",
    "relative_position_bias_table",
    "position_embeddings",
}


def build_optimizer(parameters: Mapping[str, nn.Parameter], optimization: Optimization) -> torch.optim.AdamW:
    """Return AdamW over named parameters. No decay on biases, norms, scales and positions (anything of fewer than two
    dimensions). Class centers have an optimizer of their own (train.class_head).
    """
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        if parameter.requires_grad:
            decays = parameter.ndim >= 2 and not any(part in POSITIONS for part in name.split("."))
            groups.setdefault((decays, isinstance(parameter, DTensor)), []).append(parameter)  # kernels take no mixture
    lists: list[dict[str, Any]] = [
        {
            "params": params,
            "weight_decay": optimization.weight_decay if decays else 0.0,
            "peak": optimization.learning_rate,
        }
        for (decays, _), params in sorted(groups.items(), key=lambda item: item[0], reverse=True)
    ]
    betas = optimization.beta1, optimization.beta2
    return torch.optim.AdamW(lists, lr=optimization.learning_rate, betas=betas, eps=optimization.eps, fused=True)


def schedule(step: int, *, num_steps: int, warmup_steps: int) -> float:
    """Return the share of the peak learning rate at a step: linear warm-up, then half a cosine down to zero.

    Example: of 110 steps with 10 of warm-up, step 0 has 0.1, step 9 has 1, step 60 has 0.5.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, num_steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def set_learning_rate(optimizer: torch.optim.Optimizer, share: float) -> float:
    """Give every group its peak times `share`, and return the student's learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * share
    return float(optimizer.param_groups[0]["lr"])


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
