"""Write int8 encoders, and measure on real samples what they lose against float32."""

from __future__ import annotations

import contextlib
import itertools
import os
import tempfile
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
from jaxtyping import Float32
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.quantization.shape_inference import quant_pre_process
from PIL import Image

from distilclip import files
from distilclip.data.samples import BadSample, Entry, decode_image
from distilclip.data.shards import Shard, open_shard
from distilclip.errors import InputError
from distilclip.export.onnx_runtime import Precision, Tower, batched, encoder_file, open_onnx

PRECISIONS: tuple[Precision, ...] = get_args(Precision)
QUANTIZED = ["MatMul", "Gemm", "Gather"]
"""Operators with 8-bit weights. Convolutions stay float32: as dynamic int8 they would take a quarter of the bytes, but
0.7 to 6 times as long (one core with VNNI, ONNX Runtime 1.32; depthwise ones fare worst)."""


@dataclass(frozen=True)
class PairEmbeddings:
    """Embeddings of n real pairs by one model."""

    image: Float32[np.ndarray, "n dim"]
    text: Float32[np.ndarray, "n dim"]


def write_int8(folder: str) -> dict[str, dict[str, int]]:
    """Write `image.int8.onnx` and `text.int8.onnx` beside the float32 encoders; bytes of all four.

    Weights are 8-bit per output channel, activations are scaled as they come (dynamic quantisation). Weights are
    unsigned: with signed ones, AVX2 without VNNI saturates the 16-bit sums of products.
    """
    sizes: dict[str, dict[str, int]] = {}
    for tower in get_args(Tower):
        source, target = (files.join(folder, encoder_file(tower, precision)) for precision in ("fp32", "int8"))
        with tempfile.TemporaryDirectory() as temporary, files.local_copy(source) as local:
            prepared, written = (os.path.join(temporary, name) for name in ("prepared.onnx", "int8.onnx"))
            quant_pre_process(local, prepared, skip_symbolic_shape=True)
            quantize_dynamic(
                prepared, written, op_types_to_quantize=QUANTIZED, per_channel=True, weight_type=QuantType.QUInt8
            )
            files.write_bytes(target, files.read_bytes(written))
        sizes[tower] = {"fp32": files.size(source), "int8": files.size(target)}
    return sizes


def measure_int8(folder: str, data: Sequence[str], *, num_samples: int, batch_size: int) -> dict[str, Any]:
    """Measure what int8 changes, on the first usable pairs of `data`.

    `cosine` is between the int8 and the float32 embedding of a sample (mean and least). `same_nearest` is the share of
    images whose most similar caption, among the captions of all samples, is the same one in int8 and float32, and of
    captions likewise. `recall_at_1` is the share whose most similar one is their own, for both.
    """
    models = {precision: open_onnx(folder, precision=precision) for precision in PRECISIONS}
    found: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {precision: [] for precision in models}
    unusable: list[str] = []
    with contextlib.closing(_pairs(data, unusable)) as pairs:
        for batch in batched(itertools.islice(pairs, num_samples), batch_size):
            pictures, captions = zip(*batch, strict=True)
            for precision, model in models.items():
                found[precision].append((model.encode_images(pictures), model.encode_texts(captions)))
    if not found["fp32"]:
        raise InputError(f"--data holds no usable pair ({len(unusable)} unusable ones) to measure int8 on.")
    embedded = {
        precision: PairEmbeddings(*(np.concatenate(tower) for tower in zip(*batches, strict=True)))
        for precision, batches in found.items()
    }
    full, small = embedded["fp32"], embedded["int8"]
    cosine = {"image": (full.image * small.image).sum(1), "text": (full.text * small.text).sum(1)}
    nearest = {name: _nearest(found) for name, found in embedded.items()}
    own = np.arange(len(full.image))
    return {
        "num_samples": len(full.image),
        "num_unusable": len(unusable),
        "cosine": {tower: {"mean": float(c.mean()), "least": float(c.min())} for tower, c in cosine.items()},
        "same_nearest": {
            way: float((nearest["fp32"][way] == nearest["int8"][way]).mean())
            for way in ("image_to_text", "text_to_image")
        },
        "recall_at_1": {
            name: {way: float((found == own).mean()) for way, found in ways.items()} for name, ways in nearest.items()
        },
    }


def _pairs(data: Sequence[str], unusable: list[str]) -> Generator[tuple[Image.Image, str], None, None]:
    """Yield pictures and captions in order; the reasons of unusable pairs are added to `unusable`."""
    for uri in data:
        with contextlib.closing(open_shard(uri)) as shard:
            for entry in shard.index():
                try:
                    yield _pair(shard, entry)
                except BadSample as error:
                    unusable.append(error.reason)


def _pair(shard: Shard, entry: Entry) -> tuple[Image.Image, str]:
    if entry.error:
        raise BadSample(entry.error)
    sample = shard.read(entry.offset, entry.size)
    if sample.image is None or sample.caption is None:
        raise BadSample("no image" if sample.image is None else "no caption")
    return decode_image(sample.image), sample.caption


def _nearest(found: PairEmbeddings) -> dict[str, np.ndarray]:
    """Return the row of the most similar caption of each image, and of the most similar image of each caption."""
    similarity = found.image @ found.text.T
    return {"image_to_text": similarity.argmax(1), "text_to_image": similarity.argmax(0)}
