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
from jaxtyping import Float, Int
from torch import Tensor

from distilclip.losses._tiling import blocks, no_autocast, scaled_exp

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


_SMALLEST_NORM = 1e-12  # as torch.nn.functional.normalize
_KEPT_ENTRIES = 1 << 22
_BLOCK_ROWS = {"cpu": 128, "cuda": 512}
_TILE_ENTRIES = {"cpu": 1 << 21, "cuda": 1 << 25}


@dataclass(frozen=True, kw_only=True)
class Weights:
    """What one row's label loss and divergence count in the total."""

    label: float
    distribution: float


@dataclass(frozen=True, kw_only=True)
class ClusterGradients:
    """Gradients of the weighted loss with respect to embeddings and centers; None where none is wanted."""

    student: Float[Tensor, "n dim"] | None
    teacher: Float[Tensor, "n dim"] | None
    centers: Float[Tensor, "k dim"] | None

    @classmethod
    def zeros(cls, student: Tensor, teacher: Tensor, centers: Tensor, needed: tuple[bool, ...]) -> ClusterGradients:
        """Buffers to add to, for those of the three inputs that are needed."""
        inputs = (student, teacher, centers)
        return cls(
            **{
                name: torch.zeros_like(tensor) if need else None
                for name, tensor, need in zip(("student", "teacher", "centers"), inputs, needed, strict=True)
            }
        )


