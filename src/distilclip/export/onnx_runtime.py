"""Run an exported ONNX model: pictures and words in, unit embeddings out. Imports no torch.

The folder holds `image.onnx` and `text.onnx` (with int8, `image.int8.onnx` and `text.int8.onnx`), `tokenizer.json` and
`clip.json`, which says how pictures are prepared.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnxruntime
from jaxtyping import Float32
from PIL import Image
from tokenizers import Tokenizer

from distilclip import files
from distilclip.errors import InputError

RECORD = "clip.json"
TOKENIZER = "tokenizer.json"
Precision = Literal["fp32", "int8"]
Tower = Literal["image", "text"]
_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


def encoder_file(tower: Tower, precision: Precision) -> str:
    """Return the name of an encoder's file."""
    return f"{tower}.onnx" if precision == "fp32" else f"{tower}.{precision}.onnx"


@dataclass(frozen=True)
class OnnxClip:
    """Image and text encoder with their preprocessing and tokenizer.

    `scale` is the factor of the similarities; `bias` is added to them by models of the sigmoid loss, None for others.
    """

    name: str
    dim: int
    scale: float
    bias: float | None
    preprocessing: dict[str, Any]
    tokenizer: Tokenizer
    image: onnxruntime.InferenceSession
    text: onnxruntime.InferenceSession

    def encode_images(self, pictures: Sequence[Image.Image]) -> Float32[np.ndarray, "n dim"]:
        """Return unit embeddings of RGB pictures."""
        pixels = np.stack([preprocess(picture, self.preprocessing) for picture in pictures])
        return self.image.run(None, {"pixels": pixels})[0]

    def encode_texts(self, texts: Sequence[str]) -> Float32[np.ndarray, "n dim"]:
        """Return unit embeddings of texts."""
        tokens = np.array([found.ids for found in self.tokenizer.encode_batch(list(texts))], np.int64)
        return self.text.run(None, {"tokens": tokens})[0]


def open_onnx(folder: str, *, precision: Precision = "fp32", num_threads: int = 0) -> OnnxClip:
    """Open the folder that `export` wrote, or its `model` folder. `num_threads` 0 leaves it to ONNX Runtime.

    Raises:
        InputError: there is no ONNX model of this precision.
    """
    model = files.join(folder, "model")
    folder = model if files.exists(files.join(model, RECORD)) else folder
    if not files.exists(files.join(folder, RECORD)):
        raise InputError(f"{folder} holds no ONNX model (no {RECORD}): run `distilclip export --what onnx` first.")
    record = json.loads(files.read_bytes(files.join(folder, RECORD)))
    if not files.exists(files.join(folder, encoder_file("image", precision))):
        raise InputError(f"{folder} holds no {precision} encoders: export with --quantize {precision}, or use fp32.")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads

    def session(tower: Tower) -> onnxruntime.InferenceSession:
        content = files.read_bytes(files.join(folder, encoder_file(tower, precision)))
        return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])

    return OnnxClip(
        name=record["name"],
        dim=record["dim"],
        scale=record["scale"],
        bias=record["bias"],
        preprocessing=record["preprocessing"],
        tokenizer=Tokenizer.from_str(files.read_bytes(files.join(folder, TOKENIZER)).decode()),
        image=session("image"),
        text=session("text"),
    )


def preprocess(picture: Image.Image, preprocessing: dict[str, Any]) -> Float32[np.ndarray, "3 h w"]:
    """Return the pixels that the image encoder expects of an RGB picture, equal to open_clip's.

    `shortest` scales the shorter side to the size and cuts out the middle; `squash` scales both sides. Then values are
    divided by 255, and per channel the mean is taken off and the standard deviation divided by.
    """
    width, height = input_size(preprocessing)
    resampling = _FILTERS[preprocessing["interpolation"]]
    if preprocessing["resize_mode"] == "squash":
        picture = picture.resize((width, height), resampling)
    else:
        short, long = sorted(picture.size)
        scaled = width, int(width * long / short)  # torchvision cuts off the fraction
        picture = picture.resize(scaled if picture.width <= picture.height else scaled[::-1], resampling)
        left, top = round((picture.width - width) / 2), round((picture.height - height) / 2)
        picture = picture.crop((left, top, left + width, top + height))
    values = np.asarray(picture, np.float32).transpose(2, 0, 1) / 255
    mean, std = (np.array(preprocessing[name], np.float32).reshape(3, 1, 1) for name in ("mean", "std"))
    return (values - mean) / std


def input_size(preprocessing: dict[str, Any]) -> tuple[int, int]:
    """Return width and height of the image encoder's input."""
    size = preprocessing["size"]
    height, width = (size, size) if isinstance(size, int) else size
    return width, height


def batched(items: Iterable[Any], size: int) -> Iterable[list[Any]]:
    """Yield the items in lists of `size`, the last one shorter."""
    batch = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
