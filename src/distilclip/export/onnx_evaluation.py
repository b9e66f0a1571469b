"""An exported ONNX model in the place of a torch one: tensors in, tensors out, so that it can be evaluated like it.

It has what `evaluate.encode.Encoder` asks for.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from distilclip import files
from distilclip.export.onnx_runtime import RECORD, TOKENIZER, OnnxClip, Precision, encoder_file, open_onnx, preprocess


@dataclass(frozen=True, kw_only=True)
class ExportedClip:
    """The encoders, on the CPU. `digest` is of their files: another than that of the weights they were made from."""

    name: str
    digest: str
    model: OnnxClip
    num_parameters: None = None  # the files do not say
    backbone_kind: None = None  # the encoders give embeddings only

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the features beside those files."""
        return {"preprocessing": self.model.preprocessing}

    @property
    def device(self) -> torch.device:
        """The CPU."""
        return torch.device("cpu")

    @property
    def scale(self) -> Float[Tensor, ""]:
        """The factor of the cosine similarities."""
        return torch.tensor(self.model.scale)

    @property
    def dim(self) -> int:
        """Width of the shared embedding space."""
        return self.model.dim

    @property
    def preprocess_cfg(self) -> dict[str, Any]:
        """What `preprocess` does, in open_clip's words."""
        return self.model.preprocessing

    @property
    def preprocess(self) -> Callable[[Image.Image], Tensor]:
        """From an RGB picture to the image encoder's input; travels to other processes without the encoders."""
        return functools.partial(_pixels, self.model.preprocessing)

    def tokenizer(self, texts: list[str]) -> Int[Tensor, "n context"]:
        """From captions to token ids."""
        return torch.tensor([found.ids for found in self.model.tokenizer.encode_batch(texts)])

    def encode_image(self, pixels: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n dim"]:
        """Unit image embeddings."""
        return torch.from_numpy(self.model.image.run(None, {"pixels": pixels.numpy()})[0])

    def encode_text(self, tokens: Int[Tensor, "n context"]) -> Float[Tensor, "n dim"]:
        """Unit text embeddings."""
        return torch.from_numpy(self.model.text.run(None, {"tokens": tokens.numpy().astype(np.int64)})[0])

    def backbone_features(self, pixels: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n width"]:
        """There are none: `backbone_kind` is to be asked first."""
        raise ValueError(f"{self.name} has no features before the projection.")


def open_exported(folder: str, *, name: str, precision: Precision = "fp32") -> ExportedClip:
    """The model in a folder that `export --what onnx` wrote, or in its `model` folder.

    Raises `InputError` where there is none of this precision.
    """
    model = open_onnx(folder, precision=precision, num_threads=torch.get_num_threads())
    inner = files.join(folder, "model")
    folder = inner if files.exists(files.join(inner, RECORD)) else folder
    digest = hashlib.sha256()
    for file in (encoder_file("image", precision), encoder_file("text", precision), TOKENIZER):
        digest.update(files.sha256(files.join(folder, file)).encode())
    return ExportedClip(name=name, digest=digest.hexdigest(), model=model)


def _pixels(preprocessing: dict[str, Any], picture: Image.Image) -> Float[Tensor, "3 h w"]:
    return torch.from_numpy(preprocess(picture, preprocessing))
