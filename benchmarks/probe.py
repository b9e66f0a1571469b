"""Linear probe against scikit-learn: one fit, and CLIP's sweep of 15 fits with refit, to the same optimum."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from _harness import Case, compare, is_quick
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from distilclip.measures.logistic import Block
from distilclip.measures.probe import FIRST_EXPONENTS, HALVED_INTERVALS, Probe, hold_out, linear_probe


@dataclass(frozen=True)
class Inputs:
    train: torch.Tensor
    train_labels: torch.Tensor
    test: torch.Tensor
    test_labels: torch.Tensor


def clip_like(num_rows: int, dim: int, num_classes: int, *, separation: float = 0.2) -> Inputs:
    """Classes that overlap, in a narrow cone, with a spectrum that decays as CLIP's does; a fifth more rows to test.

    Of 100 classes about nine in ten rows are told rightly, and the best penalty lies inside the range that is swept, as
    it does for CLIP's own features.
    """
    random = torch.Generator().manual_seed(0)
    spectrum = torch.arange(1, dim + 1) ** -0.5
    rotation = torch.linalg.qr(torch.randn(dim, dim, generator=random))[0]
    centers = separation * torch.randn(num_classes, dim, generator=random)
    labels = torch.randint(num_classes, (num_rows + num_rows // 5,), generator=random)
    x = ((centers[labels] + torch.randn(len(labels), dim, generator=random)) * spectrum) @ rotation
    x += 0.3 * torch.randn(dim, generator=random)
    return Inputs(x[:num_rows].clone(), labels[:num_rows], x[num_rows:].clone(), labels[num_rows:])


def objective(weight: torch.Tensor, bias: torch.Tensor, inputs: Inputs, l2: float) -> float:
    logits = inputs.train.double() @ weight.double() + bias.double()
    loss = torch.nn.functional.cross_entropy(logits, inputs.train_labels, reduction="sum")
    return float(loss + l2 / 2 * weight.double().square().sum())


def fit_peer(x: torch.Tensor, y: torch.Tensor, l2: float, *, tolerance: float = 1e-6) -> LogisticRegression:
    # Since version 1.4 the loss is a mean over rows: a tolerance above 1e-6 stops short of the optimum.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return LogisticRegression(C=1 / l2, tol=tolerance, max_iter=1000).fit(x.numpy(), y.numpy())


def sweep_peer(inputs: Inputs) -> LogisticRegression:
    """CLIP's binary search as one writes it with scikit-learn: the same held-out rows, every fit from zero."""
    kept, held = hold_out(Block(features=inputs.train, labels=inputs.train_labels), share=0.2, seed=0)
    x, y = kept.tile(slice(None))
    held_x, held_y = (part.numpy() for part in held.tile(slice(None)))
    scores: dict[float, float] = {}
    for exponent in FIRST_EXPONENTS:
        scores[exponent] = float(fit_peer(x, y, 10.0**exponent).score(held_x, held_y))
    for interval in HALVED_INTERVALS:
        best = max(scores, key=lambda e: scores[e])
        for exponent in (best + interval, best - interval):
            if abs(exponent) <= FIRST_EXPONENTS[0]:
                scores[exponent] = float(fit_peer(x, y, 10.0**exponent).score(held_x, held_y))
    return fit_peer(inputs.train, inputs.train_labels, 10.0 ** max(scores, key=lambda e: scores[e]))


def accuracy(peer: LogisticRegression, inputs: Inputs) -> float:
    return float(peer.score(inputs.test.numpy(), inputs.test_labels.numpy()))


def case(size: tuple[int, int, int], l2: float, *, tolerance: float, peer_memory: bool = True) -> Case:
    """`tolerance` is the peer's: the loosest power of ten with which it comes as near to the optimum as is asked."""

    def ours(inputs: Inputs) -> Probe:
        return linear_probe(inputs.train, inputs.train_labels, inputs.test, inputs.test_labels, l2=l2)

    def equal(probe: Probe, peer: LogisticRegression) -> bool:
        """Objectives within 1e-4 of one another, and accuracies within a tenth of a point."""
        inputs = clip_like(*size)
        mine = objective(probe.weight, probe.bias, inputs, l2)
        theirs = objective(torch.from_numpy(peer.coef_.T), torch.from_numpy(peer.intercept_), inputs, l2)
        return abs(mine / theirs - 1) <= 1e-4 and abs(probe.accuracy - accuracy(peer, inputs)) <= 1e-3

    return Case(
        name=f"one fit, C = {1 / l2:g}, {shape(size)}",
        setup=lambda: clip_like(*size),
        ours=ours,
        peer=lambda inputs: fit_peer(inputs.train, inputs.train_labels, l2, tolerance=tolerance),
        equal=equal,
        peer_memory=peer_memory,
    )


def sweep_case(size: tuple[int, int, int]) -> Case:
    return Case(
        name=f"15 fits and refit, {shape(size)}",
        setup=lambda: clip_like(*size),
        ours=lambda inputs: linear_probe(inputs.train, inputs.train_labels, inputs.test, inputs.test_labels),
        peer=sweep_peer,
        equal=lambda probe, peer: abs(probe.accuracy - accuracy(peer, clip_like(*size))) <= 1e-3,
        peer_memory=False,
    )


def shape(size: tuple[int, int, int]) -> str:
    return " x ".join(f"{length:,}" for length in size)


if __name__ == "__main__":
    if is_quick(__doc__ or ""):
        small = (4000, 128, 20)
        fits = [case(small, 1 / 0.316, tolerance=1e-6), case(small, 0.1, tolerance=1e-7)]
        compare("probe", [*fits, sweep_case((2000, 64, 10))])
    else:
        large = (50_000, 512, 100)
        fits = [case(large, 1 / 0.316, tolerance=1e-6), case(large, 0.1, tolerance=1e-7, peer_memory=False)]
        compare("probe", [*fits, sweep_case((10_000, 256, 50)), sweep_case(large)])
