"""Open a model for evaluation and compute its features, or read those that were computed before."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from distilclip.data.bad_samples import ErrorPolicy
from distilclip.errors import InputError
from distilclip.evaluate.cache import FeatureCache
from distilclip.evaluate.encode import Encoding, ImageFeatures, Output, encode_images, encode_texts
from distilclip.evaluate.zero_shot import TextClassifier, text_classifier
from distilclip.models.clip import Clip, load_clip
from distilclip.sets.dataset import ImageRef


@dataclass(frozen=True)
class Embedder:
    """Hold a model as the protocol sees it: name and digests, and features of images, classes and texts on the CPU.

    With a cache, features that were computed before are read from it.
    """

    clip: Clip
    encoding: Encoding
    cache: FeatureCache | None = None

    @property
    def name(self) -> str:
        """Return the model's name in the table."""
        return self.clip.name

    @cached_property
    def digest(self) -> str:
        """Return the SHA-256 of the weights."""
        return self.clip.digest

    @property
    def identity(self) -> str:
        """Return a digest of weights, architecture, preprocessing and tokenizer; if it is equal, features are equal."""
        values = {"weights": self.digest, **self.clip.settings}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()

    @property
    def device(self) -> torch.device:
        """Return where to compute with the features: the model's GPU, else the CPU (MPS has no float64)."""
        return self.clip.device if self.clip.device.type == "cuda" else torch.device("cpu")

    @property
    def description(self) -> dict[str, Any]:
        """Return what the result says of the model: number of parameters, width and preprocessing."""
        clip = self.clip
        return {"num_parameters": clip.num_parameters, "dim": clip.dim, "preprocessing": clip.preprocess_cfg}

    def image_features(
        self, images: Sequence[ImageRef], outputs: Sequence[Output], *, policy: ErrorPolicy, name: str
    ) -> ImageFeatures:
        """Return the features of the images that can be read; `policy` judges the others, cached or not."""
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

    def classifier(self, names: Sequence[str], templates: Sequence[str]) -> TextClassifier:
        """Return the text classifier of some classes: their prompts, encoded and averaged."""

        def compute() -> Tensor:
            return text_classifier(self.clip, names, templates, encoding=self.encoding).weight

        weight = self._text_tensor("classifier", [*templates, "", *names], "weight", compute)
        return TextClassifier(weight=weight, scale=float(self.clip.scale.detach()))

    def text_features(self, texts: Sequence[str]) -> Float[Tensor, "m dim"]:
        """Return the unit embeddings of some texts."""
        return self._text_tensor(
            "captions", texts, "text", lambda: encode_texts(self.clip, texts, encoding=self.encoding)
        )

    def _text_tensor(self, kind: str, texts: Sequence[str], name: str, compute: Callable[[], Tensor]) -> Tensor:
        if self.cache is None:
            return compute()
        return self.cache.tensors(texts, lambda: {name: compute()}, key={**self._key, "kind": kind})[name]

    @property
    def _key(self) -> dict[str, str]:
        encoding = self.encoding
        return {"model": self.identity, "dtype": str(encoding.dtype), "max_pixels": str(encoding.max_pixels)}


def open_embedder(
    spec: str, *, name: str, weights: str | None, device: torch.device, encoding: Encoding, cache: FeatureCache
) -> Embedder:
    """Load whatever `load_clip` opens, under the name that the table shows.

    Raises `InputError` for a model that cannot be loaded, and for one whose towers differ in width.
    """
    clip = load_clip(spec, weights=weights, device=device)
    check_widths(clip)
    return Embedder(dataclasses.replace(clip, name=name), encoding, cache)


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
