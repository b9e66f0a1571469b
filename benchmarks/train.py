"""A training step with a stored teacher against open_clip's loop with a live one, and what the methods cost.

The student is ViT-B/32 at 224 pixels, the teacher ViT-L/14 (with --quick ViT-S/32 and ViT-B/32), of random weights;
batches are in memory, arithmetic is float32. The peer is `open_clip_train.train.train_one_epoch` with
`DistillClipLoss` (task and relational term, a live teacher); ours computes the same two terms, the teacher's embeddings
being at hand as the stream delivers them. Then CLIP-CID's step (10,000 classes) and CLIP-KD's against the plain CLIP
step, both of them ours.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import open_clip
import torch
from _harness import Case, compare, is_quick
from open_clip_train.train import train_one_epoch
from torch import Tensor
from torch.nn import functional as F

from distilclip.models.clip import Clip, create_clip, normalise_pixels
from distilclip.models.heads import Heads
from distilclip.ops.features import Features
from distilclip.train.classhead import ClassHead
from distilclip.train.objective import Objective, objective
from distilclip.train.optimizer import build_optimizer
from distilclip.train.parallel import Execution, build_towers, clip_gradients_
from distilclip.train.step import Inputs, Student, compute_gradients

NUM_CLASSES = 10_000
LEARNING_RATE = 1e-9  # so small that every repetition computes the loss of the same weights
DISTILL = Objective(relational=1.0)  # what DistillClipLoss computes, up to the teacher's entropy

Step = Callable[[], float]


@dataclass(frozen=True)
class Sizes:
    """Architectures, width of the teacher's embeddings, and pairs per step."""

    student: str
    teacher: str
    teacher_dim: int
    batch: int


FULL = Sizes("ViT-B-32", "ViT-L-14", 768, 64)
QUICK = Sizes("ViT-S-32-alt", "ViT-B-32", 512, 8)


@dataclass(frozen=True)
class Batch:
    """Pictures and captions of random numbers, and the teacher's embeddings of them."""

    pixels: Tensor
    tokens: Tensor
    image: Tensor
    text: Tensor


clip_of: Callable[..., Clip] = cache(create_clip)


def batch_of(sizes: Sizes) -> Batch:
    size = sizes.batch
    generator = torch.Generator().manual_seed(2)
    pixels = torch.randint(0, 256, (size, 3, 224, 224), dtype=torch.uint8, generator=generator)
    tokens = torch.randint(1, 49_000, (size, 77), generator=generator)
    tokens[:, -1] = 49_407  # end of text
    image, text = (F.normalize(torch.randn(size, sizes.teacher_dim, generator=generator), dim=1) for _ in range(2))
    return Batch(pixels, tokens, image, text)


def our_step(method: Objective, sizes: Sizes) -> Step:
    """A step as `train.loop` takes it; the loss of the task is returned."""
    batch, clip = batch_of(sizes), clip_of(sizes.student, seed=0)
    clip.model.train()
    head = None
    if method.cluster:
        head = ClassHead(F.normalize(torch.randn(NUM_CLASSES, sizes.teacher_dim), dim=1), learning_rate=LEARNING_RATE)
    student = Student(
        clip=clip,
        heads=Heads(clip.dim, sizes.teacher_dim),
        towers=build_towers(clip, precision=torch.float32, execution=Execution()),
        class_head=head,
    )
    optimizer = build_optimizer(student.named_parameters(), learning_rate=LEARNING_RATE, weight_decay=0.2)
    inputs = Inputs(
        pixels=batch.pixels,
        tokens=batch.tokens,
        teacher=Features(batch.image, batch.text, torch.tensor(100.0)) if method.needs_teacher else None,
        labels=torch.arange(sizes.batch) * 7 % NUM_CLASSES,
    )

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        generator = torch.Generator().manual_seed(0)
        result = compute_gradients(student, method, inputs, micro_batch=sizes.batch, generator=generator)
        centers = [] if result.classes is None else [result.classes.centers]
        clip_gradients_(student.parameters(), sharded=centers, max_norm=1.0)
        optimizer.step()
        if result.classes is not None and student.class_head is not None:
            student.class_head.update(result.classes, share=1.0)
        student.limit_scales()
        return float(result.terms["task"])

    return step


def open_clip_step(sizes: Sizes) -> Step:
    """One step of open_clip's own epoch, its teacher run on the student's pictures."""
    batch, clip, teacher = batch_of(sizes), clip_of(sizes.student, seed=0), clip_of(sizes.teacher, seed=1)
    pixels = normalise_pixels(batch.pixels, clip.preprocess_cfg)
    for model in (clip.model, teacher.model):
        model.output_dict = True
    loss = open_clip.DistillClipLoss()
    tasks: list[float] = []

    def recorded(**features: Any) -> dict[str, Tensor]:
        losses = loss(**features)
        tasks.append(float(losses["contrastive_loss"]))
        return losses

    class OneBatch:
        num_batches, num_samples = 1, sizes.batch

        def __iter__(self) -> Any:
            return iter([(pixels, batch.tokens)])

    data = {"train": SimpleNamespace(dataloader=OneBatch(), set_epoch=lambda epoch: None)}
    optimizer = torch.optim.AdamW(
        clip.model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.2
    )
    arguments = argparse.Namespace(
        device="cpu",
        precision="fp32",
        distill=True,
        accum_freq=1,
        skip_scheduler=True,
        horovod=False,
        grad_clip_norm=1.0,
        rank=0,
        world_size=1,
        batch_size=sizes.batch,
        log_every_n_steps=1,
        wandb=False,
    )

    def step() -> float:
        train_one_epoch(clip.model, data, recorded, 0, optimizer, None, None, teacher.model, arguments)
        return tasks[-1]

    return step


def case(name: str, sizes: Sizes, ours: Callable[[Sizes], Step], peer: Callable[[Sizes], Step]) -> Case:
    def setup() -> tuple[Step, Step]:
        return ours(sizes), peer(sizes)

    return Case(
        name=f"{sizes.student}, batch {sizes.batch}: {name}",
        setup=setup,
        ours=lambda steps: steps[0](),
        peer=lambda steps: steps[1](),
        equal=lambda left, right: abs(left - right) < 1e-3,  # the task's loss
        peer_memory=False,
    )


def main() -> None:
    sizes = QUICK if is_quick(__doc__ or "") else FULL
    plain = partial(our_step, objective("clip"))
    stored, cid, kd = (partial(our_step, method) for method in (DISTILL, objective("clip-cid"), objective("clip-kd")))
    compare(
        "train",
        [
            case("stored teacher / open_clip's loop, live teacher", sizes, stored, open_clip_step),
            case(f"CLIP-CID, {NUM_CLASSES:,} classes / plain CLIP", sizes, cid, plain),
            case("CLIP-KD / plain CLIP", sizes, kd, plain),
        ],
    )


if __name__ == "__main__":
    main()
