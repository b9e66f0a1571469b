"""Few-shot linear probe: a handful of training images of each class, drawn several times."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from distilclip.measures.probe import Probe, linear_probe

SHOTS = (1, 2, 4, 8, 16)
NUM_DRAWS = 5
MAX_VALIDATION = 4  # images of each class to choose the penalty on


@dataclass(frozen=True, kw_only=True)
class FewShot:
    """The probes of every draw, by the number of images of each class that they were fitted to."""

    probes: dict[int, tuple[Probe, ...]]


def few_shot(
    train: Float[Tensor, "n dim"],
    train_labels: Int[Tensor, " n"],
    test: Float[Tensor, "m dim"],
    test_labels: Int[Tensor, " m"],
    *,
    shots: Sequence[int] = SHOTS,
    num_draws: int = NUM_DRAWS,
    l2: float | None = None,
    seed: int = 0,
) -> FewShot:
    """Fit the linear probe to `k` images of each class, for every k of `shots` and `num_draws` times each.

    The penalty is swept as for the linear probe, on min(k, 4) further images of each class (Zhou et al. 2022, CoOp),
    which take no part in the last fit. A class with too few images gives what it has, keeping one to choose the penalty
    on if it has two. Draws are nested: those of fewer shots are part of those of more. Raises `ValueError` as
    `linear_probe`, so for l2 None and one image a class.
    """
    probes: dict[int, list[Probe]] = {k: [] for k in shots}
    for draw in range(num_draws):
        rank, count = _rank_within_class(train_labels, seed=seed * num_draws + draw)
        for k in shots:
            taken = (count - 1).clamp(min=1, max=k)
            fitted = rank < taken
            checked = (rank >= taken) & (rank < taken + min(k, MAX_VALIDATION))
            probe = linear_probe(
                train[fitted],
                train_labels[fitted],
                test,
                test_labels,
                l2=l2,
                validation=(train[checked], train_labels[checked]) if l2 is None and checked.any() else None,
                refit="train",
                seed=seed,
            )
            probes[k].append(probe)
    return FewShot(probes={k: tuple(found) for k, found in probes.items()})


def _rank_within_class(labels: Int[Tensor, " n"], *, seed: int) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"]]:
    """Each row's place in a random order of its class, and the size of that class."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).to(labels.device)
    by_class = order[labels[order].argsort(stable=True)]
    counts = torch.bincount(labels)
    first = counts.cumsum(0) - counts
    rank = torch.empty_like(labels)
    rank[by_class] = torch.arange(len(labels), device=labels.device) - first[labels[by_class]]
    return rank, counts[labels]
