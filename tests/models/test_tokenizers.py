"""The tokenizer of a model's config: what the config may ask for, and that no foreign code runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from distilclip.errors import InputError
from distilclip.models.clip import create_clip, load_clip

TOKENIZER = """
from pathlib import Path
from transformers import PreTrainedTokenizer
Path("hacked").touch()
class Tok(PreTrainedTokenizer):
    pass
"""


def write_foreign_tokenizer(folder: Path) -> None:
    """Write a transformers tokenizer that brings its own code."""
    folder.mkdir(exist_ok=True)
    (folder / "tok.py").write_text(TOKENIZER)
    described = {"tokenizer_class": "Tok", "auto_map": {"AutoTokenizer": ["tok.Tok", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(described))


def with_text(tiny_clip_json: str, **values: Any) -> dict[str, Any]:
    """A tiny model config with further values in its text config."""
    config = json.loads(tiny_clip_json)
    config["text_cfg"].update(values)
    return config


def test_code_of_a_tokenizer_does_not_run(tmp_path: Path, tiny_clip_json: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_foreign_tokenizer(tmp_path / "foreign")
    asked = {"hf_tokenizer_name": "foreign", "tokenizer_kwargs": {"trust_remote_code": True}}
    with pytest.raises(InputError, match=r"passes trust_remote_code to the tokenizer .*only clean, strip_sep_token"):
        create_clip(json.dumps(with_text(tiny_clip_json, **asked)), seed=0)
    with pytest.raises(InputError, match="its tokenizer 'foreign' cannot be had"):
        create_clip(json.dumps(with_text(tiny_clip_json, hf_tokenizer_name="foreign")), seed=0)
    assert not Path("hacked").exists()


def test_code_of_a_tokenizer_in_a_model_folder_does_not_run(
    tmp_path: Path, tiny_clip_json: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    create_clip(tiny_clip_json, seed=0).save("model")
    write_foreign_tokenizer(tmp_path / "model")
    for kwargs, message in (({"trust_remote_code": True}, "passes trust_remote_code"), ({}, "cannot be had")):
        config = with_text(tiny_clip_json, hf_tokenizer_name="any", tokenizer_kwargs=kwargs)
        path = tmp_path / "model/open_clip_config.json"
        path.write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
        with pytest.raises(InputError, match=message):
            load_clip("model")
    assert not Path("hacked").exists()


@pytest.mark.parametrize("kwargs", [{"clean": "canonicalize"}, {}, None])
def test_harmless_arguments_pass(kwargs: dict[str, Any] | None, tiny_clip_json: str) -> None:
    clip = create_clip(json.dumps(with_text(tiny_clip_json, tokenizer_kwargs=kwargs)), seed=0)
    assert clip.settings["tokenizer"]["clean_fn"] == ("_clean_canonicalize" if kwargs else "_clean_lower")


def test_unknown_arguments_are_named(tiny_clip_json: str) -> None:
    with pytest.raises(InputError, match="bpe_path"):
        create_clip(json.dumps(with_text(tiny_clip_json, tokenizer_kwargs={"bpe_path": "/etc/passwd"})), seed=0)
