"""Cluster loss, forward and backward, against the materialised torch version; sampled classes against all classes.

Peak memory is what either side holds beyond its inputs and the gradients it returns. The first four cases show how it
grows: with n + k here, with n x k there. A million centers do not fit the peer on an ordinary machine.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from _harness import Case, compare, is_quick
from torch import Tensor

from distilclip.losses.cluster import cluster, sample_classes

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]
Result = tuple[Tensor, ...]
SAMPLE_RATE = 0.1
TOLERANCE = 1e-5


def make_inputs(n: int, dim: int, k: int) -> Inputs:
    """Student rows near their teacher's, teacher rows near a center, as after some training."""
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(k, dim, generator=generator)
    labels = torch.randint(k, (n,), generator=generator)
    teacher = F.normalize(F.normalize(centers[labels]) + 0.04 * torch.randn(n, dim, generator=generator))
    student = F.normalize(teacher + 0.04 * torch.randn(n, dim, generator=generator))
    return student.requires_grad_(), teacher, centers.requires_grad_(), labels


def ours(inputs: Inputs) -> Result:
    student, teacher, centers, labels = inputs
    total = cluster(student, teacher, centers, labels).total
    return total.detach(), *torch.autograd.grad(total, [student, centers])


def ours_sampled(inputs: Inputs) -> Result:
    student, teacher, centers, labels = inputs
    classes = sample_classes(labels, len(centers), SAMPLE_RATE, torch.Generator().manual_seed(0))
    total = cluster(student, teacher, centers, labels, classes=classes).total
    return total.detach(), *torch.autograd.grad(total, [student, centers])


def materialised(inputs: Inputs) -> Result:
    student, teacher, centers, labels = inputs
    unit = F.normalize(centers)
    by_student, by_teacher = student @ unit.T, teacher @ unit.T
    label = F.cross_entropy(by_student, labels)
    p, q = F.log_softmax(by_student / 0.07, dim=1), F.log_softmax(by_teacher / 0.07, dim=1)
    total = 0.999 * label + 0.001 * F.kl_div(q, p, log_target=True, reduction="batchmean")
    return total.detach(), *torch.autograd.grad(total, [student, centers])


def equal(left: Result, right: Result) -> bool:
    """Loss and both gradients agree, as vectors, to 1e-5 of their length."""
    return all(bool((a - b).norm() <= TOLERANCE * b.norm()) for a, b in zip(left, right, strict=True))


def case(n: int, dim: int, k: int, *, fits: bool = True) -> Case:
    return Case(
        name=f"n={n:,} d={dim} k={k:,}: ours / materialised",
        setup=lambda: make_inputs(n, dim, k),
        ours=ours,
        peer=materialised if fits else None,
        equal=equal,
        result_mb=lambda inputs: _gradients_mb(n, dim, k),
    )


def sampled_case(n: int, dim: int, k: int) -> Case:
    return Case(
        name=f"n={n:,} d={dim} k={k:,}: sample_rate {SAMPLE_RATE} / all classes",
        setup=lambda: make_inputs(n, dim, k),
        ours=ours_sampled,
        peer=ours,
        equal=None,
        result_mb=lambda inputs: _gradients_mb(n, dim, k),
    )


def _gradients_mb(n: int, dim: int, k: int) -> float:
    return 4 * (n + k) * dim / 1e6


def main() -> None:
    quick = is_quick(__doc__ or "")
    cases = [case(n, 128, k) for n in (256, 1024) for k in ((5_000, 20_000) if quick else (10_000, 40_000))]
    if quick:
        cases += [sampled_case(256, 512, 20_000)]
    else:
        cases += [case(1024, 512, 100_000), sampled_case(1024, 512, 100_000)]
        cases += [case(1024, 512, 1_000_000, fits=False), sampled_case(1024, 512, 1_000_000)]
    compare("cluster_loss", cases)


if __name__ == "__main__":
    main()
