"""Fit and test a linear classifier on frozen features by CLIP's protocol (linear probe).

Example: features -2, -1, 1, 2 of classes 4, 4, 7, 7 give a probe with `classes` [4, 7] whose two logits are equal at 0.
It predicts 4 for -9 and 7 for 9, so on test labels 4 and 7 its accuracy is 1.
"""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from distilclip.errors import InputError
from distilclip.measures.inputs import Labels, Rows, as_features, as_labels
from distilclip.measures.logistic import Block, Logistic, LogisticProblem, fit_logistic
from distilclip.measures.metrics import mean_per_class, row_tiles

FIRST_EXPONENTS = (6.0, 4.0, 2.0, 0.0, -2.0, -4.0, -6.0)  # log10 of l2, strongest first: each fit starts near the last
HALVED_INTERVALS = (1.0, 0.5, 0.25, 0.125)  # decades; two fits each around the best: 15 in all, fewer at an end
SWEEP_TOLERANCE = 1e-5  # enough to rank penalties; the refit has the caller's tolerance
HELD_OUT = 0.2  # share of each class's training rows to choose the penalty on


@dataclass(frozen=True, kw_only=True)
class Probe:
    """Hold a linear classifier on frozen features, and how well it does on the test rows.

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
    train: Rows,
    train_labels: Labels,
    test: Rows,
    test_labels: Labels,
    *,
    l2: float | None = None,
    validation: tuple[Rows, Labels] | None = None,
    seed: int = 0,
    tolerance: float = 1e-7,
) -> Probe:
    """Fit multinomial logistic regression to frozen features and test it once (Radford et al. 2021, appendix A.3).

    Where `l2` is None, the penalty of `measures.logistic`'s objective (scikit-learn's 1 / C) is swept as for CLIP:
    seven points two decades apart from 1e-6 to 1e6, then halving around the best down to eight per decade. It is chosen
    by the accuracy on `validation`, or on a fifth of each class's training rows, drawn with `seed`; equal accuracies
    are decided by the smaller cross-entropy. The last fit has training and validation rows together.

    Arrays, tensors and lists are taken alike. Features are used as they are, neither normalised nor standardised (those
    before a model's projection, which CLIP's protocol takes, have no unit length), on the device of `train`. Two
    classes have a softmax too; scikit-learn's one-vector form at C = 2 / l2 has the same optimum. A test row of a class
    without any training row counts as wrong. Raises `InputError` for shapes that do not fit, features that are not
    finite, labels below 0, a penalty that is not positive, a negative seed, fewer than two classes, or a validation
    label that no training row has.
    """
    _check_numbers(l2=l2, seed=seed, tolerance=tolerance)
    fitted = _examples("train", train, train_labels)
    checked = None if validation is None else _examples("validation", *_as_pair(validation), like=fitted)
    tested = _examples("test", test, test_labels, like=fitted)
    # Columns of the classifier are the classes that occur, whatever their numbers: labels become 0 to k - 1.
    classes = fitted.labels.unique()
    if len(classes) < 2:
        raise InputError(f"A probe needs at least two classes; train_labels hold {len(classes)}.")
    if checked is not None and not torch.isin(checked.labels, classes).all():
        raise InputError("The validation labels have a class that no training row has.")
    blocks = [
        Block(features=block.features, labels=torch.searchsorted(classes, block.labels))
        for block in (fitted, checked)
        if block is not None
    ]
    # Choose the penalty on rows that take no part in the fits of the sweep.
    start, sweep = None, {}
    if l2 is None:
        to_fit, to_check = blocks if checked is not None else hold_out(blocks[0], share=HELD_OUT, seed=seed)
        sweep = _sweep(to_fit, to_check, num_classes=len(classes))
        l2 = max(sweep, key=lambda value: sweep[value].rank)
        start = sweep[l2].fit
    # The last fit has every row, and starts at the sweep's solution for the same penalty.
    fit = fit_logistic(LogisticProblem(blocks, num_classes=len(classes)), l2=l2, start=start, tolerance=tolerance)
    predictions = classes[_logits(fit, tested.features).argmax(dim=1)]
    correct = predictions == tested.labels
    return Probe(
        accuracy=correct.double().mean().item(),
        mean_per_class=mean_per_class(correct, tested.labels),
        l2=l2,
        predictions=predictions,
        weight=fit.weight,
        bias=fit.bias,
        classes=classes,
        sweep=tuple((value, sweep[value].accuracy) for value in sorted(sweep)),
        converged=fit.converged,
    )


def hold_out(block: Block, *, share: float, seed: int) -> tuple[Block, Block]:
    """Return the rows to fit and the rows to check on: of each class a rounded `share`, at least one row left to fit.

    Raises `InputError` where no class has rows enough to hold one out.
    """
    random = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(block.labels), generator=random)
    labels = block.labels.cpu()[order]
    # A stable sort by class of a shuffled order: rows of a class stand together, shuffled.
    by_class = order[labels.argsort(stable=True)]
    counts = torch.bincount(labels)
    counts = counts[counts > 0]
    num_held_out = (counts * share).round().long().clamp(min=1).minimum(counts - 1)
    if num_held_out.sum() == 0:
        raise InputError("Every class has a single training row: give l2 or a validation split.")
    # Of counts (3, 2) the positions within a class are (0, 1, 2, 0, 1); the first few of each class are held out.
    first = torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    position = torch.arange(len(order)) - first
    held = position < torch.repeat_interleave(num_held_out, counts)
    device = block.labels.device
    kept_rows, held_rows = by_class[~held].sort().values.to(device), by_class[held].sort().values.to(device)
    return (
        Block(features=block.features, labels=block.labels, rows=kept_rows),
        Block(features=block.features, labels=block.labels, rows=held_rows),
    )


def _check_numbers(*, l2: float | None, seed: int, tolerance: float) -> None:
    """Raise `InputError` for numbers that a fit cannot have."""
    if l2 is not None and not (isinstance(l2, numbers.Real) and 0 < float(l2) < math.inf):
        raise InputError(f"l2={l2!r}: the penalty must be positive and finite; leave it out to sweep it.")
    if not isinstance(seed, numbers.Integral) or seed < 0:
        raise InputError(f"seed={seed!r}: it must be a whole number of at least 0.")
    if not (isinstance(tolerance, numbers.Real) and 0 < tolerance < 1):
        raise InputError(f"tolerance={tolerance!r}: it must lie between 0 and 1.")


def _as_pair(validation: Any) -> tuple[Rows, Labels]:
    if not isinstance(validation, tuple | list) or len(validation) != 2:
        raise InputError("validation must be a pair, (features, labels).")
    return validation[0], validation[1]


def _examples(name: str, x: Rows, y: Labels, *, like: Block | None = None) -> Block:
    """Check features and labels, and bring them to where `like` is."""
    features = as_features(x, name=name, dim=None if like is None else like.features.shape[1])
    device = (like.features if like is not None else features).device
    labels = as_labels(y, name=f"{name}_labels", num_rows=len(features))
    return Block(features=features.to(device), labels=labels.to(device))


@dataclass(frozen=True)
class _Candidate:
    """Hold a penalty's fit, and how well it does on the rows to check on."""

    fit: Logistic
    accuracy: float
    cross_entropy: float

    @property
    def rank(self) -> tuple[float, float]:
        return self.accuracy, -self.cross_entropy


