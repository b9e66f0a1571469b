"""Give a student initial weights other than random ones."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Sequence

import timm

from distilclip import files
from distilclip.errors import InputError, did_you_mean
from distilclip.models.clip import Clip, load_named
from distilclip.models.inheritance import Tower, inherit
from distilclip.models.weights import load_weights

KINDS = ("weights", "inherit", "inherit-image", "inherit-text", "timm")


def initialise(student: Clip, sources: Sequence[str]) -> list[str]:
    """Give a student weights from `sources`, one after the other; return the names that none of them set.

    A source is `KIND:FROM`:

    - `weights:FROM`: all weights of the same architecture, a file, folder or hub name;
    - `inherit:FROM`, `inherit-image:FROM`, `inherit-text:FROM`: both towers, or one, cut from a larger model
      (`inheritance`), a folder, a hub name, or ARCHITECTURE=WEIGHTS;
    - `timm:FILE`: the image tower from a timm model's weights, without its classifier.

    Raises:
        InputError: an unknown kind, a missing file, or weights that do not fit.
    """
    fresh = set(student.model.state_dict())
    for source in sources:
        kind, _, place = source.partition(":")
        if kind not in KINDS or not place:
            raise InputError(f"{source!r} is no source of weights: write KIND:FROM. {did_you_mean(kind, KINDS)}")
        if kind == "weights":
            fresh -= _load_weights(student, place)
        elif kind == "timm":
            fresh -= _load_timm(student, place)
        else:
            fresh -= _inherit(student, place, kind.partition("-")[2])
    return sorted(fresh)


def _load_weights(student: Clip, place: str) -> set[str]:
    if place.endswith((".pt", ".pth", ".bin", ".safetensors")):
        load_weights(student.model, place, name=student.name)
        return set(student.model.state_dict())
    other = load_named(place)
    try:
        student.model.load_state_dict(other.model.state_dict())
    except RuntimeError as error:
        raise InputError(f"The weights of {place} do not fit the student {student.name!r}: {error}") from error
    return set(student.model.state_dict())


def _inherit(student: Clip, place: str, tower: str) -> set[str]:
    choices: dict[str, tuple[Tower, ...]] = {"": ("image", "text"), "image": ("image",), "text": ("text",)}
    fresh = set(inherit(student, load_named(place, device=student.device), towers=choices[tower]))
    names = set(student.model.state_dict())
    image = {name for name in names if name.startswith("visual.")}
    text = names - image - {"logit_scale", "logit_bias"}
    wanted = {"": names, "image": image, "text": text}[tower]
    return {name for name in wanted if name.removeprefix("text.") not in fresh}


def _load_timm(student: Clip, path: str) -> set[str]:
    trunk = getattr(student.model.visual, "trunk", None)
    if trunk is None:
        raise InputError(f"The image tower of {student.name} is open_clip's own, not timm's: leave out timm:{path}.")
    if not files.exists(path):
        raise InputError(f"The weights file {path!r} does not exist.")
    try:
        state = timm.models.load_state_dict(path, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(
            f"{path} holds more than tensors, or is damaged, and is not loaded. Save it as safetensors."
        ) from error
    heads = getattr(trunk, "pretrained_cfg", {}).get("classifier") or ()
    heads = (heads,) if isinstance(heads, str) else heads
    state = {name: value for name, value in state.items() if not name.startswith(tuple(heads))} if heads else state
    try:
        trunk.load_state_dict(state)
    except RuntimeError as error:
        raise InputError(f"The weights in {path} do not fit the image tower of {student.name}: {error}") from error
    return {f"visual.trunk.{name}" for name in trunk.state_dict()}
