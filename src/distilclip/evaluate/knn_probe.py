"""Weighted k-nearest-neighbour classification of frozen features: a probe with nothing to fit."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

NUM_NEIGHBOURS = 20
TEMPERATURE = 0.07
TILE_ROWS = 2048  # of either side: test rows stay while all training rows pass by


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
    for queries in test.split(TILE_ROWS):
        cosine, place = _nearest(queries, train, num_neighbours)
        votes = torch.zeros(len(queries), num_classes, dtype=torch.float64, device=test.device)
        votes.scatter_add_(1, train_labels[place], ((cosine.double() - 1) / temperature).exp())
        predictions.append(votes.argmax(dim=1))
    return torch.cat(predictions)


def _nearest(
    queries: Float[Tensor, "q dim"], train: Float[Tensor, "n dim"], num_neighbours: int
) -> tuple[Float[Tensor, "q k"], Int[Tensor, "q k"]]:
    """Inner products with each query's nearest training rows, and their places."""
    product, place = queries.new_empty(len(queries), 0), queries.new_empty(len(queries), 0, dtype=torch.long)
    for number, rows in enumerate(train.split(TILE_ROWS)):
        found, column = (queries @ rows.T).topk(min(num_neighbours, len(rows)), dim=1)
        product = torch.cat([product, found], dim=1)
        place = torch.cat([place, column + number * TILE_ROWS], dim=1)
        product, order = product.topk(min(num_neighbours, product.shape[1]), dim=1)
        place = place.gather(1, order)
    return product, place
