"""Find the network that a name stands for: open_clip's architectures, CLIP-KD's students, or the user's own config."""

from __future__ import annotations

import copy
import json
from typing import Any

import open_clip

from distilclip import files
from distilclip.errors import InputError, did_you_mean


def _student(vision: dict[str, Any]) -> dict[str, Any]:
    """Return one of CLIP-KD's small students: a text tower of 12 layers, 384 wide, and a shared space of 512."""
    text = {"context_length": 77, "vocab_size": 49408, "width": 384, "heads": 6, "layers": 12}
    return {"embed_dim": 512, "vision_cfg": {"image_size": 224, **vision}, "text_cfg": text}


def _timm(name: str) -> dict[str, Any]:
    return _student({"timm_model_name": name, "timm_pool": "avg", "timm_proj": "linear"})


STUDENTS = {
    "ViT-T-16": _student({"layers": 12, "width": 192, "patch_size": 16}),
    "MobileViT-S": _timm("mobilevit_s"),
    "Swin-T": _timm("swin_tiny_patch4_window7_224"),
    "EfficientNet-B0": _timm("efficientnet_b0"),
    "ResNet-18": _timm("resnet18"),
    "MobileNetV3-S": _timm("mobilenetv3_small_clip"),
}
"""Students of CLIP-KD (Yang et al. 2024) that open_clip has no name for. Their image towers have 5.6, 5.3, 27.9, 4.7,
11.4 and 2.0 million parameters, in this order."""


def architectures() -> list[str]:
    """Return every name that `model_config` knows."""
    return [*STUDENTS, *open_clip.list_models()]


def model_config(architecture: str) -> dict[str, Any]:
    """Return the open_clip model config that `architecture` stands for.

    A name (`architectures()`), a JSON file with an open_clip model config, or that JSON itself. In JSON, `"base": NAME`
    begins with the config of that name, in which the other values replace its own:
    `{"base": "ViT-B-32", "vision_cfg": {"layers": 6}}`.

    Raises:
        InputError: none is found (with near names), or the JSON is incomplete.
    """
    text = architecture.strip()
    if text.endswith(".json"):
        if not files.exists(text):
            raise InputError(f"The model config {text!r} does not exist.")
        text = files.read_bytes(text).decode()
    if text.startswith("{"):
        return _parse_config(text)
    if text in STUDENTS:
        return copy.deepcopy(STUDENTS[text])
    if text not in open_clip.list_models():
        raise InputError(f"{text!r} is no open_clip architecture. {did_you_mean(text, architectures())}")
    return copy.deepcopy(open_clip.get_model_config(text))


def _parse_config(text: str) -> dict[str, Any]:
    try:
        config = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"The model config is not valid JSON: {error}") from error
    if "base" in config:
        config = _merge_configs(model_config(config.pop("base")), config)
    missing = {"embed_dim", "vision_cfg", "text_cfg"} - set(config)
    if missing:
        raise InputError(f"The model config lacks {sorted(missing)}; see open_clip's model_configs for examples.")
    for name in ("vision_cfg", "text_cfg"):
        if not isinstance(config[name], dict):
            raise InputError(f"{name} of the model config is {config[name]!r}; it must be an object of options.")
    if config["text_cfg"].get("tokenizer_kwargs", {}) is None:
        del config["text_cfg"]["tokenizer_kwargs"]  # with null, open_clip could not open the saved model's tokenizer
    return config


def _merge_configs(config: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """Return `config` with `values` in place of its own, tower by tower."""
    merged = {
        name: _merge_configs(config[name], value)
        if isinstance(value, dict) and isinstance(config.get(name), dict)
        else value
        for name, value in values.items()
    }
    return {**config, **merged}
