"""The class head's update: sampled classes against all classes, all classes against torch's fused AdamW.

An update at sample_rate 0.1 reads and writes the rows of its classes only, so it should cost a tenth of the full one;
the last cases add the loss and its gradient, the whole of what a step does with the head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from _harness import Case, compare, is_quick
from torch import Tensor

from distilclip.losses.cluster import cluster, sample_classes
from distilclip.losses.terms import StepClasses
from distilclip.train.class_head import ClassHead
from distilclip.train.settings import Optimization

SAMPLE_RATE = 0.1
LEARNING_RATE = 1e-6
BETAS, EPS = (0.9, 0.98), 1e-6


@dataclass
class Inputs:
    """A head, torch's optimizer over the same centers, and gradients for them."""

    head: ClassHead
    torch_optimizer: torch.optim.AdamW | None
    classes: Tensor
    all_classes: StepClasses
    some_classes: StepClasses
    student: Tensor
    teacher: Tensor
    labels: Tensor


def make_inputs(n: int, dim: int, k: int, *, with_torch: bool) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    centers = F.normalize(torch.randn(k, dim, generator=generator), dim=1)
    labels = torch.randint(k, (n,), generator=generator)
    student, teacher = (F.normalize(torch.randn(n, dim, generator=generator), dim=1) for _ in range(2))
    gradient = torch.randn(k, dim, generator=generator).mul_(1e-4)
    optimizer = None
    if with_torch:
        twin = torch.nn.Parameter(centers.clone())
        twin.grad = gradient
        optimizer = torch.optim.AdamW([twin], lr=LEARNING_RATE, betas=BETAS, eps=EPS, weight_decay=0.0, fused=True)
    head = ClassHead(centers, Optimization(centers_learning_rate=LEARNING_RATE))
    classes = sample_classes(labels, k, SAMPLE_RATE, generator)
    all_classes, some_classes = head.of_step(labels, None), head.of_step(labels, classes)
    all_classes.centers.grad, some_classes.centers.grad = gradient, gradient[: len(classes)]
    return Inputs(
        head=head,
        torch_optimizer=optimizer,
        classes=classes,
        all_classes=all_classes,
        some_classes=some_classes,
        student=student,
        teacher=teacher,
        labels=labels,
    )


def update(inputs: Inputs, step: StepClasses) -> Tensor:
    inputs.head.update(step, share=1.0)
    return inputs.head.centers


def torch_update(inputs: Inputs) -> Tensor:
    assert inputs.torch_optimizer is not None
    inputs.torch_optimizer.step()
    return inputs.torch_optimizer.param_groups[0]["params"][0].detach()


def whole_step(inputs: Inputs, classes: Tensor | None) -> None:
    step = inputs.head.of_step(inputs.labels, classes)
    cluster(inputs.student, inputs.teacher, step.centers, step.labels).total.backward()
    inputs.head.update(step, share=1.0)


def equal(left: Tensor, right: Tensor) -> bool:
    return bool((left - right).norm() <= 1e-6 * right.norm())


def against_torch(n: int, dim: int, k: int) -> Case:
    return Case(
        name=f"update d={dim} k={k:,}: all classes / torch fused AdamW",
        setup=lambda: make_inputs(n, dim, k, with_torch=True),
        ours=lambda inputs: update(inputs, inputs.all_classes),
        peer=torch_update,
        equal=equal,
    )


def sampled(n: int, dim: int, k: int) -> list[Case]:
    size = f"d={dim} k={k:,}"

    def setup() -> Inputs:
        return make_inputs(n, dim, k, with_torch=False)

    return [
        Case(
            name=f"update {size}: sample_rate {SAMPLE_RATE} / all classes",
            setup=setup,
            ours=lambda inputs: update(inputs, inputs.some_classes),
            peer=lambda inputs: update(inputs, inputs.all_classes),
            equal=None,
        ),
        Case(
            name=f"loss and update n={n:,} {size}: sample_rate {SAMPLE_RATE} / all classes",
            setup=setup,
            ours=lambda inputs: whole_step(inputs, inputs.classes),
            peer=lambda inputs: whole_step(inputs, None),
            equal=None,
        ),
    ]


def main() -> None:
    quick = is_quick(__doc__ or "")
    sizes = [(256, 128, 20_000)] if quick else [(1024, 512, 100_000), (1024, 512, 1_000_000)]
    cases = [against_torch(*sizes[0])]  # torch's side of a million classes does not fit beside ours
    compare("class_head", [*cases, *(case for size in sizes for case in sampled(*size))])


if __name__ == "__main__":
    main()
