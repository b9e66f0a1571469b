"""Features before the projection, of every kind of image tower: the projection, by hand, makes them the embedding."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from distilclip.models.clip import Clip, create_clip
from tests.conftest import TINY_CLIP

TRANSFORMER: Any = TINY_CLIP["vision_cfg"]
TEXT: Any = TINY_CLIP["text_cfg"]
COCA = {
    "custom_text": True,
    "vision_cfg": {**TRANSFORMER, "attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True},
    "text_cfg": {**TEXT, "embed_cls": True, "output_tokens": True},
    "multimodal_cfg": {
        "context_length": 12,
        "vocab_size": 49408,
        "width": 16,
        "heads": 2,
        "layers": 1,
        "attn_pooler_heads": 2,
    },
}


def clip_with(**config: Any) -> Clip:
    return create_clip(json.dumps({**TINY_CLIP, **config}), seed=0)


def timm(name: str, proj: str | None, *, pool: str = "avg", side: int = 64) -> Clip:
    vision = {"timm_model_name": name, "timm_pool": pool, "timm_proj": proj, "image_size": side}
    return clip_with(vision_cfg=vision)


def features_and_embedding(clip: Clip) -> tuple[torch.Tensor, torch.Tensor]:
    pixels = torch.randn(3, 3, clip.image_size, clip.image_size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return clip.backbone_features(pixels), clip.encode_image(pixels)


@pytest.mark.parametrize(("name", "pool", "width"), [("test_vit", "token", 64), ("test_resnet", "avg", 96)])
def test_a_classifier_that_serves_as_projection_comes_after_the_features(name: str, pool: str, width: int) -> None:
    clip = timm(name, None, pool=pool, side=160)
    features, embedding = features_and_embedding(clip)
    assert clip.backbone_kind == "backbone"
    assert features.shape == (3, width)
    projected = clip.model.visual.trunk.get_classifier()(features)
    torch.testing.assert_close(F.normalize(projected, dim=1), embedding)


def test_a_projection_after_the_trunk_comes_after_the_features() -> None:
    clip = timm("test_resnet", "linear")
    features, embedding = features_and_embedding(clip)
    assert clip.backbone_kind == "backbone"
    assert features.shape == (3, 96)
    torch.testing.assert_close(F.normalize(clip.model.visual.head(features), dim=1), embedding)


def test_coca_gives_features_before_its_projection() -> None:
    clip = clip_with(**COCA)
    features, embedding = features_and_embedding(clip)
    assert clip.backbone_kind == "backbone"
    torch.testing.assert_close(F.normalize(features @ clip.model.visual.proj, dim=1), embedding)


@pytest.mark.parametrize("vision", [{"layers": [1, 1, 1, 1], "width": 8, "image_size": 32}, "none"])
def test_a_tower_without_a_projection_gives_its_embedding_and_says_so(vision: Any) -> None:
    if vision == "none":  # then the tower is as wide as the shared space
        vision = {"timm_model_name": "test_resnet", "timm_pool": "avg", "timm_proj": "none", "image_size": 64}
        clip = clip_with(vision_cfg=vision, embed_dim=96)
    else:
        clip = clip_with(vision_cfg=vision)
    features, embedding = features_and_embedding(clip)
    assert clip.backbone_kind == "embedding"
    assert not torch.allclose(features.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(F.normalize(features, dim=1), embedding)
