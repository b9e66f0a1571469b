"""Compute the cluster loss from sums over tiles of classes, which may lie on several ranks.

Three softmaxes run over the same classes. Each is kept as (maximum, sum of exponentials) per row, so that the sums of
two sets of classes can be joined:

    0  labels     s_l w_j . u_i        u: student embeddings, w: unit class centers
    1  student    w_j . u_i / tau
    2  teacher    w_j . t_i / tau      t: teacher embeddings

With p, x the softmax and logits of the student, q, y those of the teacher:

    KL(p || q) = sum_j p_j (x_j - y_j) - lse(x) + lse(y)

Example, one row and two classes: x = (2, 0), y = (0, 2). Then p = (0.8808, 0.1192) and both log-sum-exps are 2.1269, so
KL = 0.8808 * 2 - 0.1192 * 2 = 1.5232.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from distilclip.losses._tiling import blocks, no_autocast, scaled_exp

_SMALLEST_NORM = 1e-12  # as torch.nn.functional.normalize
_KEPT_ENTRIES = 1 << 22  # cosines of one block with all classes, while they are few
_BLOCK_ROWS = {"cpu": 128, "cuda": 512}
_TILE_ENTRIES = {"cpu": 1 << 21, "cuda": 1 << 25}  # cosines of one tile, both models' together


@dataclass(frozen=True, kw_only=True)
class Softmaxes:
    """Scales of the three softmaxes: `class_scale` (s_l) for labels, 1 / `temperature` for both distributions."""

    class_scale: float = 1.0
    temperature: float = 0.07

    def __post_init__(self) -> None:
        if not (self.class_scale > 0 and self.temperature > 0):
            raise ValueError(
                f"class_scale={self.class_scale}, temperature={self.temperature}: both must be positive numbers."
            )


@dataclass(frozen=True, kw_only=True)
class ClusterInputs:
    """What the sums are taken of: n rows, and the k classes of one rank; float32 or float64 tensors."""

    student: Float[Tensor, "n dim"]
    teacher: Float[Tensor, "n dim"]
    centers: Float[Tensor, "k dim"]
    """of any length; row j is class `first_class + j`"""
    labels: Int[Tensor, " n"]
    """numbered as the classes of all ranks together"""
    softmaxes: Softmaxes
    first_class: int = 0


class PartialSums(NamedTuple):
    """What one set of classes adds to the three softmaxes of n rows."""

    maximum: Float[Tensor, "3 n"]  # largest logit of each softmax
    total: Float[Tensor, "3 n"]  # sum_j exp(logit_j - maximum)
    gap: Float[Tensor, " n"]  # sum_j exp(x_j - maximum of x) (x_j - y_j), x the student's logits, y the teacher's
    own: Float[Tensor, " n"]  # label softmax's logit of the row's own class; 0 where another rank has that class

    @classmethod
    def of_no_class(cls, num_rows: int, like: Tensor) -> PartialSums:
        """Return the sums over no class at all, which `combine` starts from."""
        zeros = like.new_zeros(5, num_rows)
        return cls(like.new_full((3, num_rows), -torch.inf), zeros[:3], zeros[3], zeros[4])

    @classmethod
    def of_rows(cls, blocks: Sequence[PartialSums]) -> PartialSums:
        """Join the sums of consecutive blocks of rows."""
        return cls(*(torch.cat(values, -1) for values in zip(*blocks, strict=True)))

    def rows(self, rows: slice) -> PartialSums:
        """Return the sums of some of the rows."""
        return PartialSums(*(values[..., rows] for values in self))

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
        """KL(student || teacher) of each row."""
        _, student, teacher = self.log_normaliser
        return self.mean_gap - student + teacher

    def raise_to(self, maximum: Float[Tensor, "3 n"]) -> PartialSums:
        """Return the same sums relative to a larger maximum: after it, sums of several sets may be added up."""
        factor = torch.exp(self.maximum - maximum)  # [3, n]
        return PartialSums(maximum, self.total * factor, self.gap * factor[1], self.own)


def combine(parts: Sequence[PartialSums]) -> PartialSums:
    """Return the sums over the union of the parts' classes."""
    maximum = torch.stack([part.maximum for part in parts]).amax(0)  # [3, n]
    _, *sums = zip(*(part.raise_to(maximum) for part in parts), strict=True)
    return PartialSums(maximum, *(torch.stack(values).sum(0) for values in sums))


@dataclass(frozen=True, kw_only=True)
class RowWeights:
    """What one row's label loss and divergence count in the total."""

    label: float
    distribution: float


class ClusterGradients(NamedTuple):
    """Gradients of the weighted loss with respect to embeddings and centers; None where none is wanted."""

    student: Float[Tensor, "n dim"] | None
    teacher: Float[Tensor, "n dim"] | None
    centers: Float[Tensor, "k dim"] | None

    @classmethod
    def zeros(cls, inputs: ClusterInputs, needed: Sequence[bool]) -> ClusterGradients:
        """Return buffers to add to, for those of student, teacher and centers that are needed."""
        pairs = zip((inputs.student, inputs.teacher, inputs.centers), needed, strict=True)
        return cls(*(torch.zeros_like(tensor) if need else None for tensor, need in pairs))


