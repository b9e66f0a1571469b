from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch

from distilclip.errors import InputError
from distilclip.models.clip import create_clip
from distilclip.models.initial import initialise
from tests.models.test_inheritance import clip


def test_weights_of_the_same_architecture_from_folder_and_file(tmp_path: Path) -> None:
    source = clip(1)
    source.save(str(tmp_path / "folder"))
    torch.save(source.model.state_dict(), tmp_path / "weights.pt")
    for place in (tmp_path / "folder", tmp_path / "weights.pt", tmp_path / "folder" / "open_clip_model.safetensors"):
        student = clip(2)
        assert initialise(student, [f"weights:{place}"]) == []
        assert student.digest == source.digest


def test_the_towers_of_two_models_come_together(tmp_path: Path) -> None:
    for seed in (1, 2):
        clip(seed).save(str(tmp_path / str(seed)))
    student = clip(3, vision={"layers": 2})
    fresh = initialise(student, [f"inherit-image:{tmp_path / '1'}", f"inherit-text:{tmp_path / '2'}"])
    assert fresh == ["logit_scale"]
    state = student.model.state_dict()
    for name, seed in (("visual.proj", 1), ("text_projection", 2)):
        assert torch.equal(state[name], clip(seed).model.state_dict()[name])
    assert initialise(clip(3), [f"inherit:{tmp_path / '1'}"]) == []


def timm_student(name: str) -> str:
    vision = {"image_size": 64, "timm_model_name": name, "timm_pool": "avg", "timm_proj": "linear"}
    text = {"context_length": 12, "vocab_size": 200, "width": 16, "heads": 1, "layers": 1}
    return json.dumps({"embed_dim": 16, "vision_cfg": vision, "text_cfg": text})


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_small_clip"])
def test_the_image_tower_from_timm_weights_without_their_classifier(name: str, tmp_path: Path) -> None:
    source = timm.create_model("mobilenetv3_small_100" if name.startswith("mobile") else name, num_classes=1000)
    path = str(tmp_path / "timm.safetensors")
    safetensors.torch.save_file(source.state_dict(), path)
    student = create_clip(timm_student(name), seed=0)
    fresh = initialise(student, [f"timm:{path}"])
    assert not any(name.startswith("visual.trunk.") for name in fresh)
    assert any(name.startswith("visual.head.") for name in fresh)
    pixels = torch.randn(2, 3, 64, 64)
    expected = source.eval().forward_head(source.forward_features(pixels), pre_logits=True)
    assert torch.allclose(student.backbone_features(pixels), expected, atol=1e-5)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    path = str(tmp_path / "timm.safetensors")
    safetensors.torch.save_file({"conv.weight": torch.zeros(2)}, path)
    clip(1, text={"layers": 2}).save(str(tmp_path / "other"))
    for source, message in (
        ("somewhere", r"'somewhere' is no source of weights: write KIND:FROM"),
        ("inherits:x", "Did you mean 'inherit'"),
        ("weights:nowhere.pt", "does not exist"),
        (f"weights:{tmp_path / 'other'}", "do not fit the student"),
        (f"timm:{path}", "is open_clip's own, not timm's"),
    ):
        with pytest.raises(InputError, match=message):
            initialise(clip(2), [source])
    student = create_clip(timm_student("resnet18"), seed=0)
    with pytest.raises(InputError, match="do not fit the image tower"):
        initialise(student, [f"timm:{path}"])
    with pytest.raises(InputError, match="does not exist"):
        initialise(student, ["timm:nowhere.safetensors"])
