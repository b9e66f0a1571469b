"""Image-text retrieval: recall at k both ways, over all captions."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

from distilclip.ops.retrieval import retrieval_ranks


@dataclass(frozen=True, kw_only=True)
class Retrieval:
    """For each image the rank of its best own caption, for each caption the rank of its image; 0 is first."""

    image_to_text: Int[Tensor, " n"]
    text_to_image: Int[Tensor, " m"]

    def image_to_text_recall(self, k: int) -> float:
        """Share of images with an own caption among the first k captions."""
        return (self.image_to_text < k).double().mean().item()

    def text_to_image_recall(self, k: int) -> float:
        """Share of captions whose image is among the first k images."""
        return (self.text_to_image < k).double().mean().item()


def retrieval(image: Float[Tensor, "n dim"], text: Float[Tensor, "m dim"], pairs: Int[Tensor, " m"]) -> Retrieval:
    """Rank all captions for each image and all images for each caption, by inner product, tile by tile.

    `pairs[j]` is the image that caption j belongs to; an image may have several captions, and finds its way if any of
    them is among the first k (the protocol of COCO 5k and Flickr30k 1k, five captions each). Equal similarities rank
    by position. Raises `ValueError` for an image without a caption and for embeddings that are not finite.
    """
    image_to_text, text_to_image = retrieval_ranks(image, text, pairs)
    return Retrieval(image_to_text=image_to_text, text_to_image=text_to_image)
