"""Linear probe by CLIP's protocol: logistic regression, its penalty chosen by a sweep on a validation split."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from distilclip.measures.logistic import Block, Logistic, LogisticProblem, fit_logistic
from distilclip.measures.metrics import mean_per_class, row_tiles

FIRST_EXPONENTS = (6.0, 4.0, 2.0, 0.0, -2.0, -4.0, -6.0)  # log10 of l2, strongest first: each fit starts near the last
HALVED_INTERVALS = (1.0, 0.5, 0.25, 0.125)  # decades; two fits each around the best: 15 in all, fewer at an end
SWEEP_TOLERANCE = 1e-5  # enough to rank penalties; the refit has the caller's tolerance


@dataclass(frozen=True, kw_only=True)
class Probe:
    """A linear classifier on frozen features, and how it does on the test rows.

    `classes` are the labels that occur in training, one for each column of `weight`. `sweep` holds (l2, validation
    accuracy) by rising l2, and nothing where l2 was given.
    """

    accuracy: float
    mean_per_class: float
    l2: float
    predictions: Int[Tensor, " n"]
    weight: Float[Tensor, "dim k"]
    bias: Float[Tensor, " k"]
    classes: Int[Tensor, " k"]
    sweep: tuple[tuple[float, float], ...]
    converged: bool


def linear_probe(
    train: Float[Tensor, "n dim"],
    train_labels: Int[Tensor, " n"],
    test: Float[Tensor, "m dim"],
    test_labels: Int[Tensor, " m"],
    *,
    l2: float | None = None,
    validation: tuple[Float[Tensor, "v dim"], Int[Tensor, " v"]] | None = None,
    held_out: float = 0.2,
    refit: Literal["all", "train"] = "all",
    seed: int = 0,
    tolerance: float = 1e-7,
    max_iterations: int = 1000,
) -> Probe:
    """Fit multinomial logistic regression to frozen features and test it once (Radford et al. 2021, appendix A.3).

    Where `l2` is None, the penalty of `ops.logistic`'s objective (scikit-learn's 1 / C) is swept as for CLIP: seven
    points two decades apart from 1e-6 to 1e6, then halving around the best down to eight per decade. It is chosen by
    the accuracy on `validation`, or on a stratified share `held_out` of the training rows drawn with `seed`; equal
    accuracies are decided by the smaller cross-entropy. The last fit has training and validation rows together, or with
    `refit="train"` the training rows alone (where their number is the point, as in few-shot).

    Features are used as they are, neither normalised nor standardised, on the device where they lie. Two classes have a
    softmax too; scikit-learn's one-vector form at C = 2 / l2 has the same optimum. A test row of a class without any
    training row counts as wrong. Raises `ValueError` for shapes that do not fit, features that are not finite, fewer
    than two classes, or a validation label that no training row has.
    """
    parts = {"train": (train, train_labels), "test": (test, test_labels)}
    if validation is not None:
        parts["validation"] = validation
    for name, (x, y) in parts.items():
        _check(name, x, y, dim=train.shape[1])
    classes = train_labels.unique()
    if len(classes) < 2:
        raise ValueError(f"a probe needs at least two classes; the training labels hold {len(classes)}")
    fitted = Block(features=train, labels=torch.searchsorted(classes, train_labels))
    blocks, start, sweep = [fitted], None, {}
    if validation is not None:
        x, y = validation
        if not torch.isin(y, classes).all():
            raise ValueError("the validation split has a class that no training row has")
        blocks.append(Block(features=x, labels=torch.searchsorted(classes, y)))
    if l2 is None:
        fitted, checked = blocks if validation is not None else hold_out(fitted, share=held_out, seed=seed)
        sweep = _sweep(fitted, checked, num_classes=len(classes), max_iterations=max_iterations)
        l2 = max(sweep, key=lambda value: sweep[value].rank)
        start = sweep[l2].fit
    problem = LogisticProblem(blocks if refit == "all" else blocks[:1], num_classes=len(classes))
    fit = fit_logistic(problem, l2=l2, start=start, tolerance=tolerance, max_iterations=max_iterations)
    predictions = classes[_logits(fit, test).argmax(dim=1)]
    correct = predictions == test_labels
    return Probe(
        accuracy=correct.double().mean().item(),
        mean_per_class=mean_per_class(correct, test_labels),
        l2=l2,
        predictions=predictions,
        weight=fit.weight,
        bias=fit.bias,
        classes=classes,
        sweep=tuple((value, sweep[value].accuracy) for value in sorted(sweep)),
        converged=fit.converged,
    )


def hold_out(block: Block, *, share: float, seed: int) -> tuple[Block, Block]:
    """The rows to fit and the rows to check on: of each class a rounded `share`, at least one row left to fit.

    Raises `ValueError` where no class has rows enough to hold one out.
    """
    random = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(block.labels), generator=random)
    labels = block.labels.cpu()[order]
    by_class = order[labels.argsort(stable=True)]  # shuffled within each class
    counts = torch.bincount(labels)
    counts = counts[counts > 0]
    num_held_out = (counts * share).round().long().clamp(min=1).minimum(counts - 1)
    if num_held_out.sum() == 0:
        raise ValueError("every class has a single training row: give l2 or a validation split")
    first = torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    position = torch.arange(len(order)) - first
    held = position < torch.repeat_interleave(num_held_out, counts)
    device = block.labels.device
    kept_rows, held_rows = by_class[~held].sort().values.to(device), by_class[held].sort().values.to(device)
    return (
        Block(features=block.features, labels=block.labels, rows=kept_rows),
        Block(features=block.features, labels=block.labels, rows=held_rows),
    )


@dataclass(frozen=True)
class _Candidate:
    """A penalty's fit and its worth on the rows to check on."""

    fit: Logistic
    accuracy: float
    cross_entropy: float

    @property
    def rank(self) -> tuple[float, float]:
        return self.accuracy, -self.cross_entropy


