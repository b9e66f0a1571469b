"""Rank matching images and texts among all others, both ways, without the whole matrix of similarities in memory.

A similarity is an inner product in float64. Tiles of it come in float32, which says which of two is larger wherever
they differ by more than rounding can make; the few others are multiplied again. So ties are ties, and neither tiles
nor threads nor the library that multiplies change a rank.

Example: images (1, 0) and (0, 1); captions (0.1, 0.9) and (0.9, 0.1) of image 0, caption (0.2, 0.8) of image 1. Image 0
finds its second caption first (0.9 > 0.2 > 0.1): rank 0. Image 1 finds caption 0 first (0.9 > 0.8): rank 1. Caption 0
is nearer to image 1 than to its own: rank 1. So image-to-text R@1 is 1/2, text-to-image R@1 is 2/3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, no_type_check

import numpy as np
import torch
from jaxtyping import Float, Int
from numba import njit
from torch import Tensor

from distilclip.errors import InputError
from distilclip.measures.inputs import Labels, Rows, as_features, as_labels

ROUNDING = 2.0**-24  # the relative error of a float32 operation
TILE_ELEMENTS = 1 << 22  # similarities in memory at once: 16 MiB in float32
STRIP = 128  # entries of a row that are passed over together where none is in doubt


@dataclass(frozen=True, kw_only=True)
class Retrieval:
    """Hold for each image the rank of its best own caption, for each caption the rank of its image; 0 is first."""

    image_to_text: Int[Tensor, " n"]
    text_to_image: Int[Tensor, " m"]

    def image_to_text_recall(self, k: int) -> float:
        """Return the share of images with an own caption among the first k captions."""
        return (self.image_to_text < k).double().mean().item()

    def text_to_image_recall(self, k: int) -> float:
        """Return the share of captions whose image is among the first k images."""
        return (self.text_to_image < k).double().mean().item()


def retrieval(image: Rows, text: Rows, pairs: Labels) -> Retrieval:
    """Rank all captions for each image and all images for each caption, by inner product, tile by tile.

    `pairs[j]` is the image that caption j belongs to; an image may have several captions, and finds its way if any of
    them is among the first k (the protocol of COCO 5k and Flickr30k 1k, five captions each). Equal similarities rank
    by position. Arrays, tensors and lists are taken alike; everything is computed on the CPU. Raises `InputError` for
    widths or lengths that do not fit, embeddings that are not finite, a number that is no image's, and an image without
    a caption.
    """
    images = as_features(image, name="image")
    texts = as_features(text, name="text", dim=images.shape[1])
    owners = as_labels(pairs, name="pairs", num_rows=len(texts), limit=len(images))
    lonely = (torch.bincount(owners, minlength=len(images)) == 0).nonzero()[:, 0]
    if len(lonely):
        raise InputError(f"Image {int(lonely[0])} has no caption in pairs ({len(lonely)} such images); leave them out.")
    image_to_text, text_to_image = retrieval_ranks(images, texts, owners)
    return Retrieval(image_to_text=image_to_text, text_to_image=text_to_image)


def retrieval_ranks(
    image: Float[Tensor, "n dim"],
    text: Float[Tensor, "m dim"],
    image_of_text: Int[Tensor, " m"],
    *,
    tile_elements: int = TILE_ELEMENTS,
) -> tuple[Int[Tensor, " n"], Int[Tensor, " m"]]:
    """Return the rank of each image's best own caption, and of each caption's image; see `retrieval`.

    A rank is the number of candidates strictly ahead, plus the equal ones with a smaller index; 0 is first.
    """
    image, text = (side.float().cpu().contiguous() for side in (image, text))
    owner = image_of_text.cpu().numpy()
    # What every candidate is compared with: the exact similarity of each matching pair.
    own = np.empty(len(text))
    _own_similarities(image.numpy(), text.numpy(), owner, own)
    best = _best_captions(own, owner, len(image))
    # A sum of dim products errs by at most dim roundings of the product of lengths; what is compared is rounded too.
    longest = float(image.norm(dim=1).max()) * float(text.norm(dim=1).max())
    error = 1.01 * (image.shape[1] + 4) * ROUNDING * longest
    truth = _Truth(image.numpy(), text.numpy(), owner, own, best, np.float32(error))
    ranks = np.zeros(len(image), np.int32), np.zeros(len(text), np.int32)
    # Square tiles; each is passed over once for both directions.
    side = max(1, math.isqrt(tile_elements))
    for first_row in range(0, len(image), side):
        rows = image[first_row : first_row + side]
        for first_column in range(0, len(text), side):
            tile = (rows @ text[first_column : first_column + side].T).numpy()
            _count_ahead(tile, first_row, first_column, truth, *ranks)
    image_ranks, text_ranks = (torch.from_numpy(found).long() for found in ranks)
    return image_ranks, text_ranks


class _Truth(NamedTuple):
    """Hold what decides a comparison that a tile leaves in doubt."""

    image: np.ndarray  # [n, dim] float32
    text: np.ndarray  # [m, dim] float32
    owner: np.ndarray  # [m]: the image of each caption
    own: np.ndarray  # [m] float64: the similarity of each caption with its image
    best: np.ndarray  # [n]: the caption that each image is to be found by
    error: np.float32  # how far an entry of a tile, or a similarity as float32, may be from the truth


def _best_captions(
    own: Float[np.ndarray, " m"], owner: Int[np.ndarray, " m"], num_images: int
) -> Int[np.ndarray, " n"]:
    """Return each image's own caption with the largest similarity; of equal ones the first, whose rank is smallest."""
    # Sorted by image, then by falling similarity, then by position: the first of each image is its best.
    order = np.lexsort((np.arange(len(own)), -own, owner))
    return order[np.searchsorted(owner[order], np.arange(num_images))]


