"""Weights apart from their architecture: files, tags, archives, and how images are prepared for them."""

from __future__ import annotations

import json
import warnings
import zipfile
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch

from distilclip.errors import InputError
from distilclip.models.clip import Clip, create_clip, load_clip
from distilclip.models.weights import agreed_preprocessing, find_weights, published_preprocessing

NAME = "ViT-S-32-alt"  # small, and without tags of its own
OPENAI = {"mean": (0.48, 0.46, 0.41), "std": (0.27, 0.26, 0.28), "interpolation": "bicubic", "resize_mode": "shortest"}
HALVES = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "interpolation": "bicubic", "resize_mode": "squash"}


def publish(monkeypatch: pytest.MonkeyPatch, **tags: dict[str, Any]) -> None:
    """Give the small architecture published weights."""
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, NAME, tags)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = str(tmp_path_factory.mktemp("weights") / "weights.pt")
    torch.save(create_clip(NAME, seed=1).model.state_dict(), path)
    return path


@pytest.mark.parametrize(
    ("architecture", "mean", "std", "interpolation", "resize_mode"),
    [
        ("ViT-B-16-SigLIP", [0.5] * 3, [0.5] * 3, "bicubic", "squash"),
        ("MobileCLIP-S1", [0.0] * 3, [1.0] * 3, "bilinear", "shortest"),
        ("ViT-L-14-CLIPA", [0.485, 0.456, 0.406], [0.229, 0.224, 0.225], "bilinear", "squash"),
    ],
)
def test_what_all_published_weights_agree_on(
    architecture: str, mean: list[float], std: list[float], interpolation: str, resize_mode: str
) -> None:
    assert agreed_preprocessing(architecture) == {
        "mean": mean,
        "std": std,
        "interpolation": interpolation,
        "resize_mode": resize_mode,
    }


def test_weights_without_agreement_or_publication_have_none() -> None:
    tags = {tag for tags in published_preprocessing("ViT-L-14").values() for tag in tags}
    assert {"openai", "laion2b_s32b_b82k"} <= tags
    assert len(published_preprocessing("ViT-L-14")) == 2
    assert agreed_preprocessing("ViT-L-14") == agreed_preprocessing(NAME) == {}


def test_a_weights_file_gets_the_preprocessing_of_the_published_weights(
    weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert load_clip(NAME, weights=weights).preprocess_cfg["mean"] == pytest.approx([0.4815, 0.4578, 0.4082], abs=1e-4)
    publish(monkeypatch, first=HALVES, second=HALVES)
    clip = load_clip(NAME, weights=weights)
    assert clip.preprocess_cfg["mean"] == [0.5, 0.5, 0.5]
    assert clip.preprocess_cfg["resize_mode"] == "squash"


def test_where_published_weights_differ_the_files_own_config_decides(
    tmp_path: Path, weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(monkeypatch, first=OPENAI, second=HALVES)
    path = tmp_path / "copy.pt"
    path.write_bytes(Path(weights).read_bytes())
    with pytest.raises(InputError, match=r"(?s)nothing says which .*copy.pt are.*\(first\).*\(second\)"):
        load_clip(NAME, weights=str(path))
    assert create_clip(NAME, seed=0).preprocess_cfg["resize_mode"] == "shortest"  # a student is not refused
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"preprocess_cfg": HALVES}))
    assert load_clip(NAME, weights=str(path)).preprocess_cfg["resize_mode"] == "squash"


