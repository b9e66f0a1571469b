"""Weighted k-nearest-neighbour classification of frozen features: a probe with nothing to fit."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from distilclip.ops.metrics import row_tiles

NUM_NEIGHBOURS = 20
TEMPERATURE = 0.07


def knn_predictions(
    train: Float[Tensor, "n dim"],
    train_labels: Int[Tensor, " n"],
    test: Float[Tensor, "m dim"],
    *,
    num_neighbours: int = NUM_NEIGHBOURS,
    temperature: float = TEMPERATURE,
) -> Int[Tensor, " m"]:
    """The class with the most votes among each test row's nearest training rows by cosine.

    A neighbour's vote weighs exp(cosine / temperature), and with fewer training rows than `num_neighbours` all vote
    (Wu et al. 2018, section 3.4; the values are DINO's). Equal votes go to the smaller class number. The m x n matrix
    never exists.
    """
    train, test = F.normalize(train.float(), dim=1), F.normalize(test.float(), dim=1)
    num_classes = int(train_labels.max()) + 1
    predictions = []
    for rows in row_tiles(len(test), len(train)):
        cosine, place = (test[rows] @ train.T).topk(min(num_neighbours, len(train)), dim=1)
        votes = torch.zeros(len(cosine), num_classes, dtype=torch.float64, device=test.device)
        votes.scatter_add_(1, train_labels[place], ((cosine.double() - 1) / temperature).exp())
        predictions.append(votes.argmax(dim=1))
    return torch.cat(predictions)
