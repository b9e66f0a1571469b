"""Write a model as a Hugging Face folder that `transformers.CLIPModel.from_pretrained` loads."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from typing import Any

import numpy as np
import safetensors.torch
import torch
from jaxtyping import Float
from open_clip.model import CLIPTextCfg, CLIPVisionCfg
from PIL import Image
from tokenizers import decoders
from torch import Tensor, nn
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    PreTrainedTokenizerFast,
)

from distilclip import files
from distilclip.errors import InputError
from distilclip.export.parity_inputs import CAPTIONS, pictures
from distilclip.export.tokenizer_json import build_tokenizer, require_clip_tokenizer
from distilclip.models.clip import Clip

TOLERANCE = 1e-4
"""Largest difference to open_clip in any component of a unit embedding, and in any value of the pixels."""

# What transformers' CLIP can vary, too. Everything else in an open_clip config must have open_clip's default.
_VISION = {"image_size", "layers", "width", "head_width", "patch_size", "mlp_ratio", "norm_kwargs", "patch_dropout"}
_TEXT = {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio", "norm_kwargs"}
_MODEL = {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "custom_text", "init_logit_scale"}


def write_huggingface(clip: Clip, folder: str) -> dict[str, Any]:
    """Write config, weights, tokenizer and image processor, and compare them with open_clip.

    Returns the largest differences of both embeddings and, with transformers' Pillow backend, of the pixels. Besides,
    what no setting of transformers avoids: the difference of the pixels with its default backend, torchvision, which
    rounds differently when it resizes, and that of pictures whose crop begins one pixel earlier than open_clip's (the
    longer side, resized, is 3, 7, 11, ... pixels longer than the model's input).

    Raises:
        InputError: the architecture, tokenizer or preprocessing is none that transformers' CLIP can express (all the
            reasons are named), captions become other tokens, or a difference exceeds `TOLERANCE`.
    """
    config = huggingface_config(clip)
    model = CLIPModel(config).eval()
    state = huggingface_state(clip)
    model.load_state_dict(state, strict=True)
    config.architectures = ["CLIPModel"]
    with tempfile.TemporaryDirectory() as temporary:  # what fails the comparison is not written at all
        _tokenizer(clip).save_pretrained(temporary)
        _image_processor(clip.preprocess_cfg).save_pretrained(temporary)
        found = _compare(clip, model, temporary)
        files.write_bytes(files.join(folder, "config.json"), config.to_json_string().encode())
        weights = safetensors.torch.save(state, metadata={"format": "pt"})  # transformers refuses files without it
        files.write_bytes(files.join(folder, "model.safetensors"), weights)
        for name in sorted(os.listdir(temporary)):
            files.write_bytes(files.join(folder, name), files.read_bytes(os.path.join(temporary, name)))
    return found


def huggingface_config(clip: Clip) -> CLIPConfig:
    """Return transformers' config of the model. Raises `InputError` that names all that cannot be written."""
    if clip.model_cfg is None:
        raise InputError(f"{clip.name} comes from the hub, which has it already; export a model of your own.")
    require_clip_tokenizer(clip)
    reasons = inexpressible(clip.model_cfg, clip.preprocess_cfg)
    if reasons:
        raise InputError(
            f"{clip.name} cannot be a transformers CLIPModel: {'; '.join(reasons)}. "
            "Export it with --what open_clip or --what onnx, which hold any architecture."
        )
    cfg = clip.model_cfg
    vision, text = CLIPVisionCfg(**cfg["vision_cfg"]), CLIPTextCfg(**cfg["text_cfg"])
    tokenizer = require_clip_tokenizer(clip)
    activation = "quick_gelu" if cfg.get("quick_gelu") else "gelu"
    shared = {"hidden_act": activation, "projection_dim": cfg["embed_dim"]}
    return CLIPConfig(
        projection_dim=cfg["embed_dim"],
        vision_config=CLIPVisionConfig(
            hidden_size=vision.width,
            intermediate_size=int(vision.width * vision.mlp_ratio),
            num_hidden_layers=vision.layers,
            num_attention_heads=vision.width // vision.head_width,
            image_size=_size(clip.preprocess_cfg)[0],
            patch_size=vision.patch_size,
            layer_norm_eps=_epsilon(vision),
            **shared,
        ).to_dict(),
        text_config=CLIPTextConfig(
            vocab_size=text.vocab_size,
            hidden_size=text.width,
            intermediate_size=int(text.width * text.mlp_ratio),
            num_hidden_layers=text.layers,
            num_attention_heads=text.heads,
            max_position_embeddings=text.context_length,
            layer_norm_eps=_epsilon(text),
            bos_token_id=tokenizer.sot_token_id,
            eos_token_id=tokenizer.eot_token_id,
            pad_token_id=tokenizer.eot_token_id,
            **shared,
        ).to_dict(),
    )