def _sweep(fitted: Block, checked: Block, *, num_classes: int) -> dict[float, _Candidate]:
    """Search over log10 l2 by halving, as CLIP does."""
    problem = LogisticProblem([fitted], num_classes=num_classes)
    candidates: dict[float, _Candidate] = {}  # by exponent

    def visit(exponent: float) -> None:
        # A neighbouring penalty has a near solution: the fit starts there and needs few iterations.
        nearest = min(candidates, key=lambda e: abs(e - exponent), default=None)
        start = None if nearest is None else candidates[nearest].fit
        fit = fit_logistic(problem, l2=10.0**exponent, start=start, tolerance=SWEEP_TOLERANCE)
        candidates[exponent] = _check_on(checked, fit)

    # Seven points two decades apart, then both neighbours of the best at 1, 1/2, 1/4 and 1/8 of a decade.
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
    # Tile by tile: rows that are named by `rows` are gathered, never all at once.
    for rows in row_tiles(len(block), max(fit.weight.shape)):
        x, labels = block.tile(rows)
        logits = _logits(fit, x)
        hits += int((logits.argmax(dim=1) == labels).sum())
        loss += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
    return _Candidate(fit, hits / len(block), loss / len(block))


def _logits(fit: Logistic, features: Float[Tensor, "n dim"]) -> Float[Tensor, "n k"]:
    return torch.addmm(fit.bias, features.to(fit.weight.dtype), fit.weight)