class CenterTiles:
    """Centers of one rank, walked in tiles of unit rows against blocks of embeddings; owns the buffers they need.

    With `keep`, the logits of one block against all classes stay until the next block, so that the gradients of that
    block need no second product. On CPUs a block has 128 rows (or what 16 MiB allow, if that is more): the kept logits
    take 1 KiB per class, whatever n is, and a center is read and its gradient touched once per 128 rows.
    """

    def __init__(self, inputs: ClusterInputs, *, keep: bool) -> None:
        centers, n = inputs.centers, len(inputs.labels)
        k, dim = centers.shape
        rows, columns = default_tile(centers, n)
        rows, width = min(rows, n), min(columns, k)
        self.rows = list(blocks(n, rows))
        self._columns = list(blocks(k, columns))
        self._inputs, self._keep = inputs, keep
        self._pair = torch.stack((inputs.student, inputs.teacher))  # [2, n, dim]
        norm = torch.linalg.vector_norm(centers, dim=1, keepdim=True)  # [k, 1]
        self._inverse_norm = 1 / norm.clamp_min_(_SMALLEST_NORM)
        # Buffers: a tile of unit centers; the cosines of one tile, or of all tiles of a block; two tiles to work in.
        self._unit = centers.new_empty(width, dim)
        self._cosines = centers.new_empty(len(self._columns) if keep else 1, 2 * rows * width)
        self._scratch = centers.new_empty(2, rows * width)

    def sums(self, rows: slice) -> PartialSums:
        """Return the sums of one block of rows over all classes of the rank."""
        pair, scale = self._pair[:, rows], self._inputs.softmaxes.class_scale
        sums = PartialSums.of_no_class(pair.shape[1], like=pair)
        for index in range(len(self._columns)):
            # One tile [2, r, c] after the other: its cosines, its sums, joined with those so far.
            cosines = self._multiply(pair, index)
            sums = combine([sums, _tile_sums(cosines, self._inputs.softmaxes, self._working(cosines))])
        # The logit of the row's own class, where this rank has it.
        here, _, centers = self._own(rows)
        sums.own[here] = scale * (pair[0, here] * centers).sum(1)
        return sums

    def add_gradients(self, rows: slice, sums: PartialSums, weights: RowWeights, gradients: ClusterGradients) -> None:
        """Add what one block of rows gives to `gradients`; those of the centers are with respect to unit rows yet."""
        pair, softmaxes = self._pair[:, rows], self._inputs.softmaxes
        for index, columns in enumerate(self._columns):
            # Cosines of the tile [2, r, c], replaced by the loss's gradient with respect to them.
            cosines = self._kept(pair, index) if self._keep else self._multiply(pair, index)
            unit = self._unit_rows(columns)
            by_cosine = _tile_gradients(cosines, sums, softmaxes, weights, self._working(cosines))
            if gradients.student is not None:
                gradients.student[rows].addmm_(by_cosine[0], unit)
            if gradients.teacher is not None:
                gradients.teacher[rows].addmm_(by_cosine[1], unit)
            if gradients.centers is not None:  # from both models' rows at once: [c, 2 r] @ [2 r, dim]
                gradients.centers[columns].addmm_(by_cosine.flatten(0, 1).T, pair.flatten(0, 1))
        # The label's own class: the -1 in the gradient (softmax - 1) of a cross-entropy.
        here, classes, centers = self._own(rows)
        own_weight = weights.label * softmaxes.class_scale
        if gradients.student is not None:
            gradients.student[rows].index_add_(0, here, centers, alpha=-own_weight)
        if gradients.centers is not None:
            gradients.centers.index_add_(0, classes, pair[0, here], alpha=-own_weight)

    def through_normalisation(self, gradient: Float[Tensor, "k dim"]) -> None:
        """Turn the gradient with respect to unit rows into that of the centers as they are, in place.

        For w = c / |c| it is (g - (g . w) w) / |c|: only the part of g across the center can change w.
        """
        for columns in self._columns:
            part, unit = gradient[columns], self._unit_rows(columns)
            part.sub_(torch.linalg.vecdot(part, unit)[:, None] * unit).mul_(self._inverse_norm[columns])

    def _unit_rows(self, columns: slice) -> Tensor:
        centers = self._inputs.centers[columns]
        return torch.mul(centers, self._inverse_norm[columns], out=self._unit[: len(centers)])

    def _own(self, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Rows of the block whose class is here, that class counted from this rank's first, and its unit center."""
        local = self._inputs.labels[rows] - self._inputs.first_class  # below 0 or past the end: another rank's
        here = ((local >= 0) & (local < len(self._inputs.centers))).nonzero().squeeze(1)
        local = local[here]
        return here, local, self._inputs.centers[local] * self._inverse_norm[local]

    def _multiply(self, pair: Tensor, index: int) -> Tensor:
        """Cosines of both embeddings with the centers of tile `index`, [2, r, c]."""
        unit = self._unit_rows(self._columns[index])
        flat = pair.flatten(0, 1)  # [2 r, dim]: one product for student and teacher
        out = self._cosines[index if self._keep else 0][: len(flat) * len(unit)].view(len(flat), len(unit))
        return torch.mm(flat, unit.T, out=out).view(2, -1, len(unit))

    def _kept(self, pair: Tensor, index: int) -> Tensor:
        """The cosines that `sums` left behind for the block at hand."""
        width = self._columns[index].stop - self._columns[index].start
        return self._cosines[index][: 2 * pair.shape[1] * width].view(2, -1, width)

    def _working(self, cosines: Tensor) -> Tensor:
        """Two more tiles of memory, as [2, r, c]."""
        return self._scratch[:, : cosines[0].numel()].view_as(cosines)


def partial_sums(inputs: ClusterInputs) -> PartialSums:
    """Return the sums of every row over the classes of one rank."""
    with torch.no_grad(), no_autocast(inputs.centers):
        tiles = CenterTiles(inputs, keep=False)
        return PartialSums.of_rows([tiles.sums(rows) for rows in tiles.rows])


def partial_gradients(
    inputs: ClusterInputs, weights: RowWeights, needed: Sequence[bool], sums: PartialSums | None = None
) -> tuple[PartialSums, ClusterGradients]:
    """Return the gradients of sum_i (weights.label * label loss_i + weights.distribution * divergence_i), and sums.

    `needed` says which of student, teacher and centers get a gradient. `sums` are those of the classes of all ranks
    (None: all classes are here, and each block's sums are found on the way). The embeddings' gradients of all ranks add
    up to the whole; the centers' gradient is the whole one for this rank's centers.
    """
    with torch.no_grad(), no_autocast(inputs.centers):
        tiles = CenterTiles(inputs, keep=sums is None)
        gradients = ClusterGradients.zeros(inputs, needed)
        found = []
        # A block's own softmaxes must be complete before its gradients can be found.
        for rows in tiles.rows:
            found.append(tiles.sums(rows) if sums is None else sums.rows(rows))
            tiles.add_gradients(rows, found[-1], weights, gradients)
        if gradients.centers is not None:
            tiles.through_normalisation(gradients.centers)
        return PartialSums.of_rows(found), gradients


def default_tile(centers: Tensor, num_rows: int) -> tuple[int, int]:
    """Rows of a block; columns such that a tile stays in the last-level cache and threads have few barriers to meet."""
    device = centers.device.type if centers.device.type in _BLOCK_ROWS else "cpu"
    rows = min(num_rows, max(_BLOCK_ROWS[device], _KEPT_ENTRIES // (2 * max(len(centers), 1))))
    return rows, max(64, _TILE_ENTRIES[device] // (2 * rows))


def _tile_sums(cosines: Tensor, softmaxes: Softmaxes, working: Tensor) -> PartialSums:
    """Sums of one tile; `cosines` [2, r, c] is left as it is."""
    student, teacher = cosines
    inverse = 1 / softmaxes.temperature
    # Largest logit of each softmax: scales are positive, so the largest cosines tell.
    largest = cosines.amax(2)  # [2, r]
    maximum = torch.cat([softmaxes.class_scale * largest[:1], inverse * largest])  # [3, r]
    # Sums of exponentials, one softmax after the other in the same memory.
    label_total = scaled_exp(student, softmaxes.class_scale, maximum[0, :, None], out=working[0]).sum(1)
    teacher_total = scaled_exp(teacher, inverse, maximum[2, :, None], out=working[0]).sum(1)
    exponentials = scaled_exp(student, inverse, maximum[1, :, None], out=working[0])
    # sum_j exp(x_j - max) (x_j - y_j), while the student's exponentials are at hand.
    gap = torch.sub(student, teacher, out=working[1]).mul_(exponentials).sum(1).mul_(inverse)
    total = torch.stack([label_total, exponentials.sum(1), teacher_total])
    return PartialSums(maximum, total, gap, torch.zeros_like(gap))


def _tile_gradients(
    cosines: Tensor, sums: PartialSums, softmaxes: Softmaxes, weights: RowWeights, working: Tensor
) -> Tensor:
    """Gradient with respect to the cosines of one tile, written over them; the label's own class is not subtracted."""
    student, teacher = cosines
    label, p = working
    inverse = 1 / softmaxes.temperature
    weight = weights.distribution * inverse
    label_normaliser, student_normaliser, teacher_normaliser = sums.log_normaliser[:, :, None]  # [r, 1] each
    # The label softmax and the student's distribution p.
    scaled_exp(student, softmaxes.class_scale, label_normaliser, out=label)
    scaled_exp(student, inverse, student_normaliser, out=p)
    # d KL / dx_j = p_j (x_j - y_j - sum_i p_i (x_i - y_i))
    gap = student.sub_(teacher)
    torch.add(-weight * sums.mean_gap[:, None], gap, alpha=weight * inverse, out=student).mul_(p)
    # d KL / dy_j = q_j - p_j
    scaled_exp(teacher, inverse, teacher_normaliser, out=teacher).sub_(p).mul_(weight)
    student.add_(label, alpha=weights.label * softmaxes.class_scale)
    return cosines
