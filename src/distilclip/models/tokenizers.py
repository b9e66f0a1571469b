"""Open the tokenizer that belongs to a model, and describe what sets it apart."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import open_clip
from open_clip.tokenizer import HFTokenizer
from torch import Tensor

from distilclip.errors import InputError

Tokenizer = Callable[[list[str]], Tensor]


ARGUMENTS = ("clean", "strip_sep_token", "language")
"""What a model's config may say about its tokenizer. The rest would reach transformers, which can run foreign code."""


def open_tokenizer(source: str, config: dict[str, Any], *, name: str) -> Tokenizer:
    """Return the tokenizer of a model that open_clip reads from `source` (`local-dir:FOLDER`, `hf-hub:ORG/NAME`).

    `config` is the model's. A tokenizer of the hub is read from the model's folder where that holds its files, else
    from the hub. No code that comes with a tokenizer is run.

    Raises:
        InputError: it cannot be had, or the config asks for more than `ARGUMENTS`; `name` is the model's, for the
            message.
    """
    text = config.get("text_cfg") or {}
    hub_name = text.get("hf_tokenizer_name")
    arguments = _checked_arguments(text, name=name)
    context_length = text.get("context_length") or open_clip.tokenizer.DEFAULT_CONTEXT_LENGTH
    try:
        if not hub_name:
            return open_clip.SimpleTokenizer(context_length=context_length, **arguments)
        folder = source.removeprefix("local-dir:")
        is_beside = folder != source and os.path.exists(os.path.join(folder, "tokenizer_config.json"))
        return HFTokenizer(
            folder if is_beside else hub_name,
            context_length=context_length,
            tokenizer_mode=text.get("tokenizer_mode"),
            trust_remote_code=False,
            **arguments,
        )
    except (OSError, ImportError, ValueError, TypeError) as error:
        raise InputError(
            f"{name}: its tokenizer {hub_name or source!r} cannot be had: {_first_line(error)}. It is read through "
            "transformers from the hub, which needs the network once; later it is read from the hub's cache. Without a "
            "network: copy its files (tokenizer.json, tokenizer_config.json, ...) into a folder here and name that, "
            f'{{"base": "{name}", "text_cfg": {{"hf_tokenizer_name": "FOLDER"}}}}; or choose an architecture that has '
            "open_clip's own tokenizer, such as ViT-B-32."
        ) from error


def _checked_arguments(text: dict[str, Any], *, name: str) -> dict[str, Any]:
    """Return the tokenizer's arguments in a text config, and refuse those that are not known to be harmless."""
    arguments = text.get("tokenizer_kwargs") or {}
    refused = sorted(set(arguments) - set(ARGUMENTS)) if isinstance(arguments, dict) else [repr(arguments)]
    if refused:
        raise InputError(
            f"{name}: its config passes {', '.join(refused)} to the tokenizer (text_cfg.tokenizer_kwargs); only "
            f"{', '.join(ARGUMENTS)} are passed on, since others can run foreign code. Remove it from the config."
        )
    return arguments


def describe_tokenizer(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return what decides how captions are read besides the model's config: class, cleaning, context."""
    functions = {name: getattr(tokenizer, name, None) for name in ("clean_fn", "reduction_fn")}
    return {
        "class": type(tokenizer).__name__,
        "context_length": getattr(tokenizer, "context_length", None),
        **{name: getattr(function, "__name__", None) for name, function in functions.items()},
    }


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
