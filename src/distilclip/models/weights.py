"""Find and load weights given apart from their architecture: a local file, or one of open_clip's tags."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections import defaultdict
from typing import Any

import open_clip
from torch import Tensor, nn

from distilclip import files, stage_folder
from distilclip.errors import InputError, did_you_mean
from distilclip.models import torchscript
from distilclip.models.architectures import model_config

CONFIG_FILE = "open_clip_config.json"
PREPROCESSING = ("mean", "std", "interpolation", "resize_mode")
_OPENAI_RECORDS = ("input_resolution", "context_length", "vocab_size")  # beside the weights in OpenAI's archives


def published_preprocessing(architecture: str) -> dict[str, list[str]]:
    """Return the ways in which images are prepared for the published weights of an architecture, each with its tags.

    A way is open_clip's `preprocess_cfg` without the size, as JSON. There is none where nothing was published.
    """
    found: defaultdict[str, list[str]] = defaultdict(list)
    for tag in open_clip.list_pretrained_tags_by_model(architecture):
        found[_preprocessing(open_clip.get_pretrained_cfg(architecture, tag))].append(tag)
    return dict(found)


def agreed_preprocessing(architecture: str) -> dict[str, Any]:
    """Return how images are prepared for all published weights of an architecture; empty where they differ.

    open_clip fills what is missing with OpenAI's values.
    """
    found = list(published_preprocessing(architecture))
    return json.loads(found[0]) if len(found) == 1 else {}


def find_weights(architecture: str, weights: str) -> tuple[str, dict[str, Any]]:
    """Find the file that `weights` (a path or open_clip's tag) means for an architecture, and its preprocessing.

    A tag is downloaded once, by open_clip. The preprocessing of a file is that of all the architecture's tags where
    these agree, else that of an open_clip_config.json beside the file.

    Raises:
        InputError: there is no such file or tag, the tag cannot be downloaded or was trained with another activation,
            or the file's preprocessing cannot be known.
    """
    if files.exists(weights):
        _check_activation(
            architecture, is_quick=_is_archive(weights), source=f"{weights}, an archive as OpenAI published its models,"
        )
        return weights, _preprocessing_of(architecture, weights)
    published = open_clip.get_pretrained_cfg(architecture, weights)
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if not published:
        known = f" Nor is it one of open_clip's tags. {did_you_mean(weights, tags)}" if tags else ""
        raise InputError(f"The weights file {weights!r} does not exist.{known}")
    _check_activation(architecture, is_quick=bool(published.get("quick_gelu")), source=f"The tag {weights!r}")
    try:
        path = open_clip.download_pretrained(published)
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(
            f"{weights!r} is a tag of {architecture}, but its weights cannot be downloaded: {str(error).rstrip('.')}. "
            "Fetch them where there is a network, and name the file."
        ) from error
    return path, json.loads(_preprocessing(published))


def load_weights(model: nn.Module, path: str, *, name: str) -> None:
    """Load a weights file into a model: safetensors, a pickle of nothing but tensors, or OpenAI's TorchScript archives.

    Raises `InputError` where there is none or it does not fit; `name` is the architecture's, for the message.
    """
    if not files.exists(path):
        raise InputError(f"The weights file {path!r} does not exist.")
    try:
        with files.local_copy(path) as local:
            if _is_archive(local):
                model.load_state_dict(_read_archive(local))
            else:
                open_clip.factory.load_checkpoint(model, local, weights_only=True)
    except InputError:
        raise
    except (pickle.UnpicklingError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(
            f"{path} is not loaded: it is damaged or holds more than tensors ({_last_line(error)}). Save the weights "
            "as safetensors."
        ) from error
    except (RuntimeError, KeyError, AttributeError, AssertionError) as error:
        raise InputError(f"The weights in {path} do not fit the architecture {name!r}: {error}") from error


def _last_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1].rstrip(".")[:200] if str(error).strip() else type(error).__name__


def _preprocessing(published: dict[str, Any]) -> str:
    return json.dumps({key: published[key] for key in PREPROCESSING})


def _preprocessing_of(architecture: str, path: str) -> dict[str, Any]:
    ways = published_preprocessing(architecture)
    if len(ways) <= 1:
        return agreed_preprocessing(architecture)
    folder = path.rpartition("/")[0] or "."
    beside = files.join(folder, CONFIG_FILE)
    if files.exists(beside):
        return stage_folder.read_json(beside).get("preprocess_cfg", {})
    described = "; ".join(f"{way} ({', '.join(tags)})" for way, tags in ways.items())
    raise InputError(
        f"Published weights of {architecture} differ in how images are prepared, and nothing says which {path} are. "
        f'Put an {CONFIG_FILE} beside the file, {{"preprocess_cfg": ...}}, with one of: {described}. '
        "hf-hub:ORG/NAME, and a tag in place of the file, say so themselves."
    )


def _check_activation(architecture: str, *, is_quick: bool, source: str) -> None:
    """Raise `InputError` for weights trained with QuickGELU in an architecture that open_clip also has with it."""
    other = f"{architecture}-quickgelu"
    if is_quick and other in open_clip.list_models() and not model_config(architecture).get("quick_gelu"):
        raise InputError(f"{source} was trained with QuickGELU: name the architecture {other}.")


def _is_archive(path: str) -> bool:
    """Return whether a file is a TorchScript archive, as OpenAI published its models."""
    with files.open_read(path) as file:
        return torchscript.is_archive(file)


def _read_archive(path: str) -> dict[str, Tensor]:
    with open(path, "rb") as file:
        state = torchscript.read_state(file)
    return {name: value for name, value in state.items() if name not in _OPENAI_RECORDS}
