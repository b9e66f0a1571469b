"""What `--models` and `--weights` name, and how it is opened."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

import torch
from PIL import Image

from distilclip.data import files
from distilclip.errors import InputError, did_you_mean
from distilclip.evaluate.cache import FeatureCache
from distilclip.evaluate.embedders import Embedder, ModelEmbedder
from distilclip.evaluate.encode import Encoding
from distilclip.evaluate.stored import StoreEmbedder
from distilclip.models.clip import Clip, load_clip

ONNX_RECORD = "clip.json"
"""The file that makes a folder an exported ONNX model (`export.runtime.RECORD`; that module needs ONNX Runtime)."""


def open_embedder(
    spec: str, *, name: str, weights: str | None, device: torch.device, encoding: Encoding, cache: FeatureCache
) -> Embedder:
    """A finished store, or whatever `load_clip` opens, under the name that the table shows.

    Raises `InputError` for a model that cannot be loaded, and for one whose towers differ in width.
    """
    if files.exists(files.join(spec, "manifest.parquet")):
        return StoreEmbedder(spec, name=name)
    clip = load_clip(spec, weights=weights, device=device)
    check_widths(clip)
    return ModelEmbedder(dataclasses.replace(clip, name=name), encoding, cache)


def check_widths(clip: Clip) -> None:
    """Raise `InputError` for a model whose images and texts have no space in common; one black image is encoded."""
    with torch.no_grad():
        black = clip.preprocess(Image.new("RGB", (clip.image_size, clip.image_size)))[None].to(clip.device)
        image_dim = int(clip.encode_image(black).shape[1])
    if image_dim != clip.dim:
        raise InputError(
            f"{clip.name}: its image embeddings have {image_dim} dimensions, its text embeddings {clip.dim}; they need "
            "the same. Project the image tower to embed_dim (timm_proj in the vision_cfg of its architecture)."
        )


def split_model(spec: str) -> tuple[str, str]:
    """Name and model of `[NAME=]MODEL`; the name is else the last part of the model's path or id."""
    match = re.fullmatch(r"([\w.+-]+)=(.+)", spec)
    if match:
        return match[1], match[2]
    return re.split(r"[/:]", spec.rstrip("/"))[-1], spec


def weights_by_name(weights: Sequence[str], names: Sequence[str]) -> dict[str, str]:
    """Weights files by model; a bare file is the only model's. Raises `InputError` for a name that no model has."""
    found = {}
    for value in weights:
        match = re.fullmatch(r"([\w.+-]+)=(.+)", value)
        if match is None and len(names) > 1:
            raise InputError(f"--weights {value!r} does not say whose weights it holds: write NAME={value}.")
        name, path = (match[1], match[2]) if match else (names[0], value)
        if name not in names:
            raise InputError(f"--weights {value!r}: no model is called {name!r}. {did_you_mean(name, names)}")
        found[name] = path
    return found
