from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from packaging.version import Version

from distilclip.errors import InputError
from distilclip.export.timm_folder import write_timm
from distilclip.models.clip import Clip, create_clip
from tests.conftest import TINY_CLIP, picture
from tests.export.test_huggingface import changed, random_everywhere

UNIT = torch.nn.functional.normalize


def with_trunk(name: str, **vision: Any) -> dict[str, Any]:
    """The tiny text tower beside a tower of timm."""
    config: dict[str, Any] = copy.deepcopy(TINY_CLIP)
    config["vision_cfg"] = {"timm_model_name": name, "image_size": 64, **vision}
    return config


@pytest.mark.parametrize(
    "config",
    [
        TINY_CLIP,
        {**TINY_CLIP, "quick_gelu": True},
        changed(vision_cfg={"mlp_ratio": 2.0, "patch_size": 8, "layers": 3}),
        with_trunk("resnet18", timm_pool="avg", timm_proj="linear"),
        with_trunk("mobilenetv3_small_clip", timm_pool="avg", timm_proj="linear", timm_proj_bias=True),
        with_trunk("vit_tiny_patch16_224", timm_pool="avg", timm_proj="linear", image_size=224),
        with_trunk("vit_tiny_patch16_224", timm_pool="", timm_proj="linear", image_size=224),
        with_trunk("resnet18", timm_pool="avg", timm_proj=""),
    ],
    ids=["plain", "quick_gelu", "varied", "resnet", "mobilenet", "timm-vit", "timm-vit-token", "own-classifier"],
)
def test_timm_loads_the_folder_and_gives_the_same_embeddings(config: dict[str, Any], tmp_path: Path) -> None:
    clip = random_everywhere(create_clip(json.dumps(config), seed=1))
    found = write_timm(clip, str(tmp_path))
    assert all(value < 1e-5 for value in found["difference"].values())
    model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    images = [picture(seed, (96, 64)) for seed in range(3)]
    with torch.no_grad():
        theirs = UNIT(model(torch.stack([transform(image) for image in images])), dim=-1)
        own = clip.encode_image(torch.stack([clip.preprocess(image) for image in images]))
    torch.testing.assert_close(theirs, own, atol=1e-5, rtol=0)
    assert found["width"] == model.num_features


@pytest.mark.skipif(Version(timm.__version__) < Version("1.0.31"), reason="older timm loads no local folder so")
def test_without_classes_timm_gives_the_features_before_the_projection(tmp_path: Path) -> None:
    clip = random_everywhere(create_clip(json.dumps(with_trunk("resnet18", timm_pool="avg", timm_proj="linear"))))
    write_timm(clip, str(tmp_path))
    model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=0).eval()
    pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(model(pixels), clip.backbone_features(pixels), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (with_trunk("cnn_w8"), "distilclip's own cnn_w8"),
        (with_trunk("resnet18", timm_pool="avg", timm_proj="mlp"), r"after the trunk come \['mlp'\]"),
        (changed(vision_cfg={"layers": [1, 1, 1, 1], "width": 64}), "CLIP's ResNet"),
        (changed(vision_cfg={"ls_init_value": 0.1}), "differs from CLIP's"),
        (changed(vision_cfg={"no_ln_pre": True}), "differs from CLIP's"),
        (changed(vision_cfg={"pool_type": "avg"}), "it differs from open_clip by"),
    ],
)
def test_what_timm_cannot_express_is_refused(config: dict[str, Any], reason: str, tmp_path: Path) -> None:
    clip = random_everywhere(create_clip(json.dumps(config), seed=1))
    with pytest.raises(InputError, match=rf"cannot be a timm model: .*{reason}.*--what open_clip"):
        write_timm(clip, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_model_of_the_hub_is_refused(tiny_clip: Clip, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="comes from the hub"):
        write_timm(dataclasses.replace(tiny_clip, model_cfg=None), str(tmp_path))
