from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from tokenizers import normalizers

from distilclip.errors import InputError
from distilclip.export.huggingface import _image_processor, huggingface_config, inexpressible, write_huggingface
from distilclip.export.parity_inputs import CAPTIONS
from distilclip.export.tokenizer_json import build_tokenizer
from distilclip.models.clip import Clip, create_clip
from tests.conftest import TINY_CLIP, picture

transformers = pytest.importorskip("transformers")
UNIT = torch.nn.functional.normalize


def changed(**sections: dict[str, Any]) -> dict[str, Any]:
    """The tiny config with some values replaced."""
    config = copy.deepcopy(TINY_CLIP)
    for section, values in sections.items():
        config[section].update(values)  # type: ignore[attr-defined]
    return config


def random_everywhere(clip: Clip) -> Clip:
    """Biases, norms and the scale start at round numbers, which would hide that they are swapped or lost."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in clip.model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return clip


@pytest.mark.parametrize(
    "config",
    [
        TINY_CLIP,
        {**TINY_CLIP, "quick_gelu": True},
        {**TINY_CLIP, "custom_text": True},
        changed(vision_cfg={"mlp_ratio": 2.0, "norm_kwargs": {"eps": 1e-3}}, text_cfg={"mlp_ratio": 3.0, "heads": 4}),
    ],
    ids=["plain", "quick_gelu", "custom_text", "varied"],
)
def test_transformers_loads_the_folder_and_gives_the_same_embeddings(config: dict[str, Any], tmp_path: Path) -> None:
    clip = random_everywhere(create_clip(json.dumps(config), seed=1))
    assert all(value < 1e-5 for value in write_huggingface(clip, str(tmp_path))["difference"].values())
    model = transformers.CLIPModel.from_pretrained(tmp_path).eval()
    pixels = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    captions = ["a photo of a cat", "Two DOGS, running!", "it's " + "very " * 40 + "long"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    tokens = tokenizer(captions, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        image = UNIT(model.get_image_features(pixel_values=pixels).pooler_output, dim=-1)
        text = UNIT(model.get_text_features(**tokens).pooler_output, dim=-1)
        torch.testing.assert_close(image, clip.encode_image(pixels), atol=1e-5, rtol=0)
        torch.testing.assert_close(text, clip.encode_text(clip.tokenizer(captions)), atol=1e-5, rtol=0)
        logits = model(pixel_values=pixels, **tokens).logits_per_image
        torch.testing.assert_close(logits, clip.scale * image @ text.T, atol=1e-3, rtol=0)


def test_the_tokenizer_reads_captions_as_open_clip_does(tmp_path: Path) -> None:
    clip = create_clip(json.dumps(changed(text_cfg={"context_length": 77})), seed=1)
    write_huggingface(clip, str(tmp_path))
    captions = [*CAPTIONS, "It’s “here”, the dogs’ ‘own’", "Two  DOGS,\n\trunning!"]  # noqa: RUF001
    straight = "it's \"here\", the dogs' 'own'"
    assert torch.equal(clip.tokenizer(captions[-2:-1]), clip.tokenizer([straight]))
    found = transformers.AutoTokenizer.from_pretrained(tmp_path)(captions, truncation=True)["input_ids"]
    assert found == [row[row != 0].tolist() for row in clip.tokenizer(captions)]
    processor = transformers.CLIPProcessor.from_pretrained(tmp_path).tokenizer
    assert processor(captions, truncation=True)["input_ids"] == found
    assert processor.decode(found[0], skip_special_tokens=True).strip() == captions[0]


def test_a_tokenizer_that_reads_otherwise_is_not_written(
    tiny_clip: Clip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = build_tokenizer(tiny_clip)
    written.normalizer = normalizers.Lowercase()
    monkeypatch.setattr("distilclip.export.huggingface.build_tokenizer", lambda clip: written)
    with pytest.raises(InputError, match="in transformers its tokenizer reads \"it's 2024's"):
        write_huggingface(tiny_clip, str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_an_image_processor_that_takes_other_steps_is_not_written(
    tiny_clip: Clip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = {**tiny_clip.preprocess_cfg, "interpolation": "bilinear"}
    monkeypatch.setattr("distilclip.export.huggingface._image_processor", lambda _, make=_image_processor: make(cfg))
    with pytest.raises(InputError, match=r"differs from open_clip by .*pixels"):
        write_huggingface(tiny_clip, str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_the_image_processor_takes_the_same_steps(tiny_clip: Clip, tmp_path: Path) -> None:
    """transformers resizes with torchvision, which rounds otherwise than Pillow, by two levels of 255 at hard edges."""
    found = write_huggingface(tiny_clip, str(tmp_path))
    assert 0 < found["pixels_with_torchvision"] < 2.1 / 255 / min(tiny_clip.preprocess_cfg["std"])
    exact = transformers.AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    pixels = torch.as_tensor(exact(images=[picture(1, (64, 48))], return_tensors="pt")["pixel_values"][0])
    torch.testing.assert_close(pixels, tiny_clip.preprocess(picture(1, (64, 48))), atol=1e-6, rtol=0)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    level = 1 / 255 / min(tiny_clip.preprocess_cfg["std"])
    for image in (picture(0, (96, 64)), picture(1, (64, 48)), picture(2, (32, 96))):
        pixels = processor(images=[image], return_tensors="pt")["pixel_values"][0]
        difference = (pixels - tiny_clip.preprocess(image)).abs()
        assert difference.max() < 2.1 * level
        assert difference.mean() < 0.3 * level


@pytest.mark.parametrize(
    ("size", "patch"),
    [(224, 32), pytest.param(240, 16, marks=pytest.mark.slow), pytest.param(336, 32, marks=pytest.mark.slow)],
)
def test_a_model_of_common_size_is_written_and_prepares_pictures_as_open_clip_does(
    size: int, patch: int, tmp_path: Path
) -> None:
    """The crop begins one pixel earlier in transformers where a picture is 3, 7, 11, ... pixels too long."""
    config = {"vision_cfg": {"image_size": size, "patch_size": patch, "layers": 1}, "text_cfg": {"layers": 1}}
    clip = create_clip(json.dumps({"base": "ViT-B-32", **config}), seed=1)
    found = write_huggingface(clip, str(tmp_path))
    assert found["difference"]["pixels"] < 1e-6
    assert found["pixels_with_torchvision"] < 2.1 / 255 / min(clip.preprocess_cfg["std"])
    assert found["pixels_with_crop_off_by_one"] > 1  # noise: neighbouring pixels have nothing in common
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    for longer in range(size + 1, size + 9):
        noise = noise_picture((longer, size), seed=longer)
        for image in (noise, noise.transpose(Image.Transpose.TRANSPOSE)):
            (pixels,) = processor(images=[image], return_tensors="pt")["pixel_values"]
            equal = bool((pixels - clip.preprocess(image)).abs().max() < 1e-6)
            assert equal == ((longer - size) % 4 != 3)


def noise_picture(size: tuple[int, int], seed: int) -> Image.Image:
    width, height = size
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_an_image_processor_that_cuts_elsewhere_is_not_written(
    tiny_clip: Clip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A crop may be off by one pixel where transformers rounds otherwise, and by no more."""
    cut = transformers.CLIPImageProcessorPil.center_crop
    monkeypatch.setattr(
        transformers.CLIPImageProcessorPil,
        "center_crop",
        lambda self, image, size, **options: cut(self, np.roll(image, 1, axis=-1), size, **options),
    )
    with pytest.raises(InputError, match=r"differs from open_clip by .*pixels"):
        write_huggingface(tiny_clip, str(tmp_path))


