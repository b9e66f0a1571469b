"""Exact accumulation: a batch of 2,048 in 32 micro-batches, against the same batch at once and against a batch of 64.

The gradients of CLIP-KD's loss, and of the contrastive loss, must be those of the one-shot batch. Peak memory beyond
inputs and gradients is that of a batch of 64 (within 1.2 x), for of the large batch only the features are held.
"""

from __future__ import annotations

import ctypes
import json
import sys
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from _harness import Case, compare, is_quick
from torch import Tensor

from distilclip.losses.features import Features
from distilclip.models.clip import create_clip
from distilclip.models.heads import Heads
from distilclip.train.objective import Objective, objective
from distilclip.train.parallel import build_towers
from distilclip.train.settings import Execution
from distilclip.train.step import Inputs, Student, compute_gradients

MICRO_BATCH, TEACHER_DIM = 64, 128
TOLERANCE = 1e-5


@dataclass
class Work:
    """A student and a batch for it."""

    student: Student
    inputs: Inputs


def make_work(batch: int, *, size: int, width: int, layers: int) -> Work:
    config = {
        "embed_dim": 64,
        "vision_cfg": {"image_size": size, "layers": layers, "width": width, "head_width": 32, "patch_size": 16},
        "text_cfg": {"context_length": 24, "vocab_size": 512, "width": 64, "heads": 2, "layers": 1},
    }
    clip = create_clip(json.dumps(config), seed=0)
    generator = torch.Generator().manual_seed(0)
    image, text = (F.normalize(torch.randn(batch, TEACHER_DIM, generator=generator), dim=1) for _ in range(2))
    inputs = Inputs(
        pixels=torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, generator=generator),
        tokens=torch.randint(1, 400, (batch, 24), generator=generator),
        teacher=Features(image=image, text=text, scale=torch.tensor(50.0)),
    )
    torch.manual_seed(0)
    heads = Heads(clip.dim, TEACHER_DIM)
    towers = build_towers(clip, precision=torch.float32, execution=Execution())
    return Work(student=Student(clip=clip, heads=heads, towers=towers), inputs=inputs)


def gradients(work: Work, method: Objective, micro_batch: int) -> list[Tensor]:
    for parameter in work.student.parameters():
        parameter.grad = None
    result = compute_gradients(
        work.student, method, work.inputs, micro_batch=micro_batch, generator=torch.Generator().manual_seed(1)
    )
    found = [parameter.grad for parameter in work.student.parameters() if parameter.grad is not None]
    return [result.loss, *(gradient.clone() for gradient in found)]


def gradients_mb(work: Work) -> float:
    """The gradients where they are computed, and the copy that is compared."""
    return 2 * 4e-6 * sum(parameter.numel() for parameter in work.student.parameters())


def equal(left: list[Tensor], right: list[Tensor]) -> bool:
    """Every gradient agrees, as a vector, to 1e-5 of the whole gradient's length; the loss to 1e-5."""
    length = torch.stack([gradient.norm() for gradient in right[1:]]).norm()
    same_loss = bool((left[0] - right[0]).abs() <= TOLERANCE * right[0].abs())
    return same_loss and all(
        bool((a - b).norm() <= TOLERANCE * length) for a, b in zip(left[1:], right[1:], strict=True)
    )


def return_freed_memory() -> None:
    """Let glibc give every block of over 1 MiB back when it is freed, so that resident memory is what is held."""
    if sys.platform == "linux":
        ctypes.CDLL(None).mallopt(-3, 1 << 20)  # M_MMAP_THRESHOLD


def main() -> None:
    quick = is_quick(__doc__ or "")
    return_freed_memory()
    batch, shape = (
        (512, {"size": 64, "width": 128, "layers": 3}) if quick else (2048, {"size": 96, "width": 192, "layers": 4})
    )
    cases = []
    for name in ("clip", "clip-kd"):
        method = objective(name)
        cases.append(
            Case(
                name=f"{name}, batch {batch:,} in micro-batches of {MICRO_BATCH} / at once",
                setup=lambda: make_work(batch, **shape),
                ours=lambda work, method=method: gradients(work, method, MICRO_BATCH),
                peer=lambda work, method=method: gradients(work, method, batch),
                equal=equal,
                result_mb=gradients_mb,
            )
        )
    both = objective("clip")
    cases.append(
        Case(
            name=f"clip, batch {batch:,} in micro-batches of {MICRO_BATCH} / a batch of {MICRO_BATCH}",
            setup=lambda: (make_work(batch, **shape), make_work(MICRO_BATCH, **shape)),
            ours=lambda works: gradients(works[0], both, MICRO_BATCH),
            peer=lambda works: gradients(works[1], both, MICRO_BATCH),
            equal=None,
            result_mb=lambda works: gradients_mb(works[0]),
        )
    )
    compare("accumulation", cases)


if __name__ == "__main__":
    main()
