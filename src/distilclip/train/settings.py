"""State how training updates weights, keeps checkpoints and runs, without torch or numpy."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from distilclip.errors import InputError, did_you_mean
from distilclip.options import changeable, check_at_least
from distilclip.sets.specs import VALIDATED

Tracker = Literal["tensorboard", "wandb"]
MEASURES = ("loss", "cosine_image", "cosine_text", "agreement")
"""What a line says of the training batches by which checkpoints may be compared."""


@dataclass(frozen=True, kw_only=True)
class Optimization:
    """How weights are updated: by AdamW."""

    learning_rate: float = 1e-3
    """peak learning rate of AdamW"""
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
        check_at_least(self, 0, "weight_decay", "centers_weight_decay", "gradient_clip")
        for name in ("average_decay", "beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least 0 and below 1.")
        if self.eps <= 0:
            raise InputError(f"eps is {self.eps}; it must be positive.")


@dataclass(frozen=True, kw_only=True)
class LearningCurve:
    """How the learning rate rises and falls: linear warm-up, then a cosine, or constant with a cooldown."""

    warmup_steps: int | None = None
    """steps of linear warm-up before the schedule (default: 100, or what --warmup-epochs says)"""
    warmup_epochs: float | None = None
    """length of the warm-up in epochs, instead of --warmup-steps"""
    schedule: Literal["cosine", "constant"] = "cosine"
    """after the warm-up: half a cosine down, or constant and then a straight line down over the --cooldown"""
    final_learning_rate_ratio: float = 0.0
    """share of the peak learning rate at which the schedule ends"""
    cooldown: float = 0.2
    """share of all steps in which the constant schedule goes down, at its end (0: it stays constant)"""

    def __post_init__(self) -> None:
        if self.warmup_steps is not None and self.warmup_epochs is not None:
            raise InputError("Give --warmup-steps or --warmup-epochs, not both.")
        check_at_least(self, 0, "warmup_steps", "warmup_epochs")
        for name in ("final_learning_rate_ratio", "cooldown"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be from 0 to 1.")
        if self.warmup_steps is None and self.warmup_epochs is None:
            object.__setattr__(self, "warmup_steps", 100)


def steps_of(epochs: float, *, num_rows: int, batch_size: int) -> int:
    """Return the steps in which `epochs` x `num_rows` pairs are seen, rounded up to a whole batch.

    Example: one epoch of 24 pairs in batches of 16 has 2 steps, two epochs have 3.
    """
    return math.ceil(Fraction(str(epochs)) * num_rows / batch_size)


def check_warmup(warmup_steps: int, *, num_steps: int) -> None:
    """Raise `InputError` for a warm-up that is longer than the training."""
    if warmup_steps > num_steps:
        raise InputError(
            f"warmup_steps is {warmup_steps}, more than num_steps, {num_steps}. Give a smaller --warmup-steps or "
            "--warmup-epochs."
        )


@dataclass(frozen=True, kw_only=True)
class TowerTraining:
    """What of the two towers is trained, how fast, and what they see."""

    freeze: Literal["none", "image", "text"] = "none"
    """tower that keeps the weights of --init and runs as in evaluation"""
    image_learning_rate_ratio: float = 1.0
    """learning rate of the image tower, in shares of --learning-rate"""
    text_learning_rate_ratio: float = 1.0
    """learning rate of the text tower, in shares of --learning-rate"""
    patch_dropout: float = 0.0
    """share of the patches that a step of training leaves out of each picture; not of masked pictures (0: off)"""
    batch_norm: Literal["whole-batch", "per-process", "per-micro-batch"] = "whole-batch"
    """pairs over which a batch norm normalises; per-process and per-micro-batch are other models than whole-batch, and
    need no exchange"""

    def __post_init__(self) -> None:
        for name in ("image_learning_rate_ratio", "text_learning_rate_ratio"):
            if getattr(self, name) <= 0:
                raise InputError(f"{name} is {getattr(self, name)}; it must be positive. --freeze keeps a tower as is.")
        if not 0 <= self.patch_dropout < 1:
            raise InputError(f"patch_dropout is {self.patch_dropout}; it must be at least 0 and below 1.")

    def learning_rate_ratio(self, name: str) -> float:
        """Return the share of the learning rate that a parameter has, by its name in the student (`model.visual.x`)."""
        if name.startswith("model.visual."):
            return self.image_learning_rate_ratio
        is_text = name.startswith("model.") and not name.startswith("model.logit_")
        return self.text_learning_rate_ratio if is_text else 1.0


@dataclass(frozen=True, kw_only=True)
class Checkpoints:
    """When to write checkpoints, and which of them to keep."""

    checkpoint_every: int = 500
    """steps between checkpoints"""
    checkpoint_minutes: float = changeable(0.0)
    """also save every N minutes, keeping only the newest (0: off)"""
    keep_checkpoints: int = changeable(2)
    """number of checkpoints to keep on disk, the last ones"""
    keep_best: str = changeable("none")
    """also keep the checkpoint that is best by a metric: loss, cosine_image, cosine_text or agreement of the last
    training batches, or SET/METRIC of a validation, as imagenet/top1 or held-out/loss; lowest loss, highest others"""

    def __post_init__(self) -> None:
        check_at_least(self, 1, "checkpoint_every", "keep_checkpoints")
        check_at_least(self, 0, "checkpoint_minutes")
        if "/" not in self.keep_best and self.keep_best not in ("none", *MEASURES):
            raise InputError(
                f"keep_best is {self.keep_best!r}; it is none, {', '.join(MEASURES)}, or SET/METRIC of a validation. "
                + did_you_mean(self.keep_best, MEASURES)
            )

    @property
    def best_by(self) -> str | None:
        """The column of metrics.jsonl by which the best checkpoint is chosen, None for none."""
        if self.keep_best == "none":
            return None
        return self.keep_best if self.keep_best in MEASURES else VALIDATED + self.keep_best.removeprefix(VALIDATED)

    def scheduled(self, done: int, *, num_steps: int) -> bool:
        """Say whether every run has a checkpoint after `done` steps."""
        return done % self.checkpoint_every == 0 or done == num_steps

    def due(self, seconds: float) -> bool:
        """Say whether it is time for a checkpoint, `seconds` after the last."""
        return 0 < self.checkpoint_minutes * 60 <= seconds


@dataclass(frozen=True, kw_only=True)
class Validation:
    """What is measured while the student learns, on data that it does not learn from."""

    validate: tuple[str, ...] = changeable(())
    """sets to measure zero-shot accuracy or retrieval on, as `evaluate --sets` names them, with the same numbers"""
    held_out: tuple[str, ...] = changeable(())
    """pairs kept aside, for the loss and its terms: their folder of `embed` by the same teacher (one for each teacher);
    without --store, their files"""
    validate_every: int | None = changeable(None)
    """steps between validations (default: as many times --checkpoint-every as keep their work near 2 %); the last step
    is always validated"""
    validate_every_epochs: float | None = changeable(None)
    """epochs between validations, instead of --validate-every"""
    data_root: str | None = changeable(None)
    """folder of the published sets to validate on, as for `evaluate`"""
    prompts: str | None = changeable(None)
    """openai/CLIP's data/prompts.md, for class names and templates of the published sets"""
    stop_after: int | None = None
    """end the training early when so many validations in a row were no better than the best before, by --keep-best"""

    def __post_init__(self) -> None:
        check_at_least(self, 1, "validate_every", "stop_after")
        if self.validate_every is not None and self.validate_every_epochs is not None:
            raise InputError("Give --validate-every or --validate-every-epochs, not both.")
        if self.validate_every_epochs is not None and not 0 < self.validate_every_epochs < math.inf:
            raise InputError(f"validate_every_epochs is {self.validate_every_epochs}; it must be positive.")
        if not self.is_on and (self.validate_every or self.validate_every_epochs or self.stop_after):
            raise InputError("Nothing to validate on: give --validate, the sets, or --held-out, pairs kept aside.")

    @property
    def is_on(self) -> bool:
        """Whether there is anything to validate on."""
        return bool(self.validate or self.held_out)


@dataclass(frozen=True, kw_only=True)
class Execution:
    """How the towers run; results differ only by rounding."""

    strategy: Literal["ddp", "fsdp"] = changeable("ddp")
    """with several processes: each has all weights (DDP) or a part of them (FSDP2)"""
    compile: Literal["no", "default", "reduce-overhead", "max-autotune"] = changeable("no")
    """mode of torch.compile for the towers; with fsdp for each of their blocks"""
    activations: Literal["keep", "recompute"] = changeable("keep")
    """recompute saves memory: each block computes its activations again in the backward pass"""
