"""Write a model as a folder that `SentenceTransformer(folder)` loads: unit embeddings of pictures and captions."""

from __future__ import annotations

import json
from typing import Any

from distilclip import files
from distilclip.export.huggingface import write_huggingface
from distilclip.models.clip import Clip

_MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.CLIPModel"},
    {"idx": 1, "name": "1", "path": "1_Normalize", "type": "sentence_transformers.models.Normalize"},
]
"""The model itself lies beside modules.json, so that transformers reads the folder, too. The names are those that
every release of sentence-transformers from 2 on knows."""

_SETTINGS: dict[str, Any] = {
    "model_type": "SentenceTransformer",
    "prompts": {},
    "default_prompt_name": None,
    "similarity_fn_name": "cosine",
}


def write_sentence_transformers(clip: Clip, folder: str) -> dict[str, Any]:
    """Write transformers' folder of the model, and what sentence-transformers reads beside it.

    Returns and raises what `write_huggingface` does. sentence-transformers prepares pictures by transformers' default
    backend: the difference is `pixels_with_torchvision`.
    """
    found = write_huggingface(clip, folder)
    for name, content in (
        ("modules.json", _MODULES),
        ("config_sentence_transformers.json", _SETTINGS),
        (files.join("1_Normalize", "config.json"), {}),
    ):
        files.write_bytes(files.join(folder, name), json.dumps(content, indent=2).encode())
    return found
