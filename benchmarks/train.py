"""A training step with a stored teacher against open_clip's loop with a live one, and what the methods cost.

The student is ViT-B/32 at 224 pixels, the teacher ViT-L/14 (with --quick ViT-S/32 and ViT-B/32), of random weights;
batches are in memory, arithmetic is float32, on all cores. The peer is `open_clip_train.train.train_one_epoch` with
`DistillClipLoss` (task and relational term, a live teacher) and the optimizer of `open_clip_train.main`; ours computes
the same two terms, the teacher's embeddings being at hand as the stream delivers them. Then CLIP-CID's step (10,000
classes) and CLIP-KD's against the plain CLIP step, both of them ours.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import open_clip
import torch
from _harness import Case, compare, is_quick
from _steps import LEARNING_RATE, Sizes, Step, batch_of, our_step
from open_clip_train.train import train_one_epoch
from torch import Tensor

from distilclip.models.clip import create_clip, normalise_pixels
from distilclip.train.objective import Objective, objective

NUM_CLASSES = 10_000
DISTILL = Objective(relational=1.0)  # what DistillClipLoss computes, up to the teacher's entropy

FULL = Sizes(student="ViT-B-32", teacher="ViT-L-14", teacher_dim=768, batch=64)
QUICK = Sizes(student="ViT-S-32-alt", teacher="ViT-B-32", teacher_dim=512, batch=8)


def open_clip_step(sizes: Sizes) -> Step:
    """One step of open_clip's own epoch, its teacher run on the student's pictures."""
    clip, teacher = create_clip(sizes.student, seed=0), create_clip(sizes.teacher, seed=1)
    batch = batch_of(sizes, clip)
    pixels = normalise_pixels(batch.pixels, clip.preprocess_cfg)
    for model in (clip.model, teacher.model):
        model.output_dict = True
    loss = open_clip.DistillClipLoss()
    tasks: list[Tensor] = []

    def recorded(**features: Any) -> dict[str, Tensor]:
        losses = loss(**features)
        tasks.append(losses["contrastive_loss"].detach())
        return losses

    class OneBatch:
        num_batches, num_samples = 1, sizes.batch

        def __iter__(self) -> Any:
            return iter([(pixels, batch.tokens)])

    data = {"train": SimpleNamespace(dataloader=OneBatch(), set_epoch=lambda epoch: None)}
    named = list(clip.model.named_parameters())
    plain = [p for n, p in named if p.ndim < 2 or "bn" in n or "ln" in n or "bias" in n or "logit_scale" in n]
    decayed = [p for _, p in named if not any(p is other for other in plain)]
    groups = [{"params": plain, "weight_decay": 0.0}, {"params": decayed, "weight_decay": 0.2}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.98), eps=1e-6)
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

    def step() -> Tensor:
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
        equal=lambda left, right: abs(float(left) - float(right)) < 1e-3,  # the task's loss
        peer_memory=False,
    )


def main() -> None:
    sizes = QUICK if is_quick(__doc__ or "") else FULL
    plain, stored, kd = (partial(our_step, method) for method in (objective("clip"), DISTILL, objective("clip-kd")))
    cid = partial(our_step, objective("clip-cid"), num_classes=NUM_CLASSES)
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