def inexpressible(model_cfg: dict[str, Any], preprocess_cfg: dict[str, Any]) -> list[str]:
    """Return the parts of an open_clip config that transformers' CLIP cannot express."""
    vision_cfg, text_cfg = model_cfg["vision_cfg"], model_cfg["text_cfg"]
    reasons = [
        f"model_cfg.{name}={model_cfg[name]!r}"
        for name in sorted(set(model_cfg) - _MODEL)
        if model_cfg[name] is not None
    ]
    if vision_cfg.get("timm_model_name"):
        reasons.append(f"its image tower is timm's {vision_cfg['timm_model_name']!r}, no CLIP vision transformer")
    elif isinstance(vision_cfg.get("layers"), list | tuple):
        reasons.append("its image tower is CLIP's ResNet, no vision transformer")
    else:
        reasons += _unusual("vision_cfg", vision_cfg, CLIPVisionCfg, _VISION)
    if len({*np.ravel(vision_cfg.get("image_size", 0))}) > 1:
        reasons.append(f"its pictures are no squares: vision_cfg.image_size={vision_cfg['image_size']!r}")
    if text_cfg.get("hf_model_name"):
        reasons.append(f"its text tower is {text_cfg['hf_model_name']!r}, not CLIP's")
    else:
        reasons += _unusual("text_cfg", text_cfg, CLIPTextCfg, _TEXT)
    if preprocess_cfg["resize_mode"] not in ("shortest", "squash"):
        reasons.append(f"its preprocessing has resize_mode={preprocess_cfg['resize_mode']!r}")
    return reasons


def _unusual(name: str, values: dict[str, Any], defaults: type, free: set[str]) -> list[str]:
    default = {field.name: field.default for field in dataclasses.fields(defaults)}
    unusual = [key for key, value in values.items() if key not in free and value != default.get(key, value)]
    if set(values.get("norm_kwargs") or {}) - {"eps"}:
        unusual.append("norm_kwargs")
    return [f"{name}.{key}={values[key]!r}" for key in sorted(unusual)]


def _epsilon(tower: CLIPVisionCfg | CLIPTextCfg) -> float:
    return float((tower.norm_kwargs or {}).get("eps", nn.LayerNorm(1).eps))


def huggingface_state(clip: Clip) -> dict[str, Tensor]:
    """Return the weights under transformers' names. Projections are transposed there; q, k and v are apart."""
    visual, text = clip.model.visual, getattr(clip.model, "text", clip.model)
    state = {
        "logit_scale": clip.model.logit_scale.reshape(()),
        "visual_projection.weight": visual.proj.T,
        "text_projection.weight": text.text_projection.T,
        "vision_model.embeddings.class_embedding": visual.class_embedding,
        "vision_model.embeddings.patch_embedding.weight": visual.conv1.weight,
        "vision_model.embeddings.position_embedding.weight": visual.positional_embedding,
        "text_model.embeddings.token_embedding.weight": text.token_embedding.weight,
        "text_model.embeddings.position_embedding.weight": text.positional_embedding,
        **_layer("vision_model.pre_layrnorm", visual.ln_pre),  # so spelled there
        **_layer("vision_model.post_layernorm", visual.ln_post),
        **_layer("text_model.final_layer_norm", text.ln_final),
    }
    for tower, transformer in (("vision_model", visual.transformer), ("text_model", text.transformer)):
        for i, block in enumerate(transformer.resblocks):
            state |= _block(f"{tower}.encoder.layers.{i}", block)
    return {name: value.detach().cpu().float().contiguous() for name, value in state.items()}


def _block(name: str, block: nn.Module) -> dict[str, Tensor]:
    attention: Any = block.attn
    state = _layer(f"{name}.self_attn.out_proj", attention.out_proj)
    weights, biases = attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3)
    for projection, weight, bias in zip("qkv", weights, biases, strict=True):
        state |= {
            f"{name}.self_attn.{projection}_proj.weight": weight,
            f"{name}.self_attn.{projection}_proj.bias": bias,
        }
    mlp: Any = block.mlp
    layers = {"layer_norm1": block.ln_1, "layer_norm2": block.ln_2, "mlp.fc1": mlp.c_fc, "mlp.fc2": mlp.c_proj}
    for their_name, layer in layers.items():
        state |= _layer(f"{name}.{their_name}", layer)
    return state


def _layer(name: str, layer: Any) -> dict[str, Tensor]:
    return {f"{name}.weight": layer.weight, f"{name}.bias": layer.bias}