def test_a_tag_is_downloaded_with_its_preprocessing(weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(monkeypatch, first=OPENAI, second={**HALVES, "file": weights})  # open_clip's word for one that is there
    assert find_weights(NAME, "second")[0] == weights
    assert load_clip(NAME, weights="second").preprocess_cfg["resize_mode"] == "squash"


def test_a_tag_that_cannot_be_downloaded_is_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(published: dict[str, Any]) -> str:
        raise FileNotFoundError("Failed to download file")

    publish(monkeypatch, first=OPENAI)
    monkeypatch.setattr(open_clip, "download_pretrained", offline)
    with pytest.raises(InputError, match=r"'first' is a tag of .* cannot be downloaded: Failed to download file"):
        find_weights(NAME, "first")
    with pytest.raises(InputError, match=r"'frst' does not exist. Nor is it one of open_clip's tags.*'first'"):
        find_weights(NAME, "frst")


def test_a_tag_of_the_other_activation_names_the_architecture() -> None:
    with pytest.raises(InputError, match="'openai' was trained with QuickGELU: name the architecture ViT-B-32-quick"):
        find_weights("ViT-B-32", "openai")


@pytest.fixture
def archive(tmp_path: Path, tiny_clip_json: str) -> tuple[Clip, str]:
    """A model and its TorchScript archive, with the values that OpenAI's have beside the weights."""
    clip = create_clip(tiny_clip_json, seed=3)
    traced = create_clip(tiny_clip_json, seed=3).model
    for name, value in (("input_resolution", 32), ("context_length", 12), ("vocab_size", 49408)):
        if hasattr(traced, name):
            delattr(traced, name)
        traced.register_buffer(name, torch.tensor(value))
    traced.attn_mask = None  # OpenAI's archives have no such entry
    path = str(tmp_path / "model.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        example = (torch.zeros(2, 3, 32, 32), clip.tokenizer(["a", "b"]))
        torch.jit.save(torch.jit.trace(traced, example, check_trace=False), path)
    return clip, path


def test_an_archive_as_openai_publishes_them_is_read(
    archive: tuple[Clip, str], tmp_path: Path, tiny_clip_json: str
) -> None:
    clip, path = archive
    (tmp_path / "tiny.json").write_text(tiny_clip_json)
    assert load_clip(str(tmp_path / "tiny.json"), weights=path).digest == clip.digest


def test_an_archive_needs_the_architecture_with_its_activation(archive: tuple[Clip, str]) -> None:
    with pytest.raises(InputError, match="trained with QuickGELU: name the architecture ViT-B-32-quickgelu"):
        find_weights("ViT-B-32", archive[1])
    assert find_weights("ViT-B-32-quickgelu", archive[1])[0] == archive[1]
    with pytest.raises(InputError, match="do not fit the architecture"):
        load_clip(NAME, weights=archive[1])


class _Writes(torch.nn.Module):
    """A TorchScript module whose `__setstate__` overwrites a file when torch.jit.load reads it."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path
        self.training = False

    @torch.jit.export
    def __getstate__(self) -> tuple[str, bool]:
        return self.path, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[str, bool]) -> None:
        self.path = state[0]
        self.training = state[1]
        torch.save(torch.zeros(1), state[0])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def test_no_code_of_an_archive_runs(tmp_path: Path) -> None:
    victim = tmp_path / "victim.txt"
    victim.write_text("precious")
    path = str(tmp_path / "model.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(_Writes(str(victim))), path)
        torch.jit.load(path)  # what the archive is about
        assert victim.read_bytes() != b"precious"
    victim.write_text("precious")
    with pytest.raises(InputError, match="do not fit the architecture"):
        load_clip(f"{NAME}-quickgelu" if f"{NAME}-quickgelu" in open_clip.list_models() else NAME, weights=path)
    assert victim.read_text() == "precious"


@pytest.mark.parametrize(
    ("name", "content"),
    [("os.system", b"cposix\nsystem\n(S'touch hacked'\ntR."), ("builtins.eval", b"cbuiltins\neval\n(S'1'\ntR.")],
)
def test_an_archive_whose_pickle_names_a_function_is_refused(
    name: str, content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with zipfile.ZipFile("model.pt", "w") as archive:
        archive.writestr("model/data.pkl", content)
        archive.writestr("model/constants.pkl", b"")
    with pytest.raises(InputError, match=r"model.pt is not loaded.*(posix.system|builtins.eval).*neither a module"):
        load_clip(NAME, weights="model.pt")
    assert not Path("hacked").exists()


def test_a_damaged_archive_is_bad_input(archive: tuple[Clip, str], tiny_clip_json: str, tmp_path: Path) -> None:
    (tmp_path / "tiny.json").write_text(tiny_clip_json)
    with zipfile.ZipFile(archive[1]) as whole, zipfile.ZipFile(tmp_path / "short.pt", "w") as short:
        for entry in whole.namelist():
            content = whole.read(entry)
            short.writestr(entry, content[:-4] if entry.endswith("data/0") else content)
    with pytest.raises(InputError, match=r"short.pt is not loaded.*storage 0 has"):
        load_clip(str(tmp_path / "tiny.json"), weights=str(tmp_path / "short.pt"))
