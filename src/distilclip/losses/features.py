"""Hold what every loss is given: the features of image-text pairs, and which rows of a batch are here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Float, Shaped
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
        """Whether the global batch is here."""
        return self.here == slice(0, self.count)

    @property
    def weight(self) -> float:
        """What a mean over the rows here counts in the mean over all."""
        return (self.here.stop - self.here.start) / self.count

    def all(self, rows: Shaped[Tensor, "n ..."]) -> Shaped[Tensor, "m ..."]:
        """Return the rows of all ranks, differentiable. A tensor is sent once, however often it is asked for."""
        if self.whole:
            return rows
        if id(rows) not in self._gathered:
            self._gathered[id(rows)] = rows, self.gather(rows)  # held, so that no other tensor gets this id
        return self._gathered[id(rows)][1]
