"""Refuse the constants of a loss that no loss can have: they would give a number, and a wrong one."""

from __future__ import annotations

import math
import numbers
from typing import Any

from torch import Tensor

from distilclip.errors import InputError


def check_scale(value: Any, *, name: str = "scale") -> None:
    """Raise `InputError` unless a factor of cosines is positive and finite.

    A learned scale, or one on an accelerator, is not looked at: the one is exp of a parameter, and its training stops
    at the first loss that is not finite; the other would have to be waited for.
    """
    if isinstance(value, Tensor):
        if value.requires_grad or value.device.type != "cpu" or value.numel() != 1:
            return
        value = value.item()
    if not (isinstance(value, numbers.Real) and 0 < float(value) < math.inf):
        raise InputError(f"{name} is {value!r}; it must be positive and finite: exp of the log-scale, 1 / temperature.")


def check_share(value: Any, *, name: str) -> None:
    """Raise `InputError` unless a share is a number from 0 to 1."""
    if not (isinstance(value, numbers.Real) and 0 <= float(value) <= 1):
        raise InputError(f"{name} is {value!r}; it is a share, from 0 to 1.")
