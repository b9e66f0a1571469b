"""Choose the device that `--device` names, and the number format that `--precision` names."""

from __future__ import annotations

import torch

from distilclip.errors import InputError

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_device(name: str) -> torch.device:
    """Return a torch device; `auto` takes CUDA, then MPS, then the CPU. `InputError` where it cannot be used."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"The device {name!r} cannot be used: {error}. `auto` takes what there is.") from error
    return device
