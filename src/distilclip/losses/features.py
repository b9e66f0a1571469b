"""What student, teacher and evaluators share: unit image and text embeddings and their scale."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Features:
    """Embeddings of n image-text pairs as one model sees them.

    `image` and `text` have unit rows; `scale` is exp(log-scale), the factor of the cosine similarities in the model's
    own contrastive loss (1 / temperature); `bias` what a model of the sigmoid loss adds to them, None for one of the
    softmax loss.
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
