from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from distilclip.errors import InputError
from distilclip.measures.logistic import Block
from distilclip.measures.probe import FIRST_EXPONENTS, HALVED_INTERVALS, hold_out, linear_probe
from tests.measures.test_logistic import blobs, objective


@pytest.mark.parametrize("l2", [100.0, 1 / 0.316, 0.1, 0.001])
def test_objective_and_predictions_equal_scikit_learns(l2: float) -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    x, y = blobs(900, 20, 6)
    train, test = x[:600], x[600:]
    probe = linear_probe(train, y[:600], test, y[600:], l2=l2)
    peer = linear_model.LogisticRegression(C=1 / l2, tol=1e-8, max_iter=5000).fit(train.double().numpy(), y[:600])
    theirs = objective(
        torch.from_numpy(peer.coef_.T), torch.from_numpy(peer.intercept_), train.double(), y[:600], l2
    ).item()
    ours = objective(probe.weight.double(), probe.bias.double(), train.double(), y[:600], l2).item()
    assert ours <= theirs * (1 + 1e-5)
    assert (probe.predictions.numpy() == peer.predict(test.double().numpy())).mean() >= 0.995
    assert probe.accuracy == pytest.approx(peer.score(test.double().numpy(), y[600:]), abs=0.004)


def test_two_classes_equal_scikit_learns_at_twice_the_c() -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    x, y = blobs(300, 6, 2)
    probe = linear_probe(x, y, x, y, l2=1.0)
    peer = linear_model.LogisticRegression(C=2.0, tol=1e-8, max_iter=5000).fit(x.double().numpy(), y)
    difference = (probe.weight[:, 1] - probe.weight[:, 0]).double()
    torch.testing.assert_close(difference, torch.from_numpy(peer.coef_[0]), rtol=1e-2, atol=1e-2)


def test_classes_that_a_line_parts_are_told_apart() -> None:
    x = torch.tensor([[-2.0, 0.0], [-1.0, 1.0], [1.0, 0.0], [2.0, 1.0]])
    y = torch.tensor([4, 4, 7, 7])
    probe = linear_probe(x, y, torch.tensor([[-9.0, 0.5], [9.0, 0.5]]), torch.tensor([4, 7]), l2=0.01)
    assert probe.predictions.tolist() == [4, 7]
    assert probe.classes.tolist() == [4, 7]
    assert probe.accuracy == probe.mean_per_class == 1.0


def test_sweep_visits_fifteen_penalties_eight_to_the_decade_around_the_best() -> None:
    x, y = blobs(600, 10, 4)
    probe = linear_probe(x[:400], y[:400], x[400:], y[400:])
    penalties = [l2 for l2, _ in probe.sweep]
    assert len(penalties) == len(FIRST_EXPONENTS) + 2 * len(HALVED_INTERVALS) == 15
    assert penalties == sorted(penalties)
    best = max(accuracy for _, accuracy in probe.sweep)
    assert dict(probe.sweep)[probe.l2] == best
    place = penalties.index(probe.l2)
    assert penalties[place + 1] / probe.l2 == pytest.approx(10 ** (1 / 8), rel=1e-6)


def test_sweep_chooses_on_the_given_validation_split_and_refits_on_both() -> None:
    x, y = blobs(700, 10, 4)
    probe = linear_probe(x[:300], y[:300], x[500:], y[500:], validation=(x[300:500], y[300:500]))
    chosen_alone = linear_probe(x[:300], y[:300], x[300:500], y[300:500], l2=probe.l2)
    assert dict(probe.sweep)[probe.l2] == pytest.approx(chosen_alone.accuracy, abs=0.006)
    together = linear_probe(x[:500], y[:500], x[500:], y[500:], l2=probe.l2)
    torch.testing.assert_close(probe.weight, together.weight, rtol=0.02, atol=0.02)


def test_same_seed_same_probe() -> None:
    x, y = blobs(300, 8, 3)
    first, second = (linear_probe(x[:200], y[:200], x[200:], y[200:], seed=5) for _ in range(2))
    assert torch.equal(first.weight, second.weight)
    assert first.sweep == second.sweep


def test_shift_and_rotation_of_the_features_change_nothing() -> None:
    x, y = blobs(300, 8, 3, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))[0]
    plain = linear_probe(x[:200], y[:200], x[200:], y[200:], l2=0.3, tolerance=1e-12)
    moved = x @ rotation + 3
    turned = linear_probe(moved[:200], y[:200], moved[200:], y[200:], l2=0.3, tolerance=1e-12)
    assert torch.equal(plain.predictions, turned.predictions)
    torch.testing.assert_close(rotation @ turned.weight, plain.weight, rtol=1e-3, atol=1e-4)


