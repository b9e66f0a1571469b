"""Write the image tower as a timm model: `timm.create_model("local-dir:FOLDER", pretrained=True)` loads it.

The classifier of the timm model is the projection into the shared space, so its output, normalised, is the image
embedding; with `num_classes=0` it gives the features before the projection.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from typing import Any

import timm
import torch
from timm.models import save_for_hf
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from distilclip import files
from distilclip.errors import InputError
from distilclip.export.parity_inputs import pictures
from distilclip.models import towers
from distilclip.models.clip import Clip

TOLERANCE = 1e-4
"""Largest difference to open_clip in any component of a unit embedding, and in any value of the pixels."""

_SAME_KEYS = {"mobilenetv3_small_clip": "mobilenetv3_small_100"}  # distilclip's name: timm's


@dataclass(frozen=True)
class Tower:
    """A timm model with the weights of an image tower, and the arguments that make it anew."""

    model: Any
    arguments: dict[str, Any]


def write_timm(clip: Clip, folder: str) -> dict[str, Any]:
    """Write config and weights, load them with timm, and compare with open_clip.

    Returns the largest differences of the unit image embeddings, and of the pixels by timm's own transform.

    Raises:
        InputError: the tower is none that timm knows, has no linear projection, or comes out otherwise.
    """
    tower = _build_tower(clip)
    with tempfile.TemporaryDirectory() as temporary:  # what fails the comparison is not written at all
        save_for_hf(
            tower.model,
            temporary,
            model_config={"pretrained_cfg": _preprocessing(clip.preprocess_cfg)},
            model_args=tower.arguments,
            safe_serialization=True,
        )
        found = _compare(clip, temporary)
        for name in sorted(os.listdir(temporary)):
            files.write_bytes(files.join(folder, name), files.read_bytes(os.path.join(temporary, name)))
    return {"difference": found, "width": int(tower.model.num_features)}


def _build_tower(clip: Clip) -> Tower:
    if clip.model_cfg is None:
        raise InputError(f"{clip.name} comes from the hub, which has it already; export a model of your own.")
    vision = clip.model_cfg["vision_cfg"]
    if vision.get("timm_model_name"):
        return _tower_of_trunk(clip, vision["timm_model_name"], vision.get("timm_pool", "avg"))
    if isinstance(vision.get("layers"), list | tuple):
        raise _refuse(clip, "its image tower is CLIP's ResNet, whose attention pooling is no linear classifier")
    return _tower_of_transformer(clip, vision)


def _tower_of_trunk(clip: Clip, name: str, pool: str) -> Tower:
    """The trunk as it is, with the projection after it as its classifier."""
    name = _SAME_KEYS.get(name, name.split(".")[0])
    if getattr(getattr(towers, name, None), "__module__", "") == towers.__name__:
        raise _refuse(clip, f"its image tower is distilclip's own {name}, which timm does not know")
    visual: Any = clip.model.visual
    layers = dict(visual.head.named_children())
    if set(layers) - {"drop", "proj"}:
        raise _refuse(clip, f"after the trunk come {sorted(layers)}; timm has a linear classifier there")
    arguments: dict[str, Any] = {"global_pool": pool} if pool else {}
    if isinstance(visual.trunk, VisionTransformer):
        arguments["fc_norm"] = not isinstance(visual.trunk.fc_norm, nn.Identity)
    try:
        model: Any = timm.create_model(name, num_classes=clip.dim, **arguments)
    except (RuntimeError, TypeError) as error:
        raise _refuse(clip, f"timm does not make its tower {name} anew ({error})") from error
    missing, unexpected = model.load_state_dict(visual.trunk.state_dict(), strict=False)
    classifier = {key for key, value in model.named_modules() if value is model.get_classifier()}
    missing = [key for key in missing if key.rpartition(".")[0] not in classifier or "proj" not in layers]
    if missing or unexpected:
        raise _refuse(clip, f"as timm's {name} it lacks {missing[:3]} and has {unexpected[:3]} besides")
    if "proj" in layers:
        linear, projection = model.get_classifier(), layers["proj"]
        with torch.no_grad():
            linear.weight.copy_(projection.weight)
            linear.bias.copy_(torch.zeros_like(linear.bias) if projection.bias is None else projection.bias)
    return Tower(model.eval(), arguments)


def _tower_of_transformer(clip: Clip, vision: dict[str, Any]) -> Tower:
    """open_clip's vision transformer under timm's names, by timm's own conversion."""
    visual: Any = clip.model.visual
    if getattr(visual, "proj", None) is None:
        raise _refuse(clip, "its image tower has no projection")
    heads = visual.transformer.resblocks[0].attn.num_heads
    arguments: dict[str, Any] = {
        "img_size": list(visual.image_size),
        "patch_size": int(visual.conv1.kernel_size[0]),
        "embed_dim": int(visual.conv1.out_channels),
        "depth": len(visual.transformer.resblocks),
        "num_heads": int(heads),
        "mlp_ratio": float(vision.get("mlp_ratio", 4.0)),
    }
    name = f"vit_base_patch32_clip_{'quickgelu_' if clip.model_cfg and clip.model_cfg.get('quick_gelu') else ''}224"
    model: Any = timm.create_model(name, num_classes=visual.proj.shape[1], **arguments)
    state = {f"visual.{key}": value.detach().cpu().float() for key, value in visual.state_dict().items()}
    try:
        model.load_state_dict(checkpoint_filter_fn(state, model))
    except RuntimeError as error:
        raise _refuse(clip, f"its vision transformer differs from CLIP's ({error})") from error
    return Tower(model.eval(), arguments)


def _preprocessing(preprocess_cfg: dict[str, Any]) -> dict[str, Any]:
    """The settings from which timm makes its transform."""
    size = preprocess_cfg["size"]
    height, width = (size, size) if isinstance(size, int) else size
    return {
        "input_size": [3, height, width],
        "mean": list(preprocess_cfg["mean"]),
        "std": list(preprocess_cfg["std"]),
        "interpolation": preprocess_cfg["interpolation"],
        "crop_pct": 1.0,
        "crop_mode": "squash" if preprocess_cfg["resize_mode"] == "squash" else "center",
    }


def _compare(clip: Clip, folder: str) -> dict[str, float]:
    """Compare with the model what timm loads from the folder: unit embeddings, and pixels of the parity pictures."""
    try:
        model: Any = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    except (RuntimeError, TypeError) as error:
        raise _refuse(clip, f"timm does not load it again ({error})") from error
    size = clip.preprocess_cfg["size"]
    shape = (size, size) if isinstance(size, int) else tuple(size)
    pixels = torch.randn(3, 3, *shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        own, theirs = clip.encode_image(pixels.to(clip.device)).cpu(), nn.functional.normalize(model(pixels), dim=-1)
    transform: Any = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    found = {
        "image": float((own - theirs).abs().max()),
        "pixels": max(_difference(clip.preprocess(picture), transform(picture)) for picture in pictures()),
    }
    wrong = {name: value for name, value in found.items() if not value <= TOLERANCE}  # not >, so that NaN is wrong
    if wrong:
        raise _refuse(clip, f"as a timm model it differs from open_clip by {wrong}, more than {TOLERANCE}")
    return found


def _difference(left: Tensor, right: Tensor) -> float:
    return float((left - right).abs().max()) if left.shape == right.shape else float("inf")


def _refuse(clip: Clip, why: str) -> InputError:
    reason = " ".join(why.split())
    return InputError(
        f"{clip.name} cannot be a timm model: {reason}. Export it with --what open_clip or --what onnx, which hold any "
        "architecture."
    )