class CenterTiles:
    """Centers of one shard, walked in tiles of unit rows against blocks of embeddings; owns the buffers they need.

    With `keep`, the logits of one block against all classes stay until the next block, so that the gradients of that
    block need no second product. On CPUs a block has 128 rows (or what 16 MiB allow, if that is more): the kept logits
    take 1 KiB per class, whatever n is, and a center is read and its gradient touched once per 128 rows.
    """

    def __init__(
        self,
        centers: Float[Tensor, "k dim"],
        softmaxes: Softmaxes,
        *,
        num_rows: int,
        first_class: int = 0,
        tile: tuple[int, int] | None = None,
        keep: bool = False,
    ) -> None:
        k, dim = centers.shape
        self.centers = centers
        self.softmaxes = softmaxes
        self.first_class = first_class
        self.inverse_norm = 1 / torch.linalg.vector_norm(centers, dim=1, keepdim=True).clamp_min_(_SMALLEST_NORM)
        rows, columns = tile or _default_tile(centers, num_rows)
        self.rows = min(rows, num_rows)
        self.columns = list(blocks(k, columns))
        width = min(columns, k)
        self._keep = keep
        self._unit = centers.new_empty(width, dim)
        self._cosines = centers.new_empty(len(self.columns) if keep else 1, 2 * self.rows * width)
        self._scratch = centers.new_empty(2, self.rows * width)

    def sums(self, pair: Float[Tensor, "2 r dim"], labels: Int[Tensor, " r"]) -> PartialSums:
        """Sums of one block of rows over all classes of the shard."""
        sums = PartialSums.of_no_class(len(labels), like=pair)
        for index in range(len(self.columns)):
            cosines = self._multiply(pair, index)
            sums = combine([sums, _tile_sums(cosines, self.softmaxes, self._working(cosines))])
        rows, _, centers = self._own(labels)
        sums.own[rows] = self.softmaxes.class_scale * (pair[self.softmaxes.student_index, rows] * centers).sum(1)
        return sums

    def add_gradients(
        self,
        pair: Float[Tensor, "2 r dim"],
        labels: Int[Tensor, " r"],
        sums: PartialSums,
        weights: Weights,
        gradients: ClusterGradients,
        block: slice,
    ) -> None:
        """Add what the rows `block` give to `gradients`, those of the centers still with respect to unit rows."""
        student_index = self.softmaxes.student_index
        for index, columns in enumerate(self.columns):
            cosines = self._kept(index, len(labels)) if self._keep else self._multiply(pair, index)
            unit = self._unit_rows(columns)
            by_cosine = _tile_gradients(cosines, sums, self.softmaxes, weights, self._working(cosines))
            if gradients.student is not None:
                gradients.student[block].addmm_(by_cosine[student_index], unit)
            if gradients.teacher is not None:
                gradients.teacher[block].addmm_(by_cosine[1 - student_index], unit)
            if gradients.centers is not None:
                gradients.centers[columns].addmm_(by_cosine.flatten(0, 1).T, pair.flatten(0, 1))
        rows, classes, centers = self._own(labels)
        own_weight = weights.label * self.softmaxes.class_scale
        if gradients.student is not None:
            gradients.student[block].index_add_(0, rows, centers, alpha=-own_weight)
        if gradients.centers is not None:
            gradients.centers.index_add_(0, classes, pair[student_index, rows], alpha=-own_weight)

    def through_normalisation(self, gradient: Float[Tensor, "k dim"]) -> None:
        """Turn the gradient with respect to unit rows into that of the centers as they are, in place."""
        for columns in self.columns:
            part, unit = gradient[columns], self._unit_rows(columns)
            part.sub_(torch.linalg.vecdot(part, unit)[:, None] * unit).mul_(self.inverse_norm[columns])

    def _unit_rows(self, columns: slice) -> Tensor:
        centers = self.centers[columns]
        return torch.mul(centers, self.inverse_norm[columns], out=self._unit[: len(centers)])

    def _own(self, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rows whose class is in this shard, that class counted from the shard's first, and its unit center."""
        local = labels - self.first_class
        rows = ((local >= 0) & (local < len(self.centers))).nonzero().squeeze(1)
        local = local[rows]
        return rows, local, self.centers[local] * self.inverse_norm[local]

    def _multiply(self, pair: Tensor, index: int) -> Tensor:
        """Cosines of both embeddings with the centers of tile `index`, [2, r, c]."""
        unit = self._unit_rows(self.columns[index])
        flat = pair.flatten(0, 1)
        out = self._cosines[index if self._keep else 0][: len(flat) * len(unit)].view(len(flat), len(unit))
        return torch.mm(flat, unit.T, out=out).view(2, -1, len(unit))

    def _kept(self, index: int, num_rows: int) -> Tensor:
        """The cosines that `sums` left behind for the block at hand."""
        width = self.columns[index].stop - self.columns[index].start
        return self._cosines[index][: 2 * num_rows * width].view(2, num_rows, width)

    def _working(self, cosines: Tensor) -> Tensor:
        """Two more tiles of memory, as [2, r, c]."""
        return self._scratch[:, : cosines[0].numel()].view_as(cosines)


def partial_sums(
    student: Float[Tensor, "n dim"],
    teacher: Float[Tensor, "n dim"],
    centers: Float[Tensor, "k dim"],
    labels: Int[Tensor, " n"],
    *,
    softmaxes: Softmaxes,
    first_class: int = 0,
    tile: tuple[int, int] | None = None,
) -> PartialSums:
    """Sums over the shard whose row j is class `first_class + j`, for every row; float32 or float64 tensors."""
    with torch.no_grad(), no_autocast(centers):
        tiles = CenterTiles(centers, softmaxes, num_rows=len(labels), first_class=first_class, tile=tile)
        pair = softmaxes.ordered(student, teacher)
        return PartialSums.of_rows(
            [tiles.sums(pair[:, rows], labels[rows]) for rows in blocks(len(labels), tiles.rows)]
        )


def partial_gradients(
    student: Float[Tensor, "n dim"],
    teacher: Float[Tensor, "n dim"],
    centers: Float[Tensor, "k dim"],
    labels: Int[Tensor, " n"],
    sums: PartialSums,
    *,
    weights: Weights,
    softmaxes: Softmaxes,
    first_class: int = 0,
    tile: tuple[int, int] | None = None,
    needed: tuple[bool, bool, bool] = (True, False, True),
) -> ClusterGradients:
    """Gradients, from one shard, of sum_i (weights.label * label loss_i + weights.distribution * divergence_i).

    `sums` are those of all shards combined. The embeddings' gradients of all shards add up to the whole; the centers'
    gradient is the whole one for this shard's centers. `needed` names which of student, teacher, centers are wanted.
    """
    with torch.no_grad(), no_autocast(centers):
        tiles = CenterTiles(centers, softmaxes, num_rows=len(labels), first_class=first_class, tile=tile)
        pair = softmaxes.ordered(student, teacher)
        gradients = ClusterGradients.zeros(student, teacher, centers, needed)
        for rows in blocks(len(labels), tiles.rows):
            tiles.add_gradients(pair[:, rows], labels[rows], sums.rows(rows), weights, gradients, rows)
        if gradients.centers is not None:
            tiles.through_normalisation(gradients.centers)
    return gradients


def _default_tile(centers: Tensor, num_rows: int) -> tuple[int, int]:
    """Rows of a block; columns such that a tile stays in the last-level cache and threads have few barriers to meet."""
    device = centers.device.type if centers.device.type in _BLOCK_ROWS else "cpu"
    rows = min(num_rows, max(_BLOCK_ROWS[device], _KEPT_ENTRIES // (2 * max(len(centers), 1))))
    return rows, max(64, _TILE_ENTRIES[device] // (2 * rows))


def _tile_sums(cosines: Tensor, softmaxes: Softmaxes, working: Tensor) -> PartialSums:
    """Sums of one tile; `cosines` [2, r, c] is left as it is."""
    first, second = cosines
    student = cosines[softmaxes.student_index]
    largest = cosines.amax(2)
    inverse = 1 / softmaxes.temperature
    maximum = torch.cat([softmaxes.class_scale * largest[softmaxes.student_index, None], inverse * largest])
    label_total = scaled_exp(student, softmaxes.class_scale, maximum[0, :, None], out=working[0]).sum(1)
    second_total = scaled_exp(second, inverse, maximum[2, :, None], out=working[0]).sum(1)
    exponentials = scaled_exp(first, inverse, maximum[1, :, None], out=working[0])
    gap = torch.sub(first, second, out=working[1]).mul_(exponentials).sum(1).mul_(inverse)
    total = torch.stack([label_total, exponentials.sum(1), second_total])
    return PartialSums(maximum=maximum, total=total, gap=gap, own=torch.zeros_like(gap))


def _tile_gradients(
    cosines: Tensor, sums: PartialSums, softmaxes: Softmaxes, weights: Weights, working: Tensor
) -> Tensor:
    """Gradient with respect to the cosines of one tile, written over them; the label's own class is not subtracted."""
    first, second = cosines
    label, p = working
    inverse = 1 / softmaxes.temperature
    weight = weights.distribution * inverse
    label_normaliser, first_normaliser, second_normaliser = sums.log_normaliser[:, :, None]
    scaled_exp(cosines[softmaxes.student_index], softmaxes.class_scale, label_normaliser, out=label)
    scaled_exp(first, inverse, first_normaliser, out=p)
    gap = first.sub_(second)
    torch.add(-weight * sums.mean_gap[:, None], gap, alpha=weight * inverse, out=first).mul_(p)
    scaled_exp(second, inverse, second_normaliser, out=second).sub_(p).mul_(weight)
    cosines[softmaxes.student_index].add_(label, alpha=weights.label * softmaxes.class_scale)
    return cosines
