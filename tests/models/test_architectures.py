from __future__ import annotations

import json

import open_clip
import pytest
import torch

from distilclip.errors import InputError
from distilclip.models.architectures import STUDENTS, architectures, model_config
from distilclip.models.clip import create_clip

IMAGE_MILLIONS = {  # CLIP-KD, table of networks
    "ViT-T-16": 5.6,
    "MobileViT-S": 5.3,
    "Swin-T": 27.9,
    "EfficientNet-B0": 4.7,
    "ResNet-18": 11.4,
    "MobileNetV3-S": 2.0,
}


def test_every_student_has_its_published_size() -> None:
    assert set(IMAGE_MILLIONS) == set(STUDENTS)


@pytest.mark.parametrize("name", STUDENTS)
def test_a_named_student_embeds_and_has_its_published_size(name: str) -> None:
    shallow = json.dumps({"base": name, "text_cfg": {"layers": 1}})  # the text towers are all the same
    clip = create_clip(shallow, seed=0)
    visual = sum(parameter.numel() for parameter in clip.model.visual.parameters())
    assert visual / 1e6 == pytest.approx(IMAGE_MILLIONS[name], abs=0.06)
    with torch.no_grad():
        assert clip.encode_image(torch.zeros(1, 3, 224, 224)).shape == (1, 512)
    assert clip.context_length == 77


def test_a_name_is_a_base_whose_values_can_be_replaced() -> None:
    base = open_clip.get_model_config("ViT-B-32")
    changed = model_config('{"base": "ViT-B-32", "embed_dim": 64, "vision_cfg": {"layers": 3}}')
    assert changed["vision_cfg"] == {**base["vision_cfg"], "layers": 3}
    assert changed["embed_dim"] == 64
    assert changed["text_cfg"] == base["text_cfg"]
    assert open_clip.get_model_config("ViT-B-32") == base
    assert model_config('{"base": "ViT-T-16", "vision_cfg": {"width": 128}}') != STUDENTS["ViT-T-16"]
    assert STUDENTS["ViT-T-16"]["vision_cfg"]["width"] == 192


@pytest.mark.parametrize(
    ("vision", "message"),
    [
        ({"timm_pool": "map"}, r"attention pooling.*timm_pool 'map'.*timm_pool avg with timm_proj linear"),
        ({"timm_pool": "foo"}, r"(Only avg, avgmax|global_pool in).*timm_pool 'foo'"),
        ({"timm_pool": "abs_attn"}, r"this does not hold: assert feature_ndim == 2"),
        ({"timm_pool": "avg", "timm_proj": "foo"}, "timm_proj 'foo'"),
        ({"timm_pool": "avg", "timm_proj": "none"}, "its image tower is 192 wide, not embed_dim, 16"),
    ],
)
def test_a_timm_tower_that_cannot_be_built_says_what_was_asked_for(
    vision: dict[str, str], message: str, tiny_clip_json: str
) -> None:
    tower = {"timm_model_name": "vit_tiny_patch16_224", "timm_proj": "linear", "image_size": 224, **vision}
    with pytest.raises(InputError, match=message):
        create_clip(json.dumps(json.loads(tiny_clip_json) | {"vision_cfg": tower}), seed=0)


def test_a_timm_tower_without_projection_works_where_it_has_the_width(tiny_clip_json: str) -> None:
    tower = {"timm_model_name": "vit_tiny_patch16_224", "timm_pool": "avg", "timm_proj": "none", "image_size": 224}
    clip = create_clip(json.dumps(json.loads(tiny_clip_json) | {"embed_dim": 192, "vision_cfg": tower}), seed=0)
    assert clip.dim == 192


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"vision_cfg": None}, "vision_cfg of the model config is None"),
        ({"text_cfg": [1]}, r"text_cfg of the model config is \[1\]"),
        ({"text_cfg": {"width": 32, "heads": 3, "layers": 1}}, "embed_dim must be divisible by num_heads"),
    ],
)
def test_a_config_that_is_no_model_is_bad_input(values: dict[str, object], message: str, tiny_clip_json: str) -> None:
    with pytest.raises(InputError, match=message):
        create_clip(json.dumps(json.loads(tiny_clip_json) | values), seed=0)


def test_near_names_are_offered() -> None:
    assert {"ViT-T-16", "ViT-B-32"} <= set(architectures())
    with pytest.raises(InputError, match="Did you mean 'MobileViT-S'"):
        model_config("MobileVit-S")
    with pytest.raises(InputError, match="is no open_clip architecture"):
        model_config('{"base": "Nothing-like-it"}')
