"""State how training updates weights, keeps checkpoints and runs, without torch or numpy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from distilclip.errors import InputError
from distilclip.options import changeable

Tracker = Literal["tensorboard", "wandb"]


@dataclass(frozen=True, kw_only=True)
class Optimization:
    """How weights are updated: AdamW, linear warm-up, then a cosine."""

    learning_rate: float = 1e-3
    """peak learning rate of AdamW"""
    warmup_steps: int = 100
    """steps of linear warm-up before the cosine"""
    weight_decay: float = 0.2
    """weight decay of matrices; biases, norms, scales and positions have none"""
    beta1: float = 0.9
    """decay of AdamW's mean of gradients"""
    beta2: float = 0.98
    """decay of AdamW's mean of squared gradients; CLIP takes 0.98 for transformers, 0.999 for ResNets"""
    eps: float = 1e-6
    """AdamW's constant in the denominator; CLIP takes 1e-6 for transformers, 1e-8 for ResNets"""
    centers_learning_rate: float = 1e-6
    """peak learning rate of the class centers (CLIP-CID: training collapses with more)"""
    centers_weight_decay: float = 0.0
    """weight decay of the class centers"""
    gradient_clip: float = 1.0
    """longer gradients are scaled down to this norm (0: off)"""
    average_decay: float = 0.0
    """decay of a moving average of the weights, such as 0.999; checkpoints then give the average (0: off)"""

    def __post_init__(self) -> None:
        if self.learning_rate <= 0 or self.centers_learning_rate < 0:
            raise InputError("learning_rate must be positive, centers_learning_rate at least 0.")
        for name in ("warmup_steps", "weight_decay", "centers_weight_decay", "gradient_clip"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least 0.")
        for name in ("average_decay", "beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least 0 and below 1.")
        if self.eps <= 0:
            raise InputError(f"eps is {self.eps}; it must be positive.")


@dataclass(frozen=True, kw_only=True)
class Checkpoints:
    """When to write checkpoints, and which of them to keep."""

    checkpoint_every: int = 500
    """steps between checkpoints"""
    checkpoint_minutes: float = changeable(0.0)
    """also save every N minutes, keeping only the newest (0: off)"""
    keep_checkpoints: int = changeable(2)
    """number of checkpoints to keep on disk, the last ones"""
    keep_best: Literal["none", "loss", "cosine_image", "cosine_text", "agreement"] = changeable("none")
    """also keep the checkpoint that is best by this metric of the last training batches: lowest loss, highest others"""

    def __post_init__(self) -> None:
        for name in ("checkpoint_every", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if self.checkpoint_minutes < 0:
            raise InputError(f"checkpoint_minutes is {self.checkpoint_minutes}; it must be at least 0.")

    def scheduled(self, done: int, *, num_steps: int) -> bool:
        """Say whether every run has a checkpoint after `done` steps."""
        return done % self.checkpoint_every == 0 or done == num_steps

    def due(self, seconds: float) -> bool:
        """Say whether it is time for a checkpoint, `seconds` after the last."""
        return 0 < self.checkpoint_minutes * 60 <= seconds


@dataclass(frozen=True, kw_only=True)
class Execution:
    """How the towers run; results differ only by rounding."""

    strategy: Literal["ddp", "fsdp"] = changeable("ddp")
    """with several processes: each has all weights (DDP) or a part of them (FSDP2)"""
    compile: Literal["no", "default", "reduce-overhead", "max-autotune"] = changeable("no")
    """mode of torch.compile for the towers; with fsdp for each of their blocks"""
    activations: Literal["keep", "recompute"] = changeable("keep")
    """recompute saves memory: each block computes its activations again in the backward pass"""
