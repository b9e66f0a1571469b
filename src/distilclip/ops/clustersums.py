"""The cluster loss from sums that can be taken over any part of the classes and joined afterwards.

Three softmaxes run over the same classes, each kept as (maximum, sum of exponentials) per row:

    0  labels        s_l w_j . u_i           student embeddings u
    1  first         w_j . a_i / tau         a: the first argument of KL(first || second)
    2  second        w_j . b_i / tau         b: the second; one of a, b is the student, the other the teacher

With p, x the softmax and logits of the first, q, y of the second:

    KL(p || q) = sum_j p_j (x_j - y_j) - lse(x) + lse(y)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

Direction = Literal["student", "teacher"]
"""Whose softmax comes first in the divergence: KL(student || teacher), as printed, or KL(teacher || student)."""


@dataclass(frozen=True, kw_only=True)
class Softmaxes:
    """Scales of the three softmaxes: `class_scale` (s_l) for labels, 1 / `temperature` for both distributions."""

    class_scale: float = 1.0
    temperature: float = 0.07
    direction: Direction = "student"

    def __post_init__(self) -> None:
        if not (self.class_scale > 0 and self.temperature > 0):
            raise ValueError(
                f"class_scale={self.class_scale}, temperature={self.temperature}: both must be positive numbers."
            )
        if self.direction not in get_args(Direction):
            raise ValueError(f"direction={self.direction!r}: choose 'student' (first, as printed) or 'teacher'.")

    @property
    def student_index(self) -> int:
        """Where the student stands in the pair (first, second)."""
        return 0 if self.direction == "student" else 1

    def ordered(self, student: Tensor, teacher: Tensor) -> Float[Tensor, "2 n dim"]:
        """Both embeddings, stacked as (first, second)."""
        return torch.stack((student, teacher) if self.student_index == 0 else (teacher, student))


@dataclass(frozen=True, kw_only=True)
class PartialSums:
    """What one set of classes adds to the three softmaxes of n rows."""

    maximum: Float[Tensor, "3 n"]
    """Largest logit of each softmax."""
    total: Float[Tensor, "3 n"]
    """sum_j exp(logit_j - maximum)"""
    gap: Float[Tensor, " n"]
    """sum_j exp(x_j - maximum of x) (x_j - y_j), for the first softmax's logits x and the second's y"""
    own: Float[Tensor, " n"]
    """The label softmax's logit of the row's own class; 0 where the class is in another shard."""

    @classmethod
    def of_no_class(cls, num_rows: int, like: Tensor) -> PartialSums:
        """Sums over no class at all: what `combine` starts from."""
        return cls(
            maximum=like.new_full((3, num_rows), -torch.inf),
            total=like.new_zeros(3, num_rows),
            gap=like.new_zeros(num_rows),
            own=like.new_zeros(num_rows),
        )

    @classmethod
    def of_rows(cls, blocks: Sequence[PartialSums]) -> PartialSums:
        """Sums of consecutive blocks of rows as one."""
        return cls(
            maximum=torch.cat([block.maximum for block in blocks], 1),
            total=torch.cat([block.total for block in blocks], 1),
            gap=torch.cat([block.gap for block in blocks]),
            own=torch.cat([block.own for block in blocks]),
        )

    def rows(self, rows: slice) -> PartialSums:
        """Sums of some of the rows."""
        return PartialSums(
            maximum=self.maximum[:, rows], total=self.total[:, rows], gap=self.gap[rows], own=self.own[rows]
        )

    @property
    def log_normaliser(self) -> Float[Tensor, "3 n"]:
        """Log-sum-exp of each softmax."""
        return self.maximum + self.total.log()

    @property
    def mean_gap(self) -> Float[Tensor, " n"]:
        """sum_j p_j (x_j - y_j)"""
        return self.gap / self.total[1]

    def label_loss(self) -> Float[Tensor, " n"]:
        """-log softmax of each row's own class."""
        return self.log_normaliser[0] - self.own

    def divergence(self) -> Float[Tensor, " n"]:
        """KL(first || second) of each row."""
        _, first, second = self.log_normaliser
        return self.mean_gap - first + second

    def raised(self, maximum: Float[Tensor, "3 n"]) -> PartialSums:
        """The same sums relative to a larger maximum: after it, sums of several shards may be added up."""
        factor = torch.exp(self.maximum - maximum)
        return PartialSums(maximum=maximum, total=self.total * factor, gap=self.gap * factor[1], own=self.own)


def combine(parts: Sequence[PartialSums]) -> PartialSums:
    """Sums over the union of the parts' classes."""
    maximum = torch.stack([part.maximum for part in parts]).amax(0)
    raised = [part.raised(maximum) for part in parts]
    return PartialSums(
        maximum=maximum,
        total=torch.stack([part.total for part in raised]).sum(0),
        gap=torch.stack([part.gap for part in raised]).sum(0),
        own=torch.stack([part.own for part in raised]).sum(0),
    )
