"""The tokenizer of a model's config: what the config may ask for, and that no foreign code runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
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


def test_a_model_saved_with_null_arguments_has_a_tokenizer_in_open_clip(tiny_clip_json: str, tmp_path: Path) -> None:
    create_clip(json.dumps(with_text(tiny_clip_json, tokenizer_kwargs=None)), seed=0).save(str(tmp_path))
    assert open_clip.get_tokenizer(f"local-dir:{tmp_path}")(["a cat"]).shape == (1, 12)


def test_a_tokenizer_of_the_hub_is_missed_before_weights_are_read_and_a_folder_helps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_clip_json: str
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r'"base": "ViT-B-16-SigLIP".*hf_tokenizer_name.*FOLDER'):
        load_clip("ViT-B-16-SigLIP", weights=str(tmp_path / "there_is_no_such_file.pt"))
    with pytest.raises(InputError, match="Without a network: copy its files"):
        create_clip("ViT-B-16-SigLIP")
    words = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "cat"])}
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    named = with_text(tiny_clip_json, hf_tokenizer_name=str(tmp_path))
    clip = create_clip(json.dumps(named), seed=0)
    assert clip.tokenizer(["a cat"])[0, :4].tolist() == [2, 4, 5, 3]


def test_unknown_arguments_are_named(tiny_clip_json: str) -> None:
    with pytest.raises(InputError, match="bpe_path"):
        create_clip(json.dumps(with_text(tiny_clip_json, tokenizer_kwargs={"bpe_path": "/etc/passwd"})), seed=0)