def _sweep(fitted: Block, checked: Block, *, num_classes: int, max_iterations: int) -> dict[float, _Candidate]:
    """CLIP's binary search over log10 l2."""
    problem = LogisticProblem([fitted], num_classes=num_classes)
    candidates: dict[float, _Candidate] = {}  # by exponent

    def visit(exponent: float) -> None:
        nearest = min(candidates, key=lambda e: abs(e - exponent), default=None)
        fit = fit_logistic(
            problem,
            l2=10.0**exponent,
            start=None if nearest is None else candidates[nearest].fit,
            tolerance=SWEEP_TOLERANCE,
            max_iterations=max_iterations,
        )
        candidates[exponent] = _check_on(checked, fit)

    for exponent in FIRST_EXPONENTS:
        visit(exponent)
    for interval in HALVED_INTERVALS:
        best = max(candidates, key=lambda e: candidates[e].rank)
        for exponent in (best + interval, best - interval):
            if abs(exponent) <= FIRST_EXPONENTS[0]:
                visit(exponent)
    return {10.0**exponent: candidate for exponent, candidate in candidates.items()}


def _check_on(block: Block, fit: Logistic) -> _Candidate:
    hits, loss = 0, 0.0
    for rows in row_tiles(len(block), max(fit.weight.shape)):
        x, labels = block.tile(rows)
        logits = _logits(fit, x)
        hits += int((logits.argmax(dim=1) == labels).sum())
        loss += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
    return _Candidate(fit, hits / len(block), loss / len(block))


def _logits(fit: Logistic, features: Float[Tensor, "n dim"]) -> Float[Tensor, "n k"]:
    return torch.addmm(fit.bias, features.to(fit.weight.dtype), fit.weight)


def _check(name: str, features: Tensor, labels: Tensor, *, dim: int) -> None:
    if len(features) != len(labels) or features.shape[1] != dim or len(labels) == 0:
        raise ValueError(f"{name}: {len(labels)} labels and features {tuple(features.shape)}, expected [n, {dim}]")
    if not all(torch.isfinite(features[rows]).all() for rows in row_tiles(*features.shape)):
        raise ValueError(f"{name} features hold NaN or infinity: the model's outputs are broken")
