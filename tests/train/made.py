"""A tiny student with heads and class centers, and inputs for it, as several test files need them."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from distilclip import distributed
from distilclip.models.clip import create_clip
from distilclip.models.heads import Heads
from distilclip.ops.features import Features
from distilclip.train.classhead import ClassHead
from distilclip.train.parallel import Execution, build_towers
from distilclip.train.sharding import class_range
from distilclip.train.step import Inputs, Student

TEACHER_DIM, NUM_CENTERS = 10, 9


def make_student(
    architecture: str,
    *,
    seed: int = 0,
    execution: Execution | None = None,
    precision: torch.dtype = torch.float32,
    augmented: bool = True,
) -> Student:
    """A student whose every weight follows from the seed; of the centers it has the range of this rank."""
    clip = create_clip(architecture, seed=seed)
    torch.manual_seed(seed + 1)
    heads = Heads(clip.dim, TEACHER_DIM, augmented=augmented)
    centers = F.normalize(torch.randn(NUM_CENTERS, TEACHER_DIM), dim=1)
    first, stop = class_range(NUM_CENTERS, distributed.rank(), distributed.world())
    return Student(
        clip=clip,
        heads=heads,
        towers=build_towers(clip, precision=precision, execution=execution or Execution()),
        class_head=ClassHead(centers[first:stop].clone(), first=first, num_classes=NUM_CENTERS, learning_rate=1e-3),
    )


def make_inputs(num_rows: int, *, seed: int = 2) -> Inputs:
    """This rank's rows of a global batch of `num_rows`."""
    generator = torch.Generator().manual_seed(seed)
    image, text = (F.normalize(torch.randn(num_rows, TEACHER_DIM, generator=generator), dim=1) for _ in range(2))
    pixels = torch.randint(0, 256, (num_rows, 3, 32, 32), dtype=torch.uint8, generator=generator)
    tokens = torch.randint(1, 400, (num_rows, 12), generator=generator)
    labels = torch.randint(0, NUM_CENTERS, (num_rows,), generator=generator)
    size = num_rows // distributed.world()
    own = slice(distributed.rank() * size, (distributed.rank() + 1) * size)
    return Inputs(
        pixels=pixels[own],
        tokens=tokens[own],
        teacher=Features(image=image[own], text=text[own], scale=torch.tensor(20.0)),
        labels=labels[own],
    )
