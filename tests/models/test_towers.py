from __future__ import annotations

import timm
import torch

from distilclip.models import towers
from distilclip.models.towers import SmallCnn


def test_timm_builds_the_registered_towers() -> None:
    sizes = {name: timm.create_model(name).num_features for name in ("cnn_w8", "cnn_w12", "cnn_w24")}
    assert sizes == {"cnn_w8": 48, "cnn_w12": 72, "cnn_w24": 144}
    assert towers.cnn_w8().num_features == 48


def test_features_are_channel_maxima_and_do_not_move_with_the_picture() -> None:
    torch.manual_seed(0)
    tower = SmallCnn(8).eval()
    pixels = torch.zeros(1, 3, 64, 64)
    pixels[:, :, 16:24, 16:24] = 1
    moved = torch.roll(pixels, (16, 16), dims=(2, 3))  # by the stride of the last block, away from the border
    features = tower(pixels)
    assert features.shape == (1, 48)
    assert torch.allclose(features, tower(moved), atol=1e-6)


def test_first_layer_keeps_the_full_resolution() -> None:
    tower = SmallCnn(8)
    assert tower.blocks[0](torch.zeros(1, 3, 64, 64)).shape[-2:] == (64, 64)
