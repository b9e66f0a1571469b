"""What a step says about the training beside its loss: nearness to the teacher, and how hard each term pulls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from distilclip import distributed
from distilclip.losses._tiling import blocks
from distilclip.losses.contrastive import row_block
from distilclip.losses.features import Features
from distilclip.train.terms import Share


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """Of a global batch, the same on every process."""

    agreement: float | None
    """share of pictures for which student and teacher choose the same caption of the batch; None without a teacher"""
    gradient_norms: dict[str, float]
    """by term: norm of the gradient of weight x term with respect to the student's embeddings of the batch"""

    def line(self) -> dict[str, float]:
        """As fields of metrics.jsonl."""
        norms = {f"gradient_norm_{name}": value for name, value in self.gradient_norms.items()}
        return norms if self.agreement is None else {"agreement": self.agreement, **norms}


def diagnose(
    student: Features,
    teacher: Features | None,
    *,
    terms: Mapping[str, Float[Tensor, ""]],
    leaves: Sequence[Tensor],
    share: Share,
) -> Diagnosis:
    """Measure the rows of `share` and reduce. `terms` are weighted and keep their graph down to the `leaves`."""
    squares = []
    for term in terms.values():
        gradients = torch.autograd.grad(term, leaves, retain_graph=True, allow_unused=True)
        squares.append(torch.stack([g.square().sum() for g in gradients if g is not None] or [term * 0]).sum().detach())
    agreed = torch.zeros_like(squares[0])
    if teacher is not None:
        with torch.no_grad():
            agreed = (_choice(student, share) == _choice(teacher, share)).sum().to(agreed) / share.count
    *sums, agreed_share = distributed.reduce_(torch.stack([*squares, agreed])).tolist()
    return Diagnosis(
        agreement=None if teacher is None else round(agreed_share, 6),
        gradient_norms={name: total**0.5 for name, total in zip(terms, sums, strict=True)},
    )


def _choice(features: Features, share: Share) -> Tensor:
    """The nearest caption of the global batch to each picture here, found for some pictures at a time."""
    captions = share.all(features.text)
    rows = blocks(len(features.image), row_block(captions))
    return torch.cat([(features.image[block] @ captions.T).argmax(dim=1) for block in rows])
