from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import pytest
import timm.layers
import torch
from torch import nn

from distilclip.errors import InputError
from distilclip.models.batch_norm import (
    RunningStatistics,
    batch_norms,
    fixed_statistics,
    require_exact_accumulation,
    synchronise_batch_norms,
)
from distilclip.models.clip import Clip, create_clip


@pytest.fixture
def cnn(tiny_clip_json: str) -> Clip:
    vision = {"timm_model_name": "cnn_w8", "timm_pool": "max", "timm_proj": "linear", "image_size": 32}
    return create_clip(json.dumps(json.loads(tiny_clip_json) | {"vision_cfg": vision}), seed=0)


def test_students_with_layer_norm_have_none(tiny_clip_json: str) -> None:
    clip = create_clip(tiny_clip_json, seed=0)
    assert batch_norms(clip.model) == {}
    require_exact_accumulation(clip)
    synchronise_batch_norms(clip)


def test_the_first_batch_norm_is_named_where_it_is_in_the_way(cnn: Clip) -> None:
    first = next(iter(batch_norms(cnn.model)))
    with pytest.raises(InputError, match=f"{first}.*Leave out --micro-batch"):
        require_exact_accumulation(cnn)
    with pytest.raises(InputError, match=f"{first}.*on CUDA only"):
        synchronise_batch_norms(cnn)


def test_synchronised_norms_keep_their_activation_and_their_parameters(cnn: Clip) -> None:
    """timm's EfficientNet and MobileNet have the activation inside the norm."""
    model = nn.Sequential(timm.layers.BatchNormAct2d(3), nn.BatchNorm2d(3))
    parameters = list(model.parameters())
    model.logit_scale = SimpleNamespace(device=torch.device("cuda"))  # where the model says that it is
    synchronise_batch_norms(dataclasses.replace(cnn, model=model))
    assert [type(norm).__name__ for norm in model] == ["SyncBatchNormAct", "SyncBatchNorm"]
    assert isinstance(model[0].act, nn.ReLU)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))


def test_running_statistics_stay_fixed_or_are_put_back(cnn: Clip) -> None:
    cnn.model.train()
    pixels = torch.randn(4, 3, 32, 32)
    before = {name: value.clone() for name, value in cnn.model.named_buffers()}
    assert any("running_mean" in name for name in before)
    with fixed_statistics(cnn.model):
        fixed = cnn.encode_image(pixels)
    assert all(torch.equal(value, before[name]) for name, value in cnn.model.named_buffers())
    statistics = RunningStatistics(cnn.model)
    statistics.remember()
    assert torch.equal(cnn.encode_image(pixels), fixed)  # normalised as in training, both times
    assert not all(torch.equal(value, before[name]) for name, value in cnn.model.named_buffers())
    statistics.put_back()
    assert all(torch.equal(value, before[name]) for name, value in cnn.model.named_buffers())