def _compare(clip: Clip, model: CLIPModel, folder: str) -> dict[str, Any]:
    """Compare the unit embeddings of random pixels and of the parity captions, and the pixels of the parity pictures.

    Tokenizer and image processor are those that transformers reads from the folder.
    """
    pixels = torch.randn(3, 3, *_size(clip.preprocess_cfg), generator=torch.Generator().manual_seed(0))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    whole = require_clip_tokenizer(clip)(list(CAPTIONS), context_length=1024)  # a short context would hide differences
    for caption, own, theirs in zip(
        CAPTIONS, whole, tokenizer.backend_tokenizer.encode_batch(list(CAPTIONS)), strict=True
    ):
        if own[own != 0].tolist() != theirs.ids:
            raise InputError(f"{clip.name}: in transformers its tokenizer reads {caption!r} otherwise; not usable.")
    tokens = clip.tokenizer(list(CAPTIONS))
    read = tokenizer(list(CAPTIONS), padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        embeddings = {
            "image": (clip.encode_image(pixels.to(clip.device)), model.get_image_features(pixel_values=pixels)),
            "text": (clip.encode_text(tokens.to(clip.device)), model.get_text_features(**read)),
        }
    found = {
        tower: float((ours.cpu() - _unit(theirs.pooler_output)).abs().max())
        for tower, (ours, theirs) in embeddings.items()
    }
    exact = _pixel_differences(clip, AutoImageProcessor.from_pretrained(folder, backend="pil"))
    found["pixels"] = exact["same_crop"]
    wrong = {name: value for name, value in found.items() if not value <= TOLERANCE}  # not >, so that NaN is wrong
    if wrong:
        raise InputError(f"{clip.name}: as a CLIPModel it differs from open_clip by {wrong}, more than {TOLERANCE}.")
    rounded = _pixel_differences(clip, AutoImageProcessor.from_pretrained(folder, backend="torchvision"))
    return {
        "difference": found,
        "pixels_with_torchvision": rounded["same_crop"],
        "pixels_with_crop_off_by_one": exact["own_crop"],
    }


def _pixel_differences(clip: Clip, processor: Any) -> dict[str, float]:
    """Return the largest differences of the parity pictures' pixels, in the unit that the model takes.

    `own_crop` compares with open_clip's pixels, `same_crop` with those at the place where transformers cuts.
    """
    size = _size(clip.preprocess_cfg)[0]
    found = {"same_crop": 0.0, "own_crop": 0.0}
    for picture in pictures((size + 3, size)):  # of this one the two cut differently
        (theirs,) = processor(images=[picture], return_tensors="pt")["pixel_values"]
        for name, shown in (("same_crop", _shorten(clip, picture)), ("own_crop", picture)):
            found[name] = max(found[name], float((clip.preprocess(shown) - theirs).abs().max()))
    return found


def _shorten(clip: Clip, picture: Image.Image) -> Image.Image:
    """Return the resized picture, without its last pixel where open_clip would cut later than transformers.

    Half a pixel is rounded down by transformers, and to an even number by open_clip's torchvision: of 11 pixels, the
    middle 8 begin at 1.5, so at 1 or at 2. Of the first 10 pixels, the middle 8 begin at 1 for both. No setting of
    transformers changes that.
    """
    if clip.preprocess_cfg["resize_mode"] == "squash":
        return picture
    preprocess: Any = clip.preprocess
    resized = preprocess.transforms[0](picture)
    size = _size(clip.preprocess_cfg)[0]
    width, height = (side - ((side - size) % 4 == 3) for side in resized.size)
    return resized.crop((0, 0, width, height))


def _unit(features: Float[Tensor, "n dim"]) -> Float[Tensor, "n dim"]:
    return nn.functional.normalize(features, dim=-1)


def _size(preprocess_cfg: dict[str, Any]) -> tuple[int, int]:
    size = preprocess_cfg["size"]
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _tokenizer(clip: Clip) -> PreTrainedTokenizerFast:
    """Return CLIP's tokenizer as its file states it; a CLIPTokenizer would add its own cleaning and splitting.

    transformers fills captions up with the end token, of which the model reads the first.
    """
    source, written = require_clip_tokenizer(clip), build_tokenizer(clip)
    written.no_truncation()
    written.no_padding()
    written.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace("</w>", " ")])
    start, end = (source.decoder[number] for number in (source.sot_token_id, source.eot_token_id))
    return PreTrainedTokenizerFast(
        tokenizer_object=written,
        bos_token=start,
        eos_token=end,
        unk_token=end,
        pad_token=end,
        model_max_length=clip.context_length,
    )


def _image_processor(preprocess_cfg: dict[str, Any]) -> CLIPImageProcessor:
    """Return the image processor that takes the same steps."""
    height, width = _size(preprocess_cfg)
    squash = preprocess_cfg["resize_mode"] == "squash"
    return CLIPImageProcessor(
        size={"height": height, "width": width} if squash else {"shortest_edge": min(height, width)},
        do_center_crop=not squash,
        crop_size={"height": height, "width": width},
        resample={"bilinear": 2, "bicubic": 3}[preprocess_cfg["interpolation"]],
        image_mean=list(preprocess_cfg["mean"]),
        image_std=list(preprocess_cfg["std"]),
    )
