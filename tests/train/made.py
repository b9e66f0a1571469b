"""A tiny student with heads and class centers, and inputs for it, as several test files need them."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from distilclip import distributed
from distilclip.losses.features import Features
from distilclip.models.clip import create_clip
from distilclip.models.heads import Heads
from distilclip.train.class_head import ClassHead, class_range
from distilclip.train.parallel import build_towers
from distilclip.train.settings import Execution, Optimization
from distilclip.train.step import Inputs, Student

TEACHER_DIM, NUM_CENTERS, QUEUE = 10, 9, 6


def fill_queues(heads: Heads) -> Heads:
    """Put the same rows of earlier batches into the queues on every rank: five pictures and seven captions."""
    generator = torch.Generator().manual_seed(5)
    for one in heads.each():
        assert one.queue is not None
        dim = one.queued("image").shape[1]
        for side, number in (("image", 5), ("text", 7)):
            one.queue.push(side, F.normalize(torch.randn(number, dim, generator=generator), dim=1))
    return heads


def make_student(
    architecture: str,
    *,
    seed: int = 0,
    execution: Execution | None = None,
    precision: torch.dtype = torch.float32,
    augmented: bool = True,
    other_dims: tuple[int, ...] = (),
) -> Student:
    """A student whose every weight follows from the seed; of the centers it has the range of this rank."""
    clip = create_clip(architecture, seed=seed)
    torch.manual_seed(seed + 1)
    weights = (1.0, *(2.0 for _ in other_dims))
    heads = Heads(
        clip.dim, TEACHER_DIM, augmented=augmented, queue_length=QUEUE, other_dims=other_dims, weights=weights
    )
    fill_queues(heads)
    centers = F.normalize(torch.randn(NUM_CENTERS, TEACHER_DIM), dim=1)
    first, stop = class_range(NUM_CENTERS, distributed.rank(), distributed.world())
    optimization = Optimization(centers_learning_rate=1e-3)
    return Student(
        clip=clip,
        heads=heads,
        towers=build_towers(clip, precision=precision, execution=execution or Execution()),
        class_head=ClassHead(centers[first:stop].clone(), optimization, first=first, num_classes=NUM_CENTERS),
    )


def make_inputs(
    num_rows: int, *, seed: int = 2, other_dims: tuple[int, ...] = (), teacher_bias: float | None = None
) -> Inputs:
    """This rank's rows of a global batch of `num_rows`."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (num_rows, 3, 32, 32), dtype=torch.uint8, generator=generator)
    tokens = torch.randint(1, 400, (num_rows, 12), generator=generator)
    labels = torch.randint(0, NUM_CENTERS, (num_rows,), generator=generator)
    size = num_rows // distributed.world()
    own = slice(distributed.rank() * size, (distributed.rank() + 1) * size)

    def teacher(dim: int) -> Features:
        image, text = (F.normalize(torch.randn(num_rows, dim, generator=generator), dim=1) for _ in range(2))
        bias = None if teacher_bias is None else torch.tensor(teacher_bias)
        return Features(image=image[own], text=text[own], scale=torch.tensor(10.0 + dim), bias=bias)

    return Inputs(
        pixels=pixels[own],
        tokens=tokens[own],
        teacher=teacher(TEACHER_DIM),
        others=tuple(teacher(dim) for dim in other_dims),
        labels=labels[own],
    )
