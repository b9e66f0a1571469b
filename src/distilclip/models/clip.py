"""Build, load and save a CLIP model with its own preprocessing and tokenizer.

open_clip builds every network. A distilclip checkpoint is a folder that open_clip itself can load
(`open_clip.create_model("local-dir:...")`), so nothing here invents a format.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import pickle
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import open_clip
import safetensors.torch
import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from distilclip import digests, files
from distilclip.errors import InputError, did_you_mean
from distilclip.models import perceptual, towers  # noqa: F401 - towers registers image towers with timm
from distilclip.models.architectures import model_config
from distilclip.models.backbone import Backbone, backbone_features, backbone_kind
from distilclip.models.tokenizers import Tokenizer, describe_tokenizer, open_tokenizer
from distilclip.models.weights import CONFIG_FILE, agreed_preprocessing, find_weights, load_weights
from distilclip.stage_folder import read_record

WEIGHTS_FILE = "open_clip_model.safetensors"


@dataclass(frozen=True, kw_only=True)
class Clip:
    """Image and text towers, and how to feed them.

    `preprocess` turns an RGB picture into the float tensor the image tower expects (deterministic); `tokenizer` turns
    captions into token ids, truncated to the context. `preprocess_cfg` is open_clip's (size, mean, std, interpolation,
    resize_mode); `model_cfg` is the architecture, None where open_clip read it from the hub, from `hub`.
    """

    name: str
    model: Any  # nn.Module, but every open_clip architecture has its own attributes
    preprocess: Callable[[Image.Image], Tensor]
    tokenizer: Tokenizer
    model_cfg: dict[str, Any] | None
    preprocess_cfg: dict[str, Any]
    hub: str = ""

    @property
    def digest(self) -> str:
        """SHA-256 over names, shapes and bytes of all weights. Features are equal only if `settings` are equal too."""
        digest = hashlib.sha256()
        for name, value in sorted(self.model.state_dict().items()):
            tensor = value.detach().to("cpu").contiguous()
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
            digest.update(tensor.view(-1).view(torch.uint8).numpy())
        return digest.hexdigest()

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the features besides the weights: architecture or hub id, preprocessing, tokenizer."""
        return {
            "architecture": self.hub or self.model_cfg,
            "preprocessing": self.preprocess_cfg,
            "tokenizer": describe_tokenizer(self.tokenizer),
        }

    @property
    def image_size(self) -> int:
        """Side of the square input, in pixels."""
        size = self.preprocess_cfg["size"]
        return int(size if isinstance(size, int) else size[0])

    @property
    def context_length(self) -> int:
        """Number of tokens per caption, start and end tokens included."""
        text = getattr(self.model, "text", self.model)
        return int(text.context_length)

    @property
    def dim(self) -> int:
        """Width of the shared embedding space."""
        with torch.no_grad():
            tokens = torch.zeros(1, self.context_length, dtype=torch.long, device=self.device)
            return int(self.model.encode_text(tokens).shape[-1])

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.model.logit_scale.device

    @property
    def num_parameters(self) -> int:
        """Number of trainable values in both towers."""
        return sum(p.numel() for p in self.model.parameters())

    @property
    def scale(self) -> Float[Tensor, ""]:
        """exp(log-scale), the factor of the cosine similarities (SPEC's a and b); training holds a at 100 or less."""
        return self.model.logit_scale.reshape(()).float().exp()

    @property
    def bias(self) -> Float[Tensor, ""] | None:
        """Bias that a model of the sigmoid loss adds to its scaled similarities; None for one of the softmax loss."""
        bias = getattr(self.model, "logit_bias", None)
        return None if bias is None else bias.reshape(()).float()

    def encode_image(self, pixels: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n dim"]:
        """Return unit image embeddings in float32."""
        return F.normalize(self.model.encode_image(pixels).float(), dim=-1)

    def encode_text(self, tokens: Int[Tensor, "n context"]) -> Float[Tensor, "n dim"]:
        """Return unit text embeddings in float32."""
        return F.normalize(self.model.encode_text(tokens).float(), dim=-1)

    def backbone_features(self, pixels: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n width"]:
        """Return image features before the projection, not normalised (CLIP's linear-probe protocol).

        Of a tower without such features (`backbone_kind`), as in CLIP's own protocol, the embedding.
        """
        return backbone_features(self.model.visual, pixels)

    @property
    def backbone_kind(self) -> Backbone:
        """Kind of the `backbone_features` of this model."""
        return backbone_kind(self.model.visual)

    def save(self, folder: str, *, weights: Mapping[str, Tensor] | None = None) -> dict[str, str]:
        """Write an open_clip `local-dir:` folder: config, then weights as safetensors (default: those of `model`).

        Returns the SHA-256 of each file by its name.

        Raises `InputError` for a model whose architecture is known to the hub only.
        """
        if self.model_cfg is None:
            raise InputError(f"{self.name}: its architecture came from the hub; train a student with a local one.")
        config = {"model_cfg": self.model_cfg, "preprocess_cfg": self.preprocess_cfg}
        state = self.model.state_dict() if weights is None else weights
        state = {name: value.detach().to("cpu").contiguous() for name, value in state.items()}
        contents = {CONFIG_FILE: json.dumps(config, indent=2).encode(), WEIGHTS_FILE: safetensors.torch.save(state)}
        return {name: files.write_bytes(files.join(folder, name), content) for name, content in contents.items()}


def load_clip(spec: str, *, weights: str | None = None, device: str | torch.device = "cpu") -> Clip:
    """Load a trained model, in eval mode.

    `spec` is an open_clip architecture (with `weights`, a local file or one of open_clip's tags), `hf-hub:ORG/NAME`, an
    open_clip folder, a distilclip train folder or checkpoint, or `perceptual` (`models.perceptual`).

    Raises `InputError` for what is missing or unfit.
    """
    if spec.startswith("hf-hub:"):
        return _load_hub(spec, device)
    folder = _model_folder(spec)
    if folder is not None:
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            remedy = digests.repair_with(folder.rpartition("/checkpoints/")[0] or folder, "train")
            digests.check_file(folder, name, remedy=remedy)
        with _local(folder) as path:
            return _build(f"local-dir:{path}", spec, _read_model_cfg(folder), load_weights=True, device=device)
    if spec == perceptual.NAME and weights is None:
        return _perceptual(device)
    if weights is None:
        if spec in open_clip.list_models():
            raise InputError(f"The architecture {spec!r} needs trained weights: name a local file as the weights.")
        raise InputError(
            f"{spec!r} is neither an open_clip architecture nor a folder with {CONFIG_FILE}. "
            + did_you_mean(spec, open_clip.list_models())
        )
    if spec in open_clip.list_models():
        open_tokenizer(spec, model_config(spec), name=spec)  # before weights are downloaded for nothing
    path, preprocess_cfg = find_weights(spec, weights)
    clip = create_clip(spec, preprocess_cfg=preprocess_cfg, device=device)
    load_weights(clip.model, path, name=clip.name)
    clip.model.eval()
    return clip


def load_named(spec: str, *, device: str | torch.device = "cpu") -> Clip:
    """Load a trained model named by one string: a folder, `hf-hub:ORG/NAME`, or ARCHITECTURE=WEIGHTS."""
    architecture, _, weights = spec.partition("=")
    return load_clip(architecture, weights=weights or None, device=device)


def create_clip(
    architecture: str,
    *,
    seed: int | None = None,
    preprocess_cfg: dict[str, Any] | None = None,
    device: str | torch.device = "cpu",
) -> Clip:
    """Create an untrained model of an architecture that `model_config` knows.

    `seed` fixes the initial weights without touching the caller's random state. Images are prepared as `preprocess_cfg`
    says; by default as for the architecture's published weights where all agree, else as for OpenAI's.
    """
    config = model_config(architecture)
    preprocess_cfg = agreed_preprocessing(architecture) if preprocess_cfg is None else preprocess_cfg
    name = architecture if len(architecture) <= 60 and not architecture.startswith("{") else "custom"
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        with open(os.path.join(folder, CONFIG_FILE), "w") as file:
            json.dump({"model_cfg": config, "preprocess_cfg": preprocess_cfg}, file)
        return _build(f"local-dir:{folder}", name, config, load_weights=False, device=device)


def normalise_pixels(pixels: Tensor, preprocess_cfg: dict[str, Any]) -> Float[Tensor, "n 3 h w"]:
    """Turn uint8 pixels into the model's input: divided by 255, minus mean, over standard deviation per channel."""
    mean, std = (_levels(tuple(preprocess_cfg[name]), pixels.device) for name in ("mean", "std"))
    return pixels.to(torch.float32, copy=True).sub_(mean).div_(std)  # in place: new memory is most of a CPU's time


@lru_cache(maxsize=64)
def _levels(shares: tuple[float, ...], device: torch.device) -> Float[Tensor, "1 3 1 1"]:
    """Return one value per channel, in levels of 255; made once, since a copy to a GPU would wait for it."""
    return torch.tensor(shares, device=device).view(1, 3, 1, 1) * 255


def _perceptual(device: str | torch.device) -> Clip:
    transform = open_clip.transform.image_transform_v2(
        open_clip.transform.PreprocessCfg(**perceptual.PREPROCESSING), is_train=False
    )
    return _assemble(
        perceptual.NAME, perceptual.PerceptualTowers(), transform, open_clip.SimpleTokenizer(), None, device
    )


def _load_hub(spec: str, device: str | torch.device) -> Clip:
    try:
        config = open_clip.factory.get_model_config(spec)
        tokenizer = open_tokenizer(spec, config, name=spec)
        model, preprocess = open_clip.create_model_from_pretrained(spec)
    except (OSError, RuntimeError, ImportError) as error:
        raise InputError(f"{spec} cannot be loaded; once, that needs the network: {error}") from error
    return dataclasses.replace(_assemble(spec, model, preprocess, tokenizer, None, device), hub=spec)


def _build(source: str, name: str, config: dict[str, Any], *, load_weights: bool, device: str | torch.device) -> Clip:
    tokenizer = open_tokenizer(source, config, name=name)  # first: that of a hub may not be there
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)  # open_clip warns that a model to be trained has no weights yet
    try:
        model, _, preprocess = open_clip.create_model_and_transforms(
            source, load_weights=load_weights, pretrained_text=False
        )
    except pickle.UnpicklingError as error:
        raise InputError(
            f"The weights of {name!r} are not loaded: they are damaged or hold more than tensors. Save them as "
            "safetensors."
        ) from error
    except (RuntimeError, KeyError, TypeError, ValueError, AssertionError, AttributeError) as error:
        raise InputError(f"open_clip cannot build the model {name!r}: {_explain_failure(error, config)}") from error
    finally:
        root.setLevel(level)
    clip = _assemble(name, model, preprocess, tokenizer, config, device)
    if config["vision_cfg"].get("timm_proj") == "none":
        _require_shared_width(clip, config["embed_dim"])
    return clip


def _explain_failure(error: Exception, config: dict[str, Any]) -> str:
    """Say why a model cannot be built: the error, or the condition that did not hold, and what timm was asked for."""
    reason = str(error).rstrip(".") or f"this does not hold: {traceback.extract_tb(error.__traceback__)[-1].line}"
    vision = config["vision_cfg"]
    if not vision.get("timm_model_name"):
        return reason
    asked = ", ".join(
        f"{key} {vision[key]!r}" for key in ("timm_model_name", "timm_pool", "timm_proj") if key in vision
    )
    return f"{reason}. Its vision_cfg asks timm for {asked}; timm_pool avg with timm_proj linear fits most towers."


def _require_shared_width(clip: Clip, dim: int) -> None:
    """Raise `InputError` where an image tower without a projection has not the width of the shared space."""
    size = clip.image_size
    with torch.no_grad():
        width = clip.model.encode_image(torch.zeros(1, 3, size, size, device=clip.device)).shape[-1]
    if width != dim:
        raise InputError(
            f"The model {clip.name!r} has timm_proj 'none', and its image tower is {width} wide, not embed_dim, {dim}: "
            f"set timm_proj to 'linear', or embed_dim to {width}."
        )


def _assemble(
    name: str,
    model: Any,
    preprocess: Callable[[Image.Image], Tensor],
    tokenizer: Tokenizer,
    config: dict[str, Any] | None,
    device: str | torch.device,
) -> Clip:
    return Clip(
        name=name,
        model=model.to(device).eval(),
        preprocess=preprocess,
        tokenizer=tokenizer,
        model_cfg=config,
        preprocess_cfg=json.loads(json.dumps(open_clip.get_model_preprocess_cfg(model))),
    )


def _model_folder(spec: str) -> str | None:
    """Return the open_clip folder that `spec` leads to: itself, a checkpoint's, or a train folder's last checkpoint."""
    if files.exists(files.join(spec, CONFIG_FILE)):
        if files.exists(files.join(spec, "heads.safetensors")) and not files.exists(files.join(spec, "state.json")):
            raise InputError(f"{spec} is an incomplete checkpoint (no state.json). Name another one.")
        return spec
    record = read_record(spec)
    if record is None or (record.stage != "train" and not record.result):
        return None
    what = record.result.get("what")
    if record.stage == "export" and what == "open_clip":
        return files.join(spec, record.result["model"])
    if record.stage == "export":
        raise InputError(
            f"{spec} holds an export of the kind {what}, which open_clip cannot read: name the model it was made from, "
            "or export with --what open_clip (`search` also reads --what onnx)."
        )
    if record.stage != "train":
        raise InputError(f"{spec} was written by `distilclip {record.stage}`; a model comes from `train`.")
    if not record.result:
        raise InputError(
            f"{spec} is unfinished: run `distilclip train {spec}/config.json`, or name a checkpoint in it."
        )
    return files.join(spec, record.result["checkpoint"])


def _read_model_cfg(folder: str) -> dict[str, Any]:
    path = files.join(folder, CONFIG_FILE)
    try:
        config = json.loads(files.read_bytes(path))["model_cfg"]
        towers = config["vision_cfg"], config["text_cfg"]
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise InputError(
            f"{path} describes no open_clip model ({error!r:.100}). Restore it, or export again."
        ) from error
    if not all(isinstance(tower, dict) for tower in towers):
        raise InputError(
            f"{path} describes no open_clip model (its towers are no tables). Restore it, or export again."
        )
    return config


@contextlib.contextmanager
def _local(folder: str) -> Iterator[str]:
    """Yield a local copy of a remote model folder for as long as the block lasts; a local folder is used in place."""
    if not files.is_url(folder):
        yield folder
        return
    with tempfile.TemporaryDirectory() as temporary:
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            with open(os.path.join(temporary, name), "wb") as file:
                file.write(files.read_bytes(files.join(folder, name)))
        yield temporary
