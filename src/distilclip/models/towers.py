"""Register small image towers with timm, so that an open_clip model config can name them as `timm_model_name`.

ImageNet networks begin with a stride of four or more: of a picture of 64 pixels little is left to tell shapes apart.
`cnn_w8`, `cnn_w12` and `cnn_w24` keep the full resolution in their first layer.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from timm.models import register_model
from timm.models.mobilenetv3 import MobileNetV3, mobilenetv3_small_100
from torch import Tensor, nn


class SmallCnn(nn.Module):
    """Four blocks of convolution, batch norm, ReLU and 2 x 2 max pooling, then the largest value of each channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        blocks: list[nn.Module] = []
        channels = 3
        for multiple in (1, 2, 4, 6):
            blocks += [
                nn.Conv2d(channels, multiple * width, 3, padding=1, bias=False),
                nn.BatchNorm2d(multiple * width),
                nn.ReLU(),
                nn.MaxPool2d(2),
            ]
            channels = multiple * width
        self.blocks = nn.Sequential(*blocks)
        self.num_features = channels
        self.default_cfg: dict[str, Any] = {"pool_size": None}

    def reset_classifier(self, num_classes: int, global_pool: str = "max") -> None:
        """timm's interface; there is no classifier to remove."""
        if num_classes:
            raise ValueError("SmallCnn is a feature extractor; it has no classifier.")

    def forward(self, pixels: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n width"]:
        """Channel maxima of the last block."""
        return torch.amax(self.blocks(pixels.contiguous(memory_format=torch.channels_last)), dim=(2, 3))


def _build(width: int, pretrained: bool) -> SmallCnn:
    if pretrained:
        raise ValueError("There are no pretrained weights of SmallCnn.")
    return SmallCnn(width)


@register_model
def cnn_w8(pretrained: bool = False, **unused: Any) -> SmallCnn:
    """0.03 M parameters."""
    return _build(8, pretrained)


@register_model
def cnn_w12(pretrained: bool = False, **unused: Any) -> SmallCnn:
    """0.06 M parameters."""
    return _build(12, pretrained)


@register_model
def cnn_w24(pretrained: bool = False, **unused: Any) -> SmallCnn:
    """0.2 M parameters."""
    return _build(24, pretrained)


class ClipMobileNetV3(MobileNetV3):
    """timm's MobileNetV3 whose `num_features`, from which open_clip builds the projection, is what it returns.

    timm names the width before the last convolution there (576), and returns the one after it (1,024).
    """

    def reset_classifier(self, num_classes: int, global_pool: str | None = "avg") -> None:
        """timm's interface, called once by open_clip with `num_classes` 0."""
        super().reset_classifier(num_classes, global_pool)
        self.num_features = self.head_hidden_size  # type: ignore[assignment]  # timm says None, and means an int


@register_model
def mobilenetv3_small_clip(pretrained: bool = False, **options: Any) -> ClipMobileNetV3:
    """mobilenetv3_small_100, its keys unchanged; 1.5 M parameters."""
    tower = mobilenetv3_small_100(pretrained=pretrained, **options)
    tower.__class__ = ClipMobileNetV3  # timm's builder knows no other class
    return tower
