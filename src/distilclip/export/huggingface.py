"""A model as a Hugging Face folder that `transformers.CLIPModel.from_pretrained` loads."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from typing import Any

import safetensors.torch
import torch
from jaxtyping import Float
from open_clip.model import CLIPTextCfg, CLIPVisionCfg
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTextConfig, CLIPTokenizer, CLIPVisionConfig

from distilclip.data import files
from distilclip.errors import InputError
from distilclip.export.tokenizer import PROBES, require_clip_tokenizer
from distilclip.models.clip import Clip

TOLERANCE = 1e-4
"""Largest difference to open_clip in any component of a unit embedding."""

# What transformers' CLIP can vary, too. Everything else in an open_clip config must have open_clip's default.
_VISION = {"image_size", "layers", "width", "head_width", "patch_size", "mlp_ratio", "norm_kwargs", "patch_dropout"}
_TEXT = {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio", "norm_kwargs"}
_MODEL = {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "custom_text", "init_logit_scale"}


def write_huggingface(clip: Clip, folder: str) -> dict[str, float]:
    """Write config, weights, tokenizer and image processor; the largest differences to open_clip.

    Raises:
        InputError: the architecture, tokenizer or preprocessing is none that transformers' CLIP can express (all the
            reasons are named), or its embeddings differ by more than `TOLERANCE`.
    """
    config = huggingface_config(clip)
    model = CLIPModel(config).eval()
    state = huggingface_state(clip)
    model.load_state_dict(state, strict=True)
    difference = _compare(clip, model)
    config.architectures = ["CLIPModel"]
    files.write_bytes(files.join(folder, "config.json"), config.to_json_string().encode())
    weights = safetensors.torch.save(state, metadata={"format": "pt"})  # transformers refuses files that do not say so
    files.write_bytes(files.join(folder, "model.safetensors"), weights)
    with tempfile.TemporaryDirectory() as temporary:
        _tokenizer(clip).save_pretrained(temporary)
        _image_processor(clip.preprocess_cfg).save_pretrained(temporary)
        for name in sorted(os.listdir(temporary)):
            files.write_bytes(files.join(folder, name), files.read_bytes(os.path.join(temporary, name)))
    return difference


def huggingface_config(clip: Clip) -> CLIPConfig:
    """The architecture as transformers writes it. Raises `InputError` with everything that cannot be written."""
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
            image_size=vision.image_size,
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
    """What of an open_clip config transformers' CLIP has no word for."""
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
    """The weights under transformers' names. Projections are stored the other way round, q, k and v apart."""
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


def _compare(clip: Clip, model: CLIPModel) -> dict[str, float]:
    """Largest differences of unit embeddings, on random pixels and on captions that try the tokenizers."""
    pixels = torch.randn(3, 3, *_size(clip.preprocess_cfg), generator=torch.Generator().manual_seed(0))
    tokens = clip.tokenizer(list(PROBES))
    with torch.no_grad():
        theirs = {
            "image": _unit(model.get_image_features(pixel_values=pixels).pooler_output),
            "text": _unit(model.get_text_features(input_ids=tokens).pooler_output),
        }
        ours = {
            "image": clip.encode_image(pixels.to(clip.device)).cpu(),
            "text": clip.encode_text(tokens.to(clip.device)).cpu(),
        }
    found = {tower: float((ours[tower] - theirs[tower]).abs().max()) for tower in ours}
    wrong = {tower: value for tower, value in found.items() if not value <= TOLERANCE}  # not >, so that NaN is wrong
    if wrong:
        raise InputError(f"{clip.name}: as a CLIPModel it differs from open_clip by {wrong}, more than {TOLERANCE}.")
    return found


def _unit(features: Float[Tensor, "n dim"]) -> Float[Tensor, "n dim"]:
    return nn.functional.normalize(features, dim=-1)


def _size(preprocess_cfg: dict[str, Any]) -> tuple[int, int]:
    size = preprocess_cfg["size"]
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _tokenizer(clip: Clip) -> CLIPTokenizer:
    """The same vocabulary, start and end under the names that transformers uses."""
    source = require_clip_tokenizer(clip)
    names = {source.sot_token_id: "<|startoftext|>", source.eot_token_id: "<|endoftext|>"}
    vocabulary = {names.get(number, token): number for token, number in source.encoder.items()}
    merges = sorted(source.bpe_ranks, key=source.bpe_ranks.__getitem__)
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=clip.context_length)


def _image_processor(preprocess_cfg: dict[str, Any]) -> CLIPImageProcessor:
    """The same steps. transformers resizes with torchvision by default, which rounds otherwise than Pillow."""
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
