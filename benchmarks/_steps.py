"""A training step as `train.loop` takes it, on made-up pairs that are in memory: what the training benchmarks time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distilclip.losses.features import Features
from distilclip.models.clip import Clip, create_clip
from distilclip.models.heads import Heads
from distilclip.train.class_head import ClassHead
from distilclip.train.objective import Objective
from distilclip.train.optimizer import build_optimizer
from distilclip.train.parallel import build_towers, clip_gradients_
from distilclip.train.settings import Execution, Optimization
from distilclip.train.step import Inputs, Student, compute_gradients

LEARNING_RATE = 1e-9  # so small that every repetition computes the loss of the same weights

Step = Callable[[], Tensor]


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Architectures, width of the teacher's embeddings, and pairs per step."""

    student: str
    teacher: str
    teacher_dim: int
    batch: int


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where and how a step runs."""

    device: str = "cpu"
    precision: torch.dtype = torch.float32
    micro_batch: int | None = None
    execution: Execution = field(default_factory=Execution)


@cache
def student_of(architecture: str, machine: Machine) -> tuple[Clip, nn.Module]:
    """A student and its towers on a machine: built, and compiled, once for all methods."""
    clip = create_clip(architecture, seed=0, device=machine.device)
    clip.model.train()
    return clip, build_towers(clip, precision=machine.precision, execution=machine.execution)


@dataclass(frozen=True)
class Batch:
    """Pictures and captions of random numbers, and the teacher's embeddings of them."""

    pixels: Tensor
    tokens: Tensor
    image: Tensor
    text: Tensor


def batch_of(sizes: Sizes, clip: Clip) -> Batch:
    """The same numbers every time, on the student's device."""
    generator = torch.Generator().manual_seed(2)
    side, length = clip.image_size, clip.context_length
    pixels = torch.randint(0, 256, (sizes.batch, 3, side, side), dtype=torch.uint8, generator=generator)
    tokens = torch.randint(1, 49_000, (sizes.batch, length), generator=generator)
    tokens[:, -1] = 49_407  # end of text
    image, text = (
        F.normalize(torch.randn(sizes.batch, sizes.teacher_dim, generator=generator), dim=1) for _ in range(2)
    )
    return Batch(*(tensor.to(clip.device) for tensor in (pixels, tokens, image, text)))


def our_step(method: Objective, sizes: Sizes, machine: Machine | None = None, *, num_classes: int = 10_000) -> Step:
    """Gradients, clipping, optimizers; it returns the loss of the task."""
    machine = machine or Machine()
    clip, towers = student_of(sizes.student, machine)
    batch = batch_of(sizes, clip)
    head = None
    if method.cluster:
        centers = F.normalize(torch.randn(num_classes, sizes.teacher_dim, device=clip.device), dim=1)
        head = ClassHead(centers, Optimization(centers_learning_rate=LEARNING_RATE))
    student = Student(
        clip=clip,
        heads=Heads(clip.dim, sizes.teacher_dim).to(clip.device),
        towers=towers,
        class_head=head,
    )
    optimizer = build_optimizer(student.named_parameters(), Optimization(learning_rate=LEARNING_RATE, weight_decay=0.2))
    scale = torch.tensor(100.0, device=clip.device)
    inputs = Inputs(
        pixels=batch.pixels,
        tokens=batch.tokens,
        teacher=Features(batch.image, batch.text, scale) if method.needs_teacher else None,
        labels=torch.arange(sizes.batch, device=clip.device) * 7 % num_classes,
    )

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        generator = torch.Generator(clip.device).manual_seed(0)
        micro_batch = machine.micro_batch or sizes.batch
        result = compute_gradients(student, method, inputs, micro_batch=micro_batch, generator=generator)
        centers = [] if result.classes is None else [result.classes.centers]
        norm = clip_gradients_(student.parameters(), sharded=centers, max_norm=1.0)
        assert bool(torch.isfinite(norm + result.loss))  # as the loop asks: every step waits for its numbers once
        optimizer.step()
        if result.classes is not None and student.class_head is not None:
            student.class_head.update(result.classes, share=1.0)
        student.limit_scales()
        return result.terms["task"]

    return step
