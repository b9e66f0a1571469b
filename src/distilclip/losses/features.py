"""Hold what every loss is given: the features of image-text pairs, and which rows of a batch are here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor


@dataclass(frozen=True)
class Features:
    """Embeddings of n image-text pairs as one model sees them.

    `image` and `text` have unit rows. `scale` is exp(log-scale), the factor of the cosine similarities in the model's
    own contrastive loss (1 / temperature). `bias` is what a model of the sigmoid loss adds to them, None for a model of
    the softmax loss.
    """

    image: Float[Tensor, "n dim"]
    text: Float[Tensor, "n dim"]
    scale: Float[Tensor, ""]
    bias: Float[Tensor, ""] | None = None

    @property
    def dim(self) -> int:
        """Width of the shared embedding space."""
        return self.image.shape[1]

    def __len__(self) -> int:
        return len(self.image)

    def take(self, mine: Bool[Tensor, " n"]) -> Features:
        """Return some of the rows."""
        return Features(image=self.image[mine], text=self.text[mine], scale=self.scale, bias=self.bias)


def _same(values: Any, *_: Any) -> Any:
    return values


@dataclass(frozen=True, kw_only=True)
class RankRows:
    """Which n of the m rows of a global batch are on this rank, and how to reach the others.

    Example: four ranks with 8 rows each; rank 2 has `here = slice(16, 24)`, `count = 32`, `weight = 0.25`.
    """

    here: slice
    """the rows of the global batch that are on this rank"""
    count: int
    """number of rows of the global batch"""
    gather: Callable[[Tensor], Tensor] = _same
    """the rows of all ranks from those of this one, differentiable"""
    reduce: Callable[..., Tensor] = _same
    """`reduce(values, "sum" or "max")`: replaces values by their sum or maximum over the ranks; no gradient"""
    _gathered: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    _whole: bool | None = None

    @classmethod
    def alone(cls, num_rows: int) -> RankRows:
        """All rows of a batch on one rank."""
        return cls(here=slice(0, num_rows), count=num_rows)

    @property
    def offset(self) -> int:
        """Number of rows on the ranks before this one."""
        return self.here.start

    @property
    def whole(self) -> bool:
        """Whether the global batch is here: the same on all ranks."""
        return self.here == slice(0, self.count) if self._whole is None else self._whole

    @property
    def weight(self) -> float:
        """What a mean over the rows here counts in the mean over all."""
        return (self.here.stop - self.here.start) / self.count

    def only(self, chosen: Bool[Tensor, " m"]) -> RankRows:
        """Return what is here of the smaller batch of the `chosen` rows, which every rank knows alike; maybe nothing.

        Example: of four ranks with 2 rows each the rows 1, 4, 5 are chosen; rank 2 has `here = slice(1, 3)` of 3.
        """
        mine = chosen[self.here]
        first, num_mine = int(chosen[: self.offset].sum()), int(mine.sum())

        def gather(rows: Tensor) -> Tensor:  # every rank must bring the same number of rows
            spread = rows.new_zeros(len(mine), *rows.shape[1:]).index_copy(0, mine.nonzero()[:, 0], rows)
            return self.gather(spread)[chosen]

        return RankRows(
            here=slice(first, first + num_mine),
            count=int(chosen.sum()),
            gather=gather,
            reduce=self.reduce,
            _whole=self.whole,
        )

    def all(self, rows: Shaped[Tensor, "n ..."]) -> Shaped[Tensor, "m ..."]:
        """Return the rows of all ranks, differentiable. A tensor is sent once, however often it is asked for."""
        if self.whole:
            return rows
        if id(rows) not in self._gathered:
            self._gathered[id(rows)] = rows, self.gather(rows)  # held, so that no other tensor gets this id
        return self._gathered[id(rows)][1]


@dataclass(frozen=True, kw_only=True)
class Part:
    """Some rows of a global batch, m of them, as a batch of their own."""

    chosen: Bool[Tensor, " m"]
    mine: Bool[Tensor, " n"]
    """of the rows here"""
    rows: RankRows
    """of the smaller batch"""

    def __len__(self) -> int:
        return self.rows.count

    @classmethod
    def of(cls, chosen: Bool[Tensor, " m"], rows: RankRows) -> Part:
        """Take the `chosen` rows of the batch that `rows` is of."""
        return cls(chosen=chosen, mine=chosen[rows.here], rows=rows.only(chosen))


@dataclass(frozen=True, kw_only=True)
class Sides:
    """What the rows of a global batch have, where some lack their picture or their caption."""

    image: Part
    """the rows with a picture"""
    text: Part
    """the rows with a caption"""
    pairs: Part
    """the rows with both"""

    @classmethod
    def of(cls, has_image: Bool[Tensor, " n"], has_text: Bool[Tensor, " n"], rows: RankRows) -> Sides:
        """Ask all ranks what their rows have; every rank must call it."""
        image, text = rows.all(torch.stack([has_image, has_text], dim=1).to(torch.uint8)).bool().unbind(dim=1)
        return cls(image=Part.of(image, rows), text=Part.of(text, rows), pairs=Part.of(image & text, rows))
