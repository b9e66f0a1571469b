"""An exported ONNX model is evaluated like the one that it was made from."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from distilclip.errors import InputError
from distilclip.evaluate.embedders import ONNX_RECORD
from distilclip.evaluate.encode import Encoder
from distilclip.export.int8 import write_int8
from distilclip.export.onnx_evaluation import ExportedClip, open_exported
from distilclip.export.onnx_runtime import RECORD
from distilclip.models.clip import Clip
from distilclip.stages.evaluate import Config, main
from tests.conftest import picture
from tests.sets.test_sets import write_own_sets


@pytest.fixture(scope="module")
def folder(onnx_folder: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """As `export` leaves it, with int8 encoders too."""
    out = tmp_path_factory.mktemp("exported")
    (out / "model").mkdir()
    for path in Path(onnx_folder).iterdir():
        (out / "model" / path.name).write_bytes(path.read_bytes())
    write_int8(str(out / "model"))
    return str(out)


@pytest.fixture
def sets(tmp_path: Path) -> tuple[str, str]:
    """A labelled set with training images, and pairs."""
    return write_own_sets(tmp_path, ["circle", "square"], num_train=3, num_test=3)


def config_of(out: Path, models: tuple[str, ...], sets: tuple[str, ...], **options: Any) -> Config:
    return Config(out=str(out), models=models, sets=sets, device="cpu", num_workers=0, **options)


def test_it_gives_the_models_embeddings_and_travels_to_workers(folder: str, tiny_clip: Clip) -> None:
    exported = open_exported(folder, name="small")
    assert isinstance(exported, Encoder)
    pixels = torch.stack([exported.preprocess(picture(seed)) for seed in range(3)])
    texts = ["a red circle", "two squares"]
    with torch.no_grad():
        image = tiny_clip.encode_image(torch.stack([tiny_clip.preprocess(picture(seed)) for seed in range(3)]))
        text = tiny_clip.encode_text(tiny_clip.tokenizer(texts))
    torch.testing.assert_close(exported.encode_image(pixels), image, atol=1e-4, rtol=0)
    torch.testing.assert_close(exported.encode_text(exported.tokenizer(texts)), text, atol=1e-4, rtol=0)
    assert torch.equal(pickle.loads(pickle.dumps(exported.preprocess))(picture(0)), pixels[0])
    assert exported.dim == tiny_clip.dim


def test_the_record_is_known_without_the_runtime() -> None:
    assert ONNX_RECORD == RECORD


def test_precisions_are_models_of_their_own(folder: str, onnx_folder: str) -> None:
    digests = {open_exported(folder, name="x", precision=precision).digest for precision in ("fp32", "int8")}  # type: ignore[arg-type]
    assert len(digests) == 2
    assert open_exported(onnx_folder, name="y").digest in digests


def test_it_is_evaluated_beside_the_model_it_was_made_from(
    folder: str, tiny_clip_folder: str, sets: tuple[str, str], tmp_path: Path
) -> None:
    models = (f"live={tiny_clip_folder}", f"small={folder}", f"small8={folder}#int8")
    result = main(config_of(tmp_path / "out", models, sets, teacher="live"))
    found = {(row["model"], row["set"], row["task"], row["metric"]): row for row in result["rows"]}
    for key in (("shape", "zero-shot", "top1"), ("pairs", "retrieval", "image_to_text_r1")):
        assert found[("small", *key)]["value"] == pytest.approx(found[("live", *key)]["value"])
    assert found["small", "shape", "agreement", "cosine"]["value"] == pytest.approx(1, abs=1e-4)
    assert 0.98 < found["small8", "shape", "agreement", "cosine"]["value"] < 1 - 1e-6
    probe = next(row for row in result["rows"] if (row["model"], row["task"]) == ("small", "linear-probe"))
    assert probe["reason"].endswith("use --probe-features projected")
    assert {model["name"]: model["num_parameters"] for model in result["models"]}["small"] is None


def test_projected_features_can_be_probed(folder: str, sets: tuple[str, str], tmp_path: Path) -> None:
    options: dict[str, Any] = {"tasks": ("knn-probe",), "probe_features": "projected"}
    (row, *_) = main(config_of(tmp_path / "out", (folder,), sets[:1], **options))["rows"]
    assert row["value"] is not None
    assert row["details"]["features"] == "projected"


def test_an_unknown_precision_and_a_missing_one_are_named(
    onnx_folder: str, sets: tuple[str, str], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="fp32 and int8, not 'int4'"):
        main(config_of(tmp_path / "a", (f"x={onnx_folder}#int4",), sets))
    with pytest.raises(InputError, match="holds no int8 encoders"):
        main(config_of(tmp_path / "b", (f"x={onnx_folder}#int8",), sets))


def test_no_features_before_the_projection(folder: str) -> None:
    exported: ExportedClip = open_exported(folder, name="small")
    assert exported.backbone_kind is None
    with pytest.raises(ValueError, match="no features before the projection"):
        exported.backbone_features(torch.zeros(1, 3, 32, 32))
