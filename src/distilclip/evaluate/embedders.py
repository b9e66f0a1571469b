"""What is evaluated, as the protocol sees it, and the usual kind of it: a CLIP model, with what it encoded before."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from distilclip.data.policy import ErrorPolicy
from distilclip.evaluate.cache import FeatureCache
from distilclip.evaluate.dataset import ImageRef, PairSet
from distilclip.evaluate.encode import Encoder, Encoding, ImageFeatures, Output, encode_images, encode_texts
from distilclip.evaluate.zero_shot import TextClassifier, text_classifier
from distilclip.models.backbone import Backbone


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
