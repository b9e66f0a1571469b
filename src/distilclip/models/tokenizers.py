"""The tokenizer that belongs to a model, and what tells it from others."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import open_clip
from open_clip.tokenizer import HFTokenizer
from torch import Tensor

from distilclip.errors import InputError

Tokenizer = Callable[[list[str]], Tensor]


def open_tokenizer(source: str, config: dict[str, Any] | None, *, name: str) -> Tokenizer:
    """The tokenizer of a model that open_clip reads from `source` (`local-dir:FOLDER`, `hf-hub:ORG/NAME`).

    A tokenizer of the hub is read from the model's folder where that holds its files, else from the hub.

    Raises:
        InputError: it cannot be had; `name` is the model's, for the message.
    """
    text = (config or {}).get("text_cfg", {})
    hub_name = text.get("hf_tokenizer_name")
    folder = source.removeprefix("local-dir:")
    try:
        if hub_name and folder != source and not os.path.exists(os.path.join(folder, "tokenizer_config.json")):
            return HFTokenizer(
                hub_name,
                context_length=text.get("context_length", open_clip.tokenizer.DEFAULT_CONTEXT_LENGTH),
                tokenizer_mode=text.get("tokenizer_mode"),
                **text.get("tokenizer_kwargs", {}),
            )
        return open_clip.get_tokenizer(source)
    except (OSError, ImportError, ValueError) as error:
        raise InputError(
            f"{name}: its tokenizer {hub_name or source!r} cannot be had: {_first_line(error)}. It is read through "
            "transformers from the hub, which needs the network once; later it is read from the hub's cache."
        ) from error


def describe_tokenizer(tokenizer: Tokenizer) -> dict[str, Any]:
    """What decides how captions are read, beside what the model's config says: class, cleaning, context."""
    functions = {name: getattr(tokenizer, name, None) for name in ("clean_fn", "reduction_fn")}
    return {
        "class": type(tokenizer).__name__,
        "context_length": getattr(tokenizer, "context_length", None),
        **{name: getattr(function, "__name__", None) for name, function in functions.items()},
    }


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