@njit(nogil=True, cache=True)
@no_type_check
def _own_similarities(image, text, owner, out):
    """Fill in the similarity of every caption with its own image."""
    for j in range(len(text)):
        out[j] = _similarity(image[owner[j]], text[j])


@njit(nogil=True, cache=True)
@no_type_check
def _count_ahead(tile, first_row, first_column, truth, image_rank, text_rank):
    """Add to every rank the entries of a tile that are ahead of the target.

    Args:
        tile: [a, b] similarities in float32 of the images and the captions from `first_row` and `first_column` on.
        truth: all embeddings and pairs, to decide what the tile leaves in doubt.
        image_rank, text_rank: counts so far, of all images and captions.
    """
    height, width = tile.shape
    image, text, owner, own, best, error = truth
    # The columns' targets, as an interval that surely holds the float32 value of an equal similarity.
    target = own[first_column : first_column + width]
    low, high = (target - error).astype(np.float32), (target + error).astype(np.float32)
    behind_text = text_rank[first_column : first_column + width]
    for a in range(height):
        i = first_row + a
        wanted = own[best[i]]
        row_low, row_high = np.float32(wanted - error), np.float32(wanted + error)
        ahead = np.int32(0)
        for start in range(0, width, STRIP):
            strip = tile[a, start : start + STRIP]
            strip_low, strip_high = low[start : start + STRIP], high[start : start + STRIP]
            strip_rank = behind_text[start : start + STRIP]
            in_doubt = np.int32(0)
            # First pass: count the entries that are ahead for sure, and those too near to tell.
            for b in range(len(strip)):  # without a branch, because that is vectorised
                value = strip[b]
                ahead += np.int32(value > row_high)
                strip_rank[b] += np.int32(value > strip_high[b])
                in_doubt += np.int32((value >= row_low) & (value <= row_high))
                in_doubt += np.int32((value >= strip_low[b]) & (value <= strip_high[b]))
            if not in_doubt:
                continue
            # Second pass, rare: multiply the entries in doubt again, exactly; equal ones go by position.
            for b in range(len(strip)):
                of_row = row_low <= strip[b] <= row_high
                of_column = strip_low[b] <= strip[b] <= strip_high[b]
                if of_row or of_column:
                    j = first_column + start + b
                    exact = _similarity(image[i], text[j])
                    if of_row:
                        ahead += np.int32(exact > wanted or (exact == wanted and j < best[i]))
                    if of_column:
                        strip_rank[b] += np.int32(exact > own[j] or (exact == own[j] and i < owner[j]))
        image_rank[i] += ahead


@njit(nogil=True, cache=True)
@no_type_check
def _similarity(x, y):
    """Return an inner product in float64; four partial sums in a fixed order, so that equal rows give equal numbers."""
    s0 = s1 = s2 = s3 = 0.0
    whole = len(x) // 4 * 4
    for k in range(0, whole, 4):
        s0 += np.float64(x[k]) * np.float64(y[k])
        s1 += np.float64(x[k + 1]) * np.float64(y[k + 1])
        s2 += np.float64(x[k + 2]) * np.float64(y[k + 2])
        s3 += np.float64(x[k + 3]) * np.float64(y[k + 3])
    for k in range(whole, len(x)):
        s0 += np.float64(x[k]) * np.float64(y[k])
    return (s0 + s1) + (s2 + s3)
