from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.nn import functional as F

from distilclip.evaluate import knn_probe
from distilclip.evaluate.knn_probe import knn_predictions
from distilclip.evaluate.per_class import confusion_table, per_class_table
from distilclip.evaluate.scores import Score, few_shot_scores
from distilclip.measures.few_shot import few_shot
from distilclip.sets.classes import Classes
from tests.measures.test_logistic import blobs


def test_knn_equals_the_vote_written_out() -> None:
    x, y = blobs(120, 6, 4)
    train, test = x[:80], x[80:]
    found = knn_predictions(train, y[:80], test, num_neighbours=5, temperature=0.1)
    similarity = F.normalize(test, dim=1) @ F.normalize(train, dim=1).T
    for row in range(40):
        nearest = similarity[row].argsort(descending=True)[:5]
        votes = torch.zeros(4, dtype=torch.float64)
        for place in nearest:
            votes[y[place]] += torch.exp(similarity[row, place].double() / 0.1)
        assert found[row] == votes.argmax()


@pytest.mark.parametrize("tile", [1, 3, 7, 80, 100])
def test_knn_is_the_same_in_any_tiles(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = blobs(120, 6, 4)
    whole = knn_predictions(x[:80], y[:80], x[80:], num_neighbours=5)
    monkeypatch.setattr(knn_probe, "TILE_ROWS", tile)
    assert torch.equal(knn_predictions(x[:80], y[:80], x[80:], num_neighbours=5), whole)


@pytest.mark.parametrize("tile", [1, 2, 100])
def test_equal_votes_go_to_the_smaller_class_in_any_tiles(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knn_probe, "TILE_ROWS", tile)
    train = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    test = torch.tensor([[1.0, 1.0], [1.0, 0.0]])
    # The first sees two of each at the same angle; the second its own two nearest; all five fit in.
    assert knn_predictions(train, torch.tensor([2, 1, 2, 1, 0]), test).tolist() == [1, 2]


def test_a_neighbour_nearer_than_the_others_outvotes_them() -> None:
    train = torch.tensor([[1.0, 0.0], [0.7, 0.7], [0.7, 0.7]])
    test = torch.tensor([[1.0, 0.0]])
    assert knn_predictions(train, torch.tensor([0, 1, 1]), test).tolist() == [0]
    assert knn_predictions(train, torch.tensor([0, 1, 1]), test, temperature=10.0).tolist() == [1]


def test_length_of_features_does_not_matter_to_knn() -> None:
    x, y = blobs(60, 6, 3)
    assert torch.equal(knn_predictions(x[:40], y[:40], x[40:]), knn_predictions(3 * x[:40], y[:40], x[40:] / 7))


def test_few_shot_fits_that_many_images_of_each_class() -> None:
    x, y = blobs(400, 10, 4)
    found = few_shot(x[:300], y[:300], x[300:], y[300:], shots=(1, 16), num_draws=3)
    assert {k: len(probes) for k, probes in found.probes.items()} == {1: 3, 16: 3}
    mean = {k: sum(p.accuracy for p in probes) / 3 for k, probes in found.probes.items()}
    assert mean[16] > mean[1]
    assert len({tuple(p.predictions.tolist()) for p in found.probes[1]}) == 3  # the draws differ


def test_the_interval_of_a_mean_ends_at_a_share_of_one() -> None:
    x, y = blobs(200, 6, 3)
    found = few_shot(x[:100], y[:100], x[100:], y[100:], shots=(2,), num_draws=3)
    varied = tuple(dataclasses.replace(p, accuracy=a) for p, a in zip(found.probes[2], (1.0, 1.0, 0.9), strict=True))
    base = Score(set="a", task="few-shot", metric="", value=None, num_classes=3)
    (score,) = few_shot_scores(dataclasses.replace(found, probes={2: varied}), y[100:], base, metric="top1")
    assert score.value == pytest.approx(2.9 / 3)
    assert score.high == 1.0  # Student's t reaches to 1.11
    assert score.low == pytest.approx(2.9 / 3 - 4.302653 / 30, abs=1e-6)  # deviation 0.1 / sqrt(3), over sqrt(3)


def test_few_shot_is_the_same_for_the_same_seed_and_another_for_another() -> None:
    x, y = blobs(200, 6, 3)
    arguments = (x[:120], y[:120], x[120:], y[120:])
    first, again, other = (few_shot(*arguments, shots=(2,), num_draws=2, seed=seed) for seed in (0, 0, 1))
    for a, b in zip(first.probes[2], again.probes[2], strict=True):
        assert torch.equal(a.weight, b.weight)
    assert not torch.equal(first.probes[2][0].weight, other.probes[2][0].weight)


def test_classes_with_few_images_give_what_they_have() -> None:
    x, y = blobs(30, 6, 3)  # ten of each
    found = few_shot(x, y, x, y, shots=(16,), num_draws=1)
    assert found.probes[16][0].accuracy > 0.8
    with pytest.raises(ValueError, match="single training row"):
        few_shot(x[:3], y[:3], x, y, shots=(1,), num_draws=1)
    assert few_shot(x[:3], y[:3], x, y, shots=(1,), num_draws=1, l2=1.0).probes[1][0].l2 == 1.0


CLASSES = Classes(("a", "b", "c"), ("ant", "bee", "cat"), "here")


def test_per_class_table_and_confusion_by_hand() -> None:
    labels, predictions = torch.tensor([0, 0, 0, 1]), torch.tensor([0, 2, 2, 1])
    assert per_class_table(labels, predictions, CLASSES).splitlines() == [
        "label,name,num_test,top1,most_mistaken_for,times",
        "a,ant,3,0.3333333333333333,cat,2",
        "b,bee,1,1.0,,0",
        "c,cat,0,,,0",
    ]
    assert confusion_table(labels, predictions, CLASSES).splitlines() == [
        "true,predicted,num_test",
        "ant,ant,1",
        "ant,cat,2",
        "bee,bee,1",
    ]