def test_a_class_without_training_rows_counts_as_wrong() -> None:
    x, y = blobs(90, 5, 3)
    known = y < 2
    probe = linear_probe(x[known], y[known], x, y, l2=0.01)
    assert set(probe.predictions.tolist()) <= {0, 1}
    assert probe.accuracy <= 2 / 3


def test_hold_out_takes_the_share_of_every_class_and_leaves_one() -> None:
    labels = torch.tensor([0] * 20 + [1] * 10 + [2] * 2 + [3])
    kept, held = hold_out(Block(features=torch.zeros(33, 1), labels=labels), share=0.2, seed=0)
    assert kept.rows is not None
    assert held.rows is not None
    assert torch.bincount(labels[held.rows], minlength=4).tolist() == [4, 2, 1, 0]
    assert torch.cat([kept.rows, held.rows]).sort().values.tolist() == list(range(33))


def test_single_rows_leave_nothing_to_choose_on() -> None:
    x, y = torch.eye(3), torch.arange(3)
    with pytest.raises(InputError, match="give l2 or a validation split"):
        linear_probe(x, y, x, y)
    assert linear_probe(x, y, x, y, l2=0.1).accuracy == 1.0


def test_arrays_tensors_and_lists_give_the_same_probe() -> None:
    x, y = blobs(60, 4, 3)
    parts = x[:40], y[:40], x[40:], y[40:]
    tensors = linear_probe(*parts, validation=(x[40:], y[40:]))
    arrays = linear_probe(*(part.numpy() for part in parts), validation=(x[40:].numpy(), y[40:].numpy()))
    lists = linear_probe(*(part.tolist() for part in parts), validation=(x[40:].tolist(), y[40:].tolist()))
    for found in (arrays, lists):
        assert torch.equal(found.weight, tensors.weight)
        assert found.sweep == tensors.sweep


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": lambda x: x / 0}, "train holds NaN or infinity, first in row 0"),
        ({"test": lambda x: x[0]}, r"test has shape \[4\]"),
        ({"test": lambda x: x[:, :3]}, "test has 3 columns where 4 are needed"),
        ({"train": lambda x: x.long()}, "train has shape .* torch.int64; give floats"),
        ({"train": lambda x: x[:0]}, "train is empty"),
        ({"test_labels": lambda y: y[:11]}, "test_labels has 11 entries for 12 rows"),
        ({"train_labels": lambda y: y.float()}, "train_labels .* give whole numbers"),
        ({"train_labels": lambda y: y[:, None]}, "train_labels has shape"),
        ({"train_labels": lambda y: y - 1}, r"train_labels\[0\] is -1; it must be 0 or more"),
        ({"train_labels": lambda y: y * 0}, "at least two classes; train_labels hold 1"),
        ({"l2": lambda _: 0.0}, "l2=0.0: the penalty must be positive"),
        ({"l2": lambda _: float("nan")}, "l2=nan: the penalty must be positive"),
        ({"validation": lambda _: (torch.zeros(1, 4), [7])}, "a class that no training row has"),
        ({"validation": lambda _: (torch.zeros(1, 3), [1])}, "validation has 3 columns"),
    ],
)
def test_what_is_wrong_with_an_input_is_said(change: dict[str, Callable[[Any], Any]], message: str) -> None:
    x, y = blobs(12, 4, 3)
    values: dict[str, Any] = {"train": x, "train_labels": y, "test": x, "test_labels": y, "l2": 1.0, "validation": None}
    with pytest.raises(InputError, match=message):
        linear_probe(**values | {name: edit(values[name]) for name, edit in change.items()})


def test_numbers_of_the_wrong_kind_are_named() -> None:
    """In a process of its own: here, the types themselves are checked before the function is called."""
    code = """
import numpy as np, distilclip as dc
x, y = np.eye(4, dtype=np.float32), np.array([0, 1, 0, 1])
for change in (
    {"l2": "1"}, {"l2": 1.0, "seed": -1}, {"seed": 2.5}, {"l2": 1.0, "tolerance": float("nan")},
    {"l2": 1.0, "tolerance": -1.0}, {"validation": x}, {"validation": (x, y[:3])},
):
    try:
        dc.linear_probe(x, y, x, y, **change)
    except dc.InputError as error:
        print(error)
    else:
        print("accepted", change)
print(dc.linear_probe(x.tolist(), y.tolist(), x.tolist(), y.tolist(), l2=1e-3).accuracy)
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    expected = ["l2='1'", "seed=-1", "seed=2.5", "tolerance=nan", "tolerance=-1.0", "a pair, (features, labels)"]
    expected += ["validation_labels has 3 entries for 4 rows", "1.0"]
    for part, message in zip(expected, done.stdout.splitlines(), strict=True):
        assert part in message
