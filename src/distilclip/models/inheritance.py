"""Begin a student with pieces of its teacher: evenly spaced layers, and the first channels of each.

Layers are chosen evenly, the first and the last included; of every matrix the leading rows and columns are taken, so
that heads stay whole. Source: Wu et al. 2023 (TinyCLIP), weight inheritance, the manual kind.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from distilclip.errors import InputError
from distilclip.models.clip import Clip

Tower = Literal["image", "text"]

_LAYER = re.compile(r"(.*\b(?:resblocks|blocks)\.)(\d+)(\..*)")
_FUSED = {"in_proj_weight": 3, "in_proj_bias": 3, "qkv": 3, "kv": 2}  # several matrices one below the other


@torch.no_grad()
def inherit(student: Clip, teacher: Clip, *, towers: Sequence[Tower] = ("image", "text")) -> list[str]:
    """Copy the teacher's towers into the student's, as much of them as fits.

    Returns the names of parameters that keep their own initial values: a patch embedding for another patch size, and
    what the teacher has no counterpart of. The scale is inherited with both towers.

    Raises:
        InputError: a tower is of another kind than the teacher's, wider, deeper, or has heads of another width.
    """
    fresh = []
    source = teacher.model.state_dict()
    for tower in towers:
        own = _tower(student.model.state_dict(), tower)
        theirs = _tower(source, tower)
        _check_kind(student, teacher, tower, own, theirs)
        depth, teacher_depth = _depth(own), _depth(theirs)
        for name, parameter in own.items():
            match = _LAYER.fullmatch(name)
            counterpart = name
            if match:
                layer = even_layers(depth, teacher_depth)[int(match[2])]
                counterpart = f"{match[1]}{layer}{match[3]}"
            value = theirs.get(counterpart)
            if value is not None and _is_positions(name) and tower == "image":
                value = _resize_positions(value, parameter)
            if value is None or not _fits(value, parameter):
                fresh.append(name)
                continue
            parameter.copy_(leading(value, tuple(parameter.shape), parts=_parts(name)))
    if set(towers) == {"image", "text"}:
        student.model.logit_scale.copy_(source["logit_scale"].reshape(student.model.logit_scale.shape))
        if getattr(student.model, "logit_bias", None) is not None and "logit_bias" in source:
            student.model.logit_bias.copy_(source["logit_bias"].reshape(student.model.logit_bias.shape))
    return fresh


def even_layers(depth: int, teacher_depth: int) -> list[int]:
    """Return which of the teacher's layers become the student's: evenly spread, first and last included."""
    if depth == 1:
        return [teacher_depth - 1]
    return [round(i * (teacher_depth - 1) / (depth - 1)) for i in range(depth)]


def leading(tensor: Float[Tensor, "*big"], shape: tuple[int, ...], *, parts: int = 1) -> Float[Tensor, "*small"]:
    """Return the first rows, columns and so on of a tensor, or of each of its `parts` along the first dimension."""
    if not shape:
        return tensor
    first = (slice(shape[0] // parts), *(slice(size) for size in shape[1:]))
    return torch.cat([part[first] for part in tensor.chunk(parts)])


def _tower(state: dict[str, Tensor], tower: Tower) -> dict[str, Tensor]:
    """Return the parameters of a tower; those of the text tower without the prefix `text.`."""
    if tower == "image":
        return {name: value for name, value in state.items() if name.startswith("visual.")}
    return {
        name.removeprefix("text."): value
        for name, value in state.items()
        if not name.startswith("visual.") and name not in ("logit_scale", "logit_bias")
    }


def _check_kind(student: Clip, teacher: Clip, tower: Tower, own: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    def skeleton(state: dict[str, Tensor]) -> set[str]:
        return {f"{match[1]}*{match[3]}" for name in state if (match := _LAYER.fullmatch(name))}

    if not skeleton(own) or skeleton(own) != skeleton(theirs):
        raise InputError(
            f"The {tower} tower of {student.name} is of another kind than that of {teacher.name}: only transformers of "
            "one kind inherit. Choose another student, or inherit the other tower only."
        )
    if _depth(own) > _depth(theirs):
        raise InputError(
            f"The {tower} tower of {student.name} has {_depth(own)} layers, that of {teacher.name} {_depth(theirs)}: "
            "nothing can be inherited by a deeper one."
        )
    for name, parameter in own.items():
        value = theirs.get(name)
        if value is None or value.ndim != parameter.ndim or _is_positions(name):
            continue
        channels = slice(2 if value.ndim == 4 else None)  # kernels of another size keep the student's weights
        if any(a > b for a, b in zip(parameter.shape[channels], value.shape[channels], strict=True)):
            raise InputError(
                f"{name} of {student.name} is {tuple(parameter.shape)}, larger than {tuple(value.shape)} of "
                f"{teacher.name}: nothing can be inherited by a wider one."
            )
    heads = {_head_width(clip.model, tower) for clip in (student, teacher)}
    if len(heads) > 1:
        raise InputError(
            f"The {tower} towers of {student.name} and {teacher.name} have heads of {sorted(heads)} channels: cut "
            "heads would mix. Choose the student's number of heads so that they are as wide."
        )


def _head_width(model: nn.Module, tower: Tower) -> int:
    for name, module in model.named_modules():
        if name.startswith("visual.") == (tower == "image") and hasattr(module, "head_dim"):
            return int(module.head_dim)
    return 0


def _depth(state: dict[str, Tensor]) -> int:
    return 1 + max((int(match[2]) for name in state if (match := _LAYER.fullmatch(name))), default=-1)


def _parts(name: str) -> int:
    return next((parts for piece, parts in _FUSED.items() if piece in name.split(".")), 1)


def _is_positions(name: str) -> bool:
    return name.split(".")[-1] in ("positional_embedding", "pos_embed")


def _fits(value: Tensor, parameter: Tensor) -> bool:
    """Return whether the parameter is a leading part of the value; kernels of another size are not."""
    if value.ndim != parameter.ndim or (value.ndim == 4 and value.shape[2:] != parameter.shape[2:]):
        return False
    return all(a <= b for a, b in zip(parameter.shape, value.shape, strict=True))


def _resize_positions(value: Tensor, parameter: Tensor) -> Tensor:
    """Resize the positions of a square grid of patches to the student's grid, bicubically."""
    (*_, count, width), num_own = value.shape, parameter.shape[-2]
    if count == num_own:
        return value
    side, own_side = int(count**0.5), int(num_own**0.5)
    prefix, own_prefix = count - side**2, num_own - own_side**2
    if prefix != own_prefix:
        return value[..., :0, :]  # fits nothing
    flat = value.reshape(count, width)
    grid = flat[prefix:].reshape(1, side, side, width).permute(0, 3, 1, 2)
    grid = F.interpolate(grid.float(), size=(own_side, own_side), mode="bicubic", antialias=True)
    resized = torch.cat([flat[:prefix], grid[0].permute(1, 2, 0).reshape(own_side**2, width).to(flat)])
    return resized.reshape(*value.shape[:-2], num_own, width)
