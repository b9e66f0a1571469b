"""What is evaluated, as the protocol sees it, and the usual kind of it: a CLIP model, with what it encoded before."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from distilclip import files
from distilclip.data.bad_samples import ErrorPolicy
from distilclip.errors import InputError, did_you_mean
from distilclip.evaluate.cache import FeatureCache
from distilclip.evaluate.encode import Encoder, Encoding, ImageFeatures, Output, encode_images, encode_texts
from distilclip.evaluate.stored import StoreEmbedder
from distilclip.evaluate.zero_shot import TextClassifier, text_classifier
from distilclip.models.backbone import Backbone
from distilclip.models.clip import Clip, load_clip
from distilclip.sets.dataset import ImageRef, PairSet


@runtime_checkable
class Embedder(Protocol):
    """Anything with a name and weights that turns a set's images and texts into features on the CPU."""

    @property
    def name(self) -> str:
        """Its name in the table."""

    @property
    def digest(self) -> str:
        """SHA-256 of the weights."""

    @property
    def identity(self) -> str:
        """A digest of all that decides the features: models of the same identity are the same model."""

    @property
    def backbone_kind(self) -> Backbone | None:
        """What its features of the output `backbone` are; None where it has none."""

    @property
    def device(self) -> torch.device:
        """Where what follows on the features should be computed."""

    @property
    def description(self) -> dict[str, Any]:
        """What the result says of it: number of parameters, width, preprocessing."""

    def lacks(self, images: Sequence[ImageRef], outputs: Sequence[Output]) -> str:
        """Why it has no such features of these images; empty where it has. To be asked before `images`."""

    def images(
        self, images: Sequence[ImageRef], outputs: Sequence[Output], *, policy: ErrorPolicy, name: str
    ) -> ImageFeatures:
        """Features of the images that can be read; `policy` decides about the others."""

    def classifier(self, names: Sequence[str], templates: Sequence[str]) -> TextClassifier | None:
        """The text classifier of some classes; None where there is no text encoder."""

    def captions(self, dataset: PairSet, chosen: Sequence[int], *, prefix: str) -> Float[Tensor, "m dim"] | None:
        """Unit embeddings of the chosen captions of a set, each behind the prefix; None where it cannot have them."""


@dataclass(frozen=True)
class ModelEmbedder:
    """A CLIP model; with a cache, what it has encoded before is read."""

    clip: Encoder
    encoding: Encoding
    cache: FeatureCache | None = None

    @property
    def name(self) -> str:
        """The model's name in the table."""
        return self.clip.name

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the weights."""
        return self.clip.digest

    @property
    def identity(self) -> str:
        """Weights, architecture, preprocessing and tokenizer."""
        return _digest({"weights": self.digest, **self.clip.settings})

    @property
    def backbone_kind(self) -> Backbone | None:
        """The model's own."""
        return self.clip.backbone_kind

    @property
    def device(self) -> torch.device:
        """The model's own, where that is a GPU: half the solvers would be wrong on MPS, which has no float64."""
        return self.clip.device if self.clip.device.type == "cuda" else torch.device("cpu")

    @property
    def description(self) -> dict[str, Any]:
        """Number of parameters, width and preprocessing."""
        clip = self.clip
        return {"num_parameters": clip.num_parameters, "dim": clip.dim, "preprocessing": clip.preprocess_cfg}

    def lacks(self, images: Sequence[ImageRef], outputs: Sequence[Output]) -> str:
        """Only an exported model lacks something: features before the projection."""
        if "backbone" in outputs and self.backbone_kind is None:
            return "an exported model has no features before the projection: use --probe-features projected"
        return ""

    def images(
        self, images: Sequence[ImageRef], outputs: Sequence[Output], *, policy: ErrorPolicy, name: str
    ) -> ImageFeatures:
        """Encode, or read from the cache; either way `policy` judges the images that cannot be read."""
        computed: list[Output] = []

        def compute(missing: Sequence[Output]) -> ImageFeatures:
            computed.extend(missing)
            description = f"{self.name}: {name}"
            return encode_images(
                self.clip, images, outputs=missing, encoding=self.encoding, policy=policy, description=description
            )

        if self.cache is None:
            return compute(outputs)
        found = self.cache.images(images, outputs, compute, key=self._key)
        if not computed:
            policy.seen(len(images))
            for row, error in found.unreadable:
                policy.bad(error, where=images[row].where)
            policy.check(final=True)
        return found

    def classifier(self, names: Sequence[str], templates: Sequence[str]) -> TextClassifier | None:
        """The classes' prompts, encoded and averaged, or read from the cache."""

        def compute() -> TextClassifier:
            return text_classifier(self.clip, names, templates, encoding=self.encoding)

        if self.cache is None:
            return compute()
        found = self.cache.tensors(
            [*templates, "", *names],
            lambda: {"weight": compute().weight},
            key={**self._key, "kind": "classifier"},
        )
        return TextClassifier(weight=found["weight"], scale=float(self.clip.scale.detach()))

    def captions(self, dataset: PairSet, chosen: Sequence[int], *, prefix: str) -> Float[Tensor, "m dim"] | None:
        """Encode the captions, or read them from the cache."""
        texts = [prefix + dataset.captions[i] for i in chosen]
        if self.cache is None:
            return encode_texts(self.clip, texts, encoding=self.encoding)
        return self.cache.tensors(
            texts,
            lambda: {"text": encode_texts(self.clip, texts, encoding=self.encoding)},
            key={**self._key, "kind": "captions"},
        )["text"]

    @property
    def _key(self) -> dict[str, str]:
        encoding = self.encoding
        return {"model": self.identity, "dtype": str(encoding.dtype), "max_pixels": str(encoding.max_pixels)}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


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