def test_a_cnn_of_224_pixels_is_refused_for_its_tower_alone(tmp_path: Path) -> None:
    clip = create_clip(json.dumps(changed(vision_cfg={"image_size": 224, "timm_model_name": "cnn_w8"})), seed=1)
    with pytest.raises(InputError, match=r"its image tower is timm's 'cnn_w8', no CLIP vision transformer\. Export it"):
        write_huggingface(clip, str(tmp_path))


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (changed(vision_cfg={"timm_model_name": "cnn_w8"}), "timm's 'cnn_w8'"),
        (changed(vision_cfg={"layers": [1, 1, 1, 1]}), "ResNet"),
        (changed(vision_cfg={"image_size": [32, 48]}), "no squares: vision_cfg.image_size=[32, 48]"),
        (changed(vision_cfg={"no_ln_pre": True}), "vision_cfg.no_ln_pre=True"),
        (changed(vision_cfg={"ls_init_value": 0.1}), "vision_cfg.ls_init_value=0.1"),
        (changed(text_cfg={"no_causal_mask": True}), "text_cfg.no_causal_mask=True"),
        (changed(text_cfg={"pool_type": "last"}), "text_cfg.pool_type='last'"),
        (changed(text_cfg={"hf_model_name": "roberta-base"}), "'roberta-base'"),
        (changed(text_cfg={"norm_kwargs": {"elementwise_affine": False}}), "text_cfg.norm_kwargs"),
        ({**TINY_CLIP, "init_logit_bias": -10}, "model_cfg.init_logit_bias=-10"),
    ],
)
def test_what_transformers_has_no_word_for_is_named(config: dict[str, Any], reason: str) -> None:
    (found,) = inexpressible(config, {"resize_mode": "shortest"})
    assert reason in found


def test_all_reasons_are_given_at_once(tiny_clip: Clip) -> None:
    config = changed(vision_cfg={"timm_model_name": "cnn_w8"}, text_cfg={"embed_cls": True})
    clip = dataclasses.replace(
        tiny_clip, model_cfg=config, preprocess_cfg={**tiny_clip.preprocess_cfg, "resize_mode": "longest"}
    )
    with pytest.raises(InputError, match=r"timm's 'cnn_w8'.*embed_cls=True.*'longest'.*--what open_clip"):
        huggingface_config(clip)


def test_hub_models_and_other_tokenizers_are_refused(tiny_clip: Clip) -> None:
    with pytest.raises(InputError, match="comes from the hub"):
        huggingface_config(dataclasses.replace(tiny_clip, model_cfg=None))
    tokenizer = open_clip.SimpleTokenizer(context_length=12, clean="canonicalize")
    with pytest.raises(InputError, match="byte-pair"):
        huggingface_config(dataclasses.replace(tiny_clip, tokenizer=tokenizer))


def test_a_model_that_comes_out_otherwise_is_not_written(
    tiny_clip: Clip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distilclip.export.huggingface.TOLERANCE", -1.0)
    with pytest.raises(InputError, match="differs from open_clip"):
        write_huggingface(tiny_clip, str(tmp_path))
    assert not list(tmp_path.iterdir())
