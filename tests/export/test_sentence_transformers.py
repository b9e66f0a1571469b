from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from distilclip.errors import InputError
from distilclip.export.sentence_transformers_folder import write_sentence_transformers
from distilclip.models.clip import Clip, create_clip
from tests.conftest import picture
from tests.export.test_huggingface import changed, random_everywhere

transformers = pytest.importorskip("transformers")
CAPTIONS = ["a photo of a cat", "Two DOGS, running!", "it's " + "very " * 40 + "long"]


def test_the_folder_has_the_modules_and_is_transformers_folder_too(tiny_clip: Clip, tmp_path: Path) -> None:
    found = write_sentence_transformers(tiny_clip, str(tmp_path))
    assert all(value < 1e-5 for value in found["difference"].values())
    model, normalize = json.loads((tmp_path / "modules.json").read_text())
    assert (model["path"], model["type"]) == ("", "sentence_transformers.models.CLIPModel")
    assert (normalize["path"], normalize["type"]) == ("1_Normalize", "sentence_transformers.models.Normalize")
    assert (tmp_path / "1_Normalize" / "config.json").exists()
    settings = json.loads((tmp_path / "config_sentence_transformers.json").read_text())
    assert settings["similarity_fn_name"] == "cosine"
    assert transformers.CLIPModel.from_pretrained(tmp_path).config.projection_dim == tiny_clip.dim


def test_sentence_transformers_gives_the_same_embeddings(tmp_path: Path) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    clip = random_everywhere(create_clip(json.dumps(changed()), seed=1))
    write_sentence_transformers(clip, str(tmp_path))
    model = sentence_transformers.SentenceTransformer(str(tmp_path), device="cpu")
    images = [picture(seed, (64, 48)) for seed in range(3)]
    with torch.no_grad():
        own_text = clip.encode_text(clip.tokenizer(CAPTIONS))
        own_image = clip.encode_image(torch.stack([clip.preprocess(image) for image in images]))
    text, image = torch.tensor(model.encode(CAPTIONS)), torch.tensor(model.encode(images))
    torch.testing.assert_close(text, own_text, atol=1e-5, rtol=0)
    torch.testing.assert_close(image, own_image, atol=0.02, rtol=0)  # pixels resized by torchvision round otherwise
    torch.testing.assert_close(image.norm(dim=1), torch.ones(3), atol=1e-5, rtol=0)
    similarity = model.similarity(text, image)
    torch.testing.assert_close(similarity, text @ image.T, atol=1e-5, rtol=0)


def test_what_transformers_cannot_express_is_refused(tmp_path: Path) -> None:
    clip = create_clip(json.dumps(changed(vision_cfg={"timm_model_name": "cnn_w8"})), seed=1)
    with pytest.raises(InputError, match="cannot be a transformers CLIPModel"):
        write_sentence_transformers(clip, str(tmp_path))
    assert not list(tmp_path.iterdir())
