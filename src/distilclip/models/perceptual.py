"""Embed what pictures look like, without any learning, so that copies lie near each other: `embed --model perceptual`.

A picture is made 32 x 32, whatever its shape. Its embedding holds the low frequencies of its luminance (discrete cosine
transform, 15 x 15 and more, all but the mean), and with less weight those of its two colour differences. As photographs
have amplitudes that fall with the frequency, each is multiplied by its frequency: then all count alike (whitening, as
the 1/f spectrum of natural images suggests; Field 1987). The rows have unit length, so brightness and contrast do not
count; resizing, compression and light recolouring change little. A turned, mirrored or cropped picture is another one.

docs/log.md says what it finds among photographs and re-encoded, resized and recoloured copies of them.
"""

from __future__ import annotations

from typing import Any

import open_clip
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

NAME = "perceptual"
SIZE = 32  # pixels on each side
LUMINANCE, COLOUR = 16, 4  # frequencies in each direction
COLOUR_WEIGHT = 0.3  # of a colour difference beside luminance
MEAN_COLOUR = 0.7  # the frequency that counts for the mean of a colour difference
CONTRAST = 1.0 / 255  # of a constant that every row has: pictures of one colour are near each other and have a length

PREPROCESSING = {
    "size": (SIZE, SIZE),
    "mode": "RGB",
    "mean": (0.0, 0.0, 0.0),
    "std": (1.0, 1.0, 1.0),
    "interpolation": "bicubic",
    "resize_mode": "squash",
    "fill_color": 0,
}

# Luminance and colour differences of RGB (ITU-R BT.601).
_TO_LUMINANCE = ((0.299, 0.587, 0.114), (-0.1687, -0.3313, 0.5), (0.5, -0.4187, -0.0813))


class PerceptualTowers(nn.Module):
    """Two towers without parameters: pictures by their low frequencies, and one embedding for all texts."""

    basis: Tensor
    to_luminance: Tensor
    luminance_weights: Tensor
    colour_weights: Tensor

    def __init__(self) -> None:
        super().__init__()
        visual: Any = nn.Module()
        visual.preprocess_cfg, visual.image_size = PREPROCESSING, (SIZE, SIZE)
        self.visual = visual
        self.context_length = open_clip.tokenizer.DEFAULT_CONTEXT_LENGTH
        # One row for each frequency [frequencies, SIZE] of the orthonormal cosine transform (DCT-II).
        frequency, place = torch.arange(LUMINANCE)[:, None], torch.arange(SIZE)[None]
        basis = torch.cos(torch.pi / SIZE * (place + 0.5) * frequency) * (2 / SIZE) ** 0.5
        basis[0] /= 2**0.5
        radius = torch.hypot(*torch.meshgrid(*2 * [torch.arange(LUMINANCE).float()], indexing="ij"))
        colour = COLOUR_WEIGHT * radius[:COLOUR, :COLOUR].clamp(min=MEAN_COLOUR)
        self.register_buffer("basis", basis)
        self.register_buffer("to_luminance", torch.tensor(_TO_LUMINANCE))
        self.register_buffer("luminance_weights", radius)
        self.register_buffer("colour_weights", colour)
        self.register_buffer("logit_scale", torch.zeros(()))

    def encode_image(self, pixels: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n dim"]:
        """Return embeddings of pictures with values from 0 to 1, not normalised."""
        channels = torch.einsum("ac,nchw->nahw", self.to_luminance, pixels)
        frequencies = self.basis @ channels @ self.basis.T  # [n, 3, frequencies, frequencies]
        luminance = (frequencies[:, 0] * self.luminance_weights).flatten(1)[:, 1:]
        colour = (frequencies[:, 1:, :COLOUR, :COLOUR] * self.colour_weights).flatten(1)
        constant = torch.full_like(luminance[:, :1], CONTRAST * SIZE)
        return torch.cat([luminance, colour, constant], dim=1)

    def encode_text(self, tokens: Int[Tensor, "n context"]) -> Float[Tensor, "n dim"]:
        """Return the embedding of a picture of one colour: texts are not looked at."""
        embeddings = torch.zeros(len(tokens), LUMINANCE**2 + 2 * COLOUR**2, device=tokens.device)
        embeddings[:, -1] = 1.0
        return embeddings
