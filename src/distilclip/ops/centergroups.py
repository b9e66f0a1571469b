"""Centers in groups of near ones, as the search for the nearest center takes them: tiles of codes of equal width.

How far a whole group has moved bounds how much nearer any of its centers can have come to a row (Ding et al. 2015,
"Yinyang k-means", in inner products). Groups decide how much is computed, never what comes out.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float32, Int
from torch import Tensor

from distilclip.ops.codes import Codes, encode, fastest_code
from distilclip.ops.contraction import principal_directions

WIDTH = 128  # most centers of a tile
SAMPLE = 4096  # centers that a principal direction comes from
ABSENT = np.float32(-1e30)  # the offset of a slot without a center


@dataclass(frozen=True, kw_only=True)
class CenterGroups:
    """Which centers stand in which tile: slot s of tile t holds center `order[t, s]`, or none where it is -1.

    The tiles of group g are those from g * num_tiles / num_groups on.
    """

    order: Int[np.ndarray, "num_tiles width"]
    num_groups: int

    @classmethod
    def of(cls, centers: Float32[np.ndarray, "k dim"], *, near: bool = True) -> CenterGroups:
        """Tiles of equal size by halving along principal directions; in the order given unless `near`.

        Bounds of all groups take at most a quarter of the bytes of the rows in half precision.
        """
        num_tiles = 1 << max(0, int(np.ceil(np.log2(len(centers) / WIDTH))))
        width = -(-len(centers) // num_tiles)
        pieces = np.array_split(np.arange(len(centers)), num_tiles)
        if near:
            pieces = _halve(torch.from_numpy(centers), torch.arange(len(centers)), num_tiles)
        order = np.full((num_tiles, width), -1, np.int64)
        for tile, piece in zip(order, pieces, strict=True):
            tile[: len(piece)] = piece
        most = 1 << int(np.log2(max(1, centers.shape[1] // 4)))
        return cls(order=order, num_groups=min(num_tiles, most))


def _halve(centers: Float32[Tensor, "k dim"], members: Int[Tensor, " m"], count: int) -> list[np.ndarray]:
    """`count` (a power of two) sets of equal size, by halving at the median along the leading principal direction."""
    if count == 1:
        return [members.numpy()]
    here = centers[members]
    sample = here[:: max(1, len(here) // SAMPLE)]
    mean = sample.mean(dim=0)
    along = (here - mean) @ principal_directions(sample - mean, 1)[:, 0]
    order = along.argsort(stable=True)
    half = (len(members) + 1) // 2
    return [
        piece
        for part in (order[:half], order[half:])
        for piece in _halve(centers, members[part].sort().values, count // 2)
    ]


@dataclass(frozen=True, kw_only=True)
class CenterTiles:
    """The centers of one round in their tiles, and how far they moved since the round before."""

    groups: CenterGroups
    centers: Float32[np.ndarray, "k dim"]
    origin: Float32[np.ndarray, " dim"]  # rows and centers are coded as differences from it
    codes: Codes  # of all slots, tile after tile
    offset: Float32[np.ndarray, " slots"]  # x . c = (x - origin) . (c - origin) + offset + x . origin
    moved: Float32[np.ndarray, " slots"] | None  # |c - c before|
    moved_along: Float32[np.ndarray, " slots"] | None  # (c - c before) . origin

    @classmethod
    def of(
        cls,
        centers: Float32[np.ndarray, "k dim"],
        groups: CenterGroups,
        before: Float32[np.ndarray, "k dim"] | None = None,
    ) -> CenterTiles:
        """Code unit centers; `before` are those that the rows' bounds hold for."""
        origin = centers.mean(axis=0, dtype=np.float64).astype(np.float32)
        slots = groups.order.reshape(-1)
        codes = Codes.empty(len(slots), centers.shape[1], fastest_code())
        there = np.maximum(slots, 0)
        encode(centers, np.ones(len(centers)), there, origin, codes)
        offset = (codes.along - origin.astype(np.float64) @ origin.astype(np.float64)).astype(np.float32)
        offset[slots < 0] = ABSENT
        moved = moved_along = None
        if before is not None:
            length, along = _differences(centers, before, origin)
            moved, moved_along = np.where(slots < 0, 0, length[there]), np.where(slots < 0, 0, along[there])
        return cls(
            groups=groups,
            centers=centers,
            origin=origin,
            codes=codes,
            offset=offset,
            moved=moved,
            moved_along=moved_along,
        )

    def drift(self, radius: float) -> Float32[np.ndarray, " num_groups"]:
        """How much larger x . c may be than before, at most, for any c of a group and |x - origin| <= radius."""
        assert self.moved is not None, "the centers before were given"
        assert self.moved_along is not None, "likewise"
        of_slot = self.moved_along + np.float32(radius) * self.moved
        return of_slot.reshape(self.groups.num_groups, -1).max(axis=1)


def _differences(
    centers: Float32[np.ndarray, "k dim"], before: Float32[np.ndarray, "k dim"], origin: Float32[np.ndarray, " dim"]
) -> tuple[Float32[np.ndarray, " k"], Float32[np.ndarray, " k"]]:
    """Lengths of the centers' moves and their inner products with the origin."""
    length, along = np.empty(len(centers), np.float32), np.empty(len(centers), np.float32)
    for start in range(0, len(centers), SAMPLE):
        here = slice(start, start + SAMPLE)
        move = centers[here] - before[here]
        length[here] = np.sqrt(np.einsum("kd,kd->k", move, move)) * np.float32(1 + 1e-3)
        along[here] = move @ origin
    return length, along
