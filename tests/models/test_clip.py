from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import huggingface_hub
import numpy as np
import open_clip
import pytest
import tokenizers
import torch
import transformers

from distilclip.errors import InputError
from distilclip.models.architectures import model_config
from distilclip.models.clip import create_clip, load_clip, normalise_pixels
from tests.conftest import TINY_CLIP, picture


def test_saved_model_loads_with_equal_digest_and_embeddings(tiny_clip_folder: str) -> None:
    first, second = load_clip(tiny_clip_folder), load_clip(tiny_clip_folder)
    pixels = torch.randn(3, 3, 32, 32)
    assert first.digest == second.digest
    assert torch.equal(first.encode_image(pixels), second.encode_image(pixels))


def test_open_clip_itself_loads_a_saved_model(tiny_clip_folder: str) -> None:
    ours = load_clip(tiny_clip_folder)
    theirs = open_clip.create_model(f"local-dir:{tiny_clip_folder}").eval()
    tokens = ours.tokenizer(["a red circle"])
    expected = theirs.encode_text(tokens, normalize=True)
    assert torch.allclose(ours.encode_text(tokens), expected)


def test_a_builtin_name_with_a_local_weights_file(tmp_path: Path) -> None:
    source = create_clip("ViT-S-32-alt", seed=1)
    path = str(tmp_path / "weights.pt")
    torch.save(source.model.state_dict(), path)
    assert load_clip("ViT-S-32-alt", weights=path).digest == source.digest


def test_weights_that_unpickle_objects_are_refused(tmp_path: Path) -> None:
    path = str(tmp_path / "weights.pt")
    torch.save({"state_dict": {"evil": Path("x")}}, path)
    with pytest.raises(InputError, match="more than tensors"):
        load_clip("ViT-S-32-alt", weights=path)


def test_seed_fixes_weights_and_leaves_the_callers_random_state(tiny_clip_json: str) -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    digests = [create_clip(tiny_clip_json, seed=seed).digest for seed in (1, 1, 2)]
    assert torch.equal(torch.rand(1), expected)
    assert digests[0] == digests[1] != digests[2]


def test_embeddings_are_unit_and_backbone_features_are_before_the_projection(tiny_clip_folder: str) -> None:
    clip = load_clip(tiny_clip_folder)
    pixels = torch.stack([clip.preprocess(picture(seed)) for seed in range(3)])
    image, text = clip.encode_image(pixels), clip.encode_text(clip.tokenizer(["a", "b"]))
    assert torch.allclose(image.norm(dim=1), torch.ones(3))
    assert torch.allclose(text.norm(dim=1), torch.ones(2))
    assert (clip.dim, clip.context_length, clip.image_size) == (16, 12, 32)
    features = clip.backbone_features(pixels)
    assert features.shape == (3, 32)
    projected = torch.nn.functional.normalize(features @ clip.model.visual.proj, dim=1)
    assert torch.allclose(projected, image, atol=1e-6)
    assert torch.equal(clip.encode_image(pixels), image)  # the projection is back in place


def test_timm_tower_has_backbone_features() -> None:
    vision = {"timm_model_name": "test_resnet", "timm_pool": "avg", "timm_proj": "linear", "image_size": 32}
    clip = create_clip(json.dumps(TINY_CLIP | {"vision_cfg": vision}), seed=0)
    assert clip.backbone_features(torch.zeros(2, 3, 32, 32)).shape[0] == 2
    assert clip.encode_image(torch.zeros(2, 3, 32, 32)).shape == (2, 16)


def test_pixels_are_normalised_as_the_preprocessing_does(tiny_clip_folder: str) -> None:
    clip = load_clip(tiny_clip_folder)
    image = picture(0, (32, 32))
    pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)
    assert torch.allclose(normalise_pixels(pixels[None], clip.preprocess_cfg)[0], clip.preprocess(image), atol=1e-5)


def test_remote_folder_loads_like_a_local_one(tiny_clip_json: str) -> None:
    clip = create_clip(tiny_clip_json, seed=1)
    clip.save("memory://models/tiny")
    assert load_clip("memory://models/tiny").digest == clip.digest


