"""AdamW with the papers' parameter groups, and the learning rate of a step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from distilclip.models.heads import Heads

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
    student: nn.Module,
    heads: Heads,
    *,
    learning_rate: float,
    centers_learning_rate: float,
    weight_decay: float,
    betas: tuple[float, float] = (0.9, 0.98),
) -> torch.optim.AdamW:
    """AdamW over student and heads. No decay on biases, norms, scales and positions (anything of fewer than two
    dimensions), nor on the class centers, which have a learning rate of their own (CLIP-CID section 4.1).
    """
    decayed, plain, centers = [], [], []
    for name, parameter in [*student.named_parameters(), *heads.named_parameters()]:
        if not parameter.requires_grad:
            continue
        if parameter is heads.centers:
            centers.append(parameter)
        elif parameter.ndim < 2 or any(part in POSITIONS for part in name.split(".")):
            plain.append(parameter)
        else:
            decayed.append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": weight_decay, "peak": learning_rate},
        {"params": plain, "weight_decay": 0.0, "peak": learning_rate},
        {"params": centers, "weight_decay": 0.0, "peak": centers_learning_rate},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=learning_rate, betas=betas, eps=1e-6, fused=True)


def schedule(step: int, *, num_steps: int, warmup_steps: int) -> float:
    """Share of the peak learning rate at a step: linear warm-up, then half a cosine down to zero."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, num_steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def set_learning_rate(optimizer: torch.optim.Optimizer, share: float) -> float:
    """Give every group its peak times `share`; returns the student's learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * share
    return float(optimizer.param_groups[0]["lr"])
