"""Write the image and the text encoder as ONNX files, and compare them with torch."""

from __future__ import annotations

import json
import logging
import os
import tempfile
from typing import Any

import numpy as np
import onnx
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from distilclip import files
from distilclip.errors import InputError
from distilclip.export.onnx_runtime import (
    RECORD,
    TOKENIZER,
    OnnxClip,
    Tower,
    encoder_file,
    input_size,
    open_onnx,
    preprocess,
)
from distilclip.export.parity_inputs import CAPTIONS, pictures
from distilclip.export.tokenizer_json import build_tokenizer, require_clip_tokenizer
from distilclip.models.clip import Clip

OPSET = 18
"""ONNX operator set of the files: read by ONNX Runtime 1.14 and later."""

TOLERANCE = 1e-4
"""Largest difference to torch in any component of a unit embedding."""

MAX_BYTES = 2**31 - 2**20  # of a protobuf, less some room for the graph itself


class _ImageEncoder(nn.Module):
    def __init__(self, clip: Clip) -> None:
        super().__init__()
        self.model = clip.model

    def forward(self, pixels: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n dim"]:
        return nn.functional.normalize(self.model.encode_image(pixels), dim=-1)


class _TextEncoder(nn.Module):
    def __init__(self, clip: Clip) -> None:
        super().__init__()
        self.model = clip.model

    def forward(self, tokens: Int[Tensor, "n context"]) -> Float[Tensor, "n dim"]:
        return nn.functional.normalize(self.model.encode_text(tokens), dim=-1)


def write_onnx(clip: Clip, folder: str) -> dict[str, Any]:
    """Write `image.onnx`, `text.onnx`, `tokenizer.json` and `clip.json`, and compare them with torch.

    Both encoders take batches of any size and give unit embeddings in float32: `pixels` (n, 3, height, width) to
    `image_embedding` (n, dim), `tokens` (n, context; int64) to `text_embedding` (n, dim).

    Returns the opset, and the largest differences to torch that were found.

    Raises:
        InputError: the tokenizer or preprocessing cannot be expressed without torch, the model is larger than a
            protobuf can be, torch cannot export it, or the difference exceeds `TOLERANCE`.
    """
    _check_expressible(clip)
    with tempfile.TemporaryDirectory() as temporary:  # a model that fails the comparison is not written at all
        _write(clip, temporary)
        difference = _compare(clip, open_onnx(temporary))
        for name in sorted(os.listdir(temporary)):
            files.write_bytes(files.join(folder, name), files.read_bytes(os.path.join(temporary, name)))
    return {"opset": OPSET, "difference": difference}


def _write(clip: Clip, folder: str) -> None:
    tokenizer = build_tokenizer(clip)
    width, height = input_size(clip.preprocess_cfg)
    modules: dict[Tower, tuple[nn.Module, Tensor]] = {
        "image": (_ImageEncoder(clip), torch.zeros(2, 3, height, width, device=clip.device)),
        "text": (_TextEncoder(clip), clip.tokenizer(["one", "two"]).to(clip.device)),
    }
    for tower, (module, example) in modules.items():
        content = _export(module.eval(), example, tower=tower, name=clip.name)
        files.write_bytes(files.join(folder, encoder_file(tower, "fp32")), content)
    files.write_bytes(files.join(folder, TOKENIZER), tokenizer.to_str(pretty=True).encode())
    record = {
        "name": clip.name,
        "digest": clip.digest,
        "dim": clip.dim,
        "context_length": clip.context_length,
        "scale": float(clip.scale.detach()),
        "bias": None if clip.bias is None else float(clip.bias.detach()),
        "preprocessing": clip.preprocess_cfg,
        "opset": OPSET,
    }
    files.write_bytes(files.join(folder, RECORD), (json.dumps(record, indent=2) + "\n").encode())


def _check_expressible(clip: Clip) -> None:
    require_clip_tokenizer(clip)
    mode, size = clip.preprocess_cfg["resize_mode"], clip.preprocess_cfg["size"]
    square = isinstance(size, int) or size[0] == size[1]
    if mode not in ("shortest", "squash") or (mode == "shortest" and not square):
        raise InputError(
            f"{clip.name}: its preprocessing (resize_mode {mode!r}, size {size}) has no form without torch; "
            "'shortest' with a square size and 'squash' have."
        )
    both, image = (sum(v.nbytes for v in module.state_dict().values()) for module in (clip.model, clip.model.visual))
    for tower, num_bytes in (("image", image), ("text", both - image)):  # a file each
        if num_bytes > MAX_BYTES:
            raise InputError(
                f"{clip.name}: its {tower} tower has {num_bytes} bytes of weights; one ONNX file holds less than 2 GiB."
            )


def _export(module: nn.Module, example: Tensor, *, tower: Tower, name: str) -> bytes:
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        program = torch.onnx.export(
            module,
            (example,),
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
            input_names=["pixels" if tower == "image" else "tokens"],
            output_names=[f"{tower}_embedding"],
            opset_version=OPSET,
            verbose=False,
        )
    except torch.onnx.OnnxExporterError as error:
        reason = error.__cause__ or error  # the exporter's own message is a page of advice to programmers
        raise InputError(f"{name}: torch cannot export its {tower} tower to ONNX: {reason}") from error
    finally:
        log.setLevel(level)
    assert program is not None  # of the exporter with dynamo
    return _remove_traces(program.model_proto).SerializeToString(deterministic=True)


def _remove_traces(model: onnx.ModelProto) -> onnx.ModelProto:
    """Remove the exporter's stack traces: they name files of this machine and differ between machines."""
    nodes = [*model.graph.node, *(node for function in model.functions for node in function.node)]
    for item in (model, model.graph, *nodes, *model.graph.value_info, *model.graph.input, *model.graph.output):
        del item.metadata_props[:]
        item.doc_string = ""
    return model


def _compare(clip: Clip, exported: OnnxClip) -> dict[str, float]:
    """Return the largest differences to torch: of each encoder in batches of 1, 2 and 5, and of the pixels."""
    generator = torch.Generator().manual_seed(0)
    device, (width, height) = clip.device, input_size(clip.preprocess_cfg)
    found = {"image": 0.0, "text": 0.0, "pixels": 0.0}
    with torch.no_grad():
        for size in (1, 2, 5):
            pixels = torch.randn(size, 3, height, width, generator=generator)
            tokens = clip.tokenizer(list(CAPTIONS[:size]))
            pairs = {
                "image": (clip.encode_image(pixels.to(device)), exported.image.run(None, {"pixels": pixels.numpy()})),
                "text": (clip.encode_text(tokens.to(device)), exported.text.run(None, {"tokens": tokens.numpy()})),
            }
            for tower, (ours, theirs) in pairs.items():
                found[tower] = max(found[tower], _difference(ours.cpu().numpy(), theirs[0]))
    for picture in pictures():
        pixels = clip.preprocess(picture)
        found["pixels"] = max(found["pixels"], _difference(pixels.numpy(), preprocess(picture, exported.preprocessing)))
    wrong = {name: value for name, value in found.items() if not value <= TOLERANCE}  # not >, so that NaN is wrong
    if wrong:
        raise InputError(
            f"{clip.name}: its ONNX form differs from torch by {wrong}, more than {TOLERANCE}; not usable."
        )
    return found


def _difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.abs(ours - theirs).max()) if ours.shape == theirs.shape else float("inf")