def test_architecture_from_a_file(tmp_path: Path, tiny_clip_json: str) -> None:
    path = tmp_path / "tiny.json"
    path.write_text(tiny_clip_json)
    assert model_config(str(path)) == TINY_CLIP


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        ("ViT-B-23", "Did you mean 'ViT-B-32'"),
        ("nowhere.json", "does not exist"),
        ("{not json", "not valid JSON"),
        ('{"embed_dim": 4}', r"lacks \['text_cfg', 'vision_cfg'\]"),
        (json.dumps(TINY_CLIP | {"vision_cfg": {"imag_size": 1}}), "cannot build the model 'custom'"),
    ],
)
def test_bad_architectures_are_named(architecture: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        create_clip(architecture)


def test_models_without_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="needs trained weights"):
        load_clip("ViT-B-32")
    with pytest.raises(InputError, match="neither an open_clip architecture nor a folder"):
        load_clip(str(tmp_path))
    with pytest.raises(InputError, match="does not exist"):
        load_clip("ViT-B-32", weights="nowhere.pt")


def test_weights_of_another_architecture_are_refused(tmp_path: Path, tiny_clip_json: str) -> None:
    path = str(tmp_path / "weights.pt")
    torch.save(create_clip(tiny_clip_json, seed=1).model.state_dict(), path)
    with pytest.raises(InputError, match="do not fit the architecture 'ViT-S-32-alt'"):
        load_clip("ViT-S-32-alt", weights=path)


def test_a_folder_of_another_stage_is_refused(tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text('{"stage": "embed"}')
    with pytest.raises(InputError, match="was written by `distilclip embed`"):
        load_clip(str(tmp_path))


def test_the_digest_is_of_weights_and_the_settings_of_the_rest(tiny_clip_json: str) -> None:
    plain = create_clip(tiny_clip_json, seed=1)
    quick = create_clip(json.dumps(TINY_CLIP | {"quick_gelu": True}), seed=1)
    pixels = torch.randn(1, 3, 32, 32)
    assert plain.digest == quick.digest
    assert not torch.allclose(plain.encode_image(pixels), quick.encode_image(pixels))
    assert plain.settings != quick.settings
    assert plain.settings == create_clip(tiny_clip_json, seed=2).settings
    canonical = open_clip.SimpleTokenizer(context_length=12, clean="canonicalize")
    assert dataclasses.replace(plain, tokenizer=canonical).settings != plain.settings


def test_an_unfit_export_says_what_can_be_read(tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text('{"stage": "export", "what": "huggingface", "model": "model"}')
    with pytest.raises(InputError, match=r"export of the kind huggingface.*--what open_clip"):
        load_clip(str(tmp_path))


def test_a_hub_model_that_cannot_be_had_is_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(spec: str) -> None:
        raise RuntimeError(f"Failed initial config/weights load from HF Hub {spec}")

    monkeypatch.setattr(open_clip, "create_model_from_pretrained", offline)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # else it asks the network, again and again
    with pytest.raises(InputError, match="hf-hub:org/name cannot be loaded; once, that needs the network"):
        load_clip("hf-hub:org/name")


@pytest.fixture
def words(tmp_path: Path) -> str:
    """A folder with a tokenizer of two words, as the hub would hold it."""
    vocabulary = {"[PAD]": 0, "[UNK]": 1, "red": 2, "circle": 3}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    folder = str(tmp_path / "words")
    transformers.PreTrainedTokenizerFast(tokenizer_object=model, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(
        folder
    )
    return folder


def test_a_tokenizer_of_the_hub_is_found_without_its_files_in_the_folder(tmp_path: Path, words: str) -> None:
    text = {**TINY_CLIP["text_cfg"], "hf_tokenizer_name": words}  # type: ignore[dict-item]
    clip = create_clip(json.dumps({**TINY_CLIP, "text_cfg": text}), seed=1)
    assert clip.tokenizer(["red circle", "blue"]).tolist() == [[2, 3] + [0] * 10, [1] + [0] * 11]
    clip.save(str(tmp_path / "model"))
    assert load_clip(str(tmp_path / "model")).tokenizer(["circle"])[0, 0] == 3


def test_a_tokenizer_that_cannot_be_had_is_bad_input(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = {**TINY_CLIP["text_cfg"], "hf_tokenizer_name": str(tmp_path / "nowhere")}  # type: ignore[dict-item]
    with pytest.raises(InputError, match=r"custom: its tokenizer .*nowhere' cannot be had"):
        create_clip(json.dumps({**TINY_CLIP, "text_cfg": text}))
