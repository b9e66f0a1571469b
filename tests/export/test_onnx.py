"""ONNX encoders, their tokenizer and preprocessing, against torch and open_clip."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import open_clip
import pytest
import torch

from distilclip.errors import InputError
from distilclip.export.int8 import measure_int8, write_int8
from distilclip.export.onnx_files import MAX_BYTES, OPSET, write_onnx
from distilclip.export.onnx_runtime import OnnxClip, encoder_file, open_onnx, preprocess
from distilclip.export.parity_inputs import CAPTIONS, pictures
from distilclip.export.tokenizer_json import build_tokenizer, find_differences
from distilclip.models.clip import Clip, create_clip
from tests.conftest import TINY_CLIP, encoded, picture, write_tar

SIZES = ((40, 32), (32, 40), (32, 32), (33, 97), (501, 333), (16, 20), (64, 48))


@pytest.fixture(scope="module")
def exported(onnx_folder: str) -> OnnxClip:
    return open_onnx(onnx_folder, num_threads=1)


@pytest.mark.parametrize("num", [1, 3, 8])
def test_embeddings_equal_torchs_for_any_batch(exported: OnnxClip, tiny_clip: Clip, num: int) -> None:
    pictures = [picture(seed, SIZES[seed % len(SIZES)]) for seed in range(num)]
    captions = [f"a photo of number {seed}" + " and more" * seed for seed in range(num)]
    with torch.no_grad():
        image = tiny_clip.encode_image(torch.stack([tiny_clip.preprocess(p) for p in pictures])).numpy()
        text = tiny_clip.encode_text(tiny_clip.tokenizer(captions)).numpy()
    np.testing.assert_allclose(exported.encode_images(pictures), image, atol=1e-4)
    np.testing.assert_allclose(exported.encode_texts(captions), text, atol=1e-4)


def test_embeddings_have_unit_length_and_the_record_is_complete(exported: OnnxClip, tiny_clip: Clip) -> None:
    found = exported.encode_texts(["one", "two"])
    assert found.shape == (2, exported.dim) == (2, tiny_clip.dim)
    assert found.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
    assert exported.bias is None
    assert exported.scale == pytest.approx(float(tiny_clip.scale.detach()))


@pytest.mark.parametrize("mode", ["shortest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_pixels_equal_open_clips(mode: str, interpolation: str) -> None:
    cfg = {
        "size": (32, 32) if mode == "shortest" else (24, 40),
        "mean": (0.5, 0.4, 0.3),
        "std": (0.2, 0.3, 0.4),
        "interpolation": interpolation,
        "resize_mode": mode,
    }
    transform = open_clip.image_transform(cfg["size"], is_train=False, **{k: cfg[k] for k in list(cfg)[1:]})  # type: ignore[arg-type]
    for seed, size in enumerate(SIZES):
        np.testing.assert_allclose(
            preprocess(picture(seed, size), cfg), transform(picture(seed, size)).numpy(), atol=1e-6
        )


@pytest.mark.parametrize("size", [224, 240, 336])
def test_pixels_equal_open_clips_at_common_sizes(size: int) -> None:
    transform = open_clip.image_transform(size, is_train=False)
    normalize = transform.transforms[-1]
    cfg = {"size": size, "mean": normalize.mean, "std": normalize.std}
    for image in pictures((size + 1, size), (size + 3, size), (size, size + 3)):
        found = preprocess(image, {**cfg, "interpolation": "bicubic", "resize_mode": "shortest"})
        np.testing.assert_allclose(found, transform(image).numpy(), atol=1e-6)


def test_a_cnn_of_224_pixels_is_written(tmp_path: Path) -> None:
    config = copy.deepcopy(TINY_CLIP)
    config["vision_cfg"] = {"image_size": 224, "timm_model_name": "cnn_w8", "timm_pool": "", "timm_proj": "linear"}
    found = write_onnx(create_clip(json.dumps(config), seed=1), str(tmp_path))
    assert all(value <= 1e-5 for value in found["difference"].values())


def test_the_tokenizer_file_reads_captions_as_open_clip_does(exported: OnnxClip, tiny_clip: Clip) -> None:
    captions = [
        *CAPTIONS,
        "The quick brown fox — “jumps” over 13 lazy dogs' tails!?",
        "ÅNGSTRÖM straße ﬃ",
        "a\u0301 e\u0301",
    ]
    agreed = [c for c in captions if "ﬃ" not in c]  # ftfy spells ligatures out
    found = exported.tokenizer.encode_batch(agreed)
    np.testing.assert_array_equal([f.ids for f in found], tiny_clip.tokenizer(agreed).numpy())
    assert find_differences(exported.tokenizer, tiny_clip, captions) == [
        captions.index(c) for c in captions if "ﬃ" in c
    ]


def test_files_state_their_opset_and_name_no_path_of_this_machine(onnx_folder: str) -> None:
    for tower in ("image", "text"):
        path = Path(onnx_folder) / encoder_file(tower, "fp32")  # type: ignore[arg-type]
        model = onnx.load(path)
        assert {o.version for o in model.opset_import if o.domain == ""} == {OPSET}
        assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param
        assert b"site-packages" not in path.read_bytes()
        assert str(Path(__file__).parents[2]).encode() not in path.read_bytes()


@pytest.mark.slow
def test_a_second_export_gives_the_same_bytes(onnx_folder: str, tiny_clip: Clip, tmp_path: Path) -> None:
    found = write_onnx(tiny_clip, str(tmp_path))
    assert found["opset"] == OPSET
    assert all(value <= 1e-5 for value in found["difference"].values())
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["clip.json", "image.onnx", "text.onnx", "tokenizer.json"]
    for name in names:
        assert (tmp_path / name).read_bytes() == (Path(onnx_folder) / name).read_bytes()


def test_a_difference_to_torch_is_an_error(
    onnx_folder: str, tiny_clip: Clip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check compares what the files give: here they are those of another model."""
    content = {tower: (Path(onnx_folder) / f"{tower}.onnx").read_bytes() for tower in ("image", "text")}
    monkeypatch.setattr("distilclip.export.onnx_files._export", lambda module, example, tower, name: content[tower])
    config = json.dumps(tiny_clip.model_cfg)
    with pytest.raises(InputError, match=r"differs from torch by .*image"):
        write_onnx(create_clip(config, seed=8), str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_written_is_named_before_anything_is_exported(
    tiny_clip: Clip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    longest = dataclasses.replace(tiny_clip, preprocess_cfg={**tiny_clip.preprocess_cfg, "resize_mode": "longest"})
    with pytest.raises(InputError, match="resize_mode 'longest'"):
        write_onnx(longest, str(tmp_path))
    masked = open_clip.SimpleTokenizer(context_length=12, reduction_mask="simple")
    with pytest.raises(InputError, match="is not CLIP's own byte-pair encoding"):
        write_onnx(dataclasses.replace(tiny_clip, tokenizer=masked), str(tmp_path))
    canonical = open_clip.SimpleTokenizer(context_length=12, clean="canonicalize")
    with pytest.raises(InputError, match="is not CLIP's own byte-pair encoding"):
        build_tokenizer(dataclasses.replace(tiny_clip, tokenizer=canonical))
    monkeypatch.setattr("distilclip.export.onnx_files.MAX_BYTES", 1000)
    with pytest.raises(InputError, match="less than 2 GiB"):
        write_onnx(tiny_clip, str(tmp_path))
    assert MAX_BYTES > 2 * 10**9
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_model_of_pictures_that_are_no_squares_is_exported_as_such(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its towers are together larger than the limit of a file; each has a file of its own."""
    config = {**TINY_CLIP, "vision_cfg": {**TINY_CLIP["vision_cfg"], "image_size": [16, 48]}}
    cfg = {"size": [16, 48], "mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bicubic", "resize_mode": "squash"}
    clip = create_clip(json.dumps(config), seed=0, preprocess_cfg=cfg)
    sizes = {name: value.nbytes for name, value in clip.model.state_dict().items()}
    text = sum(size for name, size in sizes.items() if not name.startswith("visual."))
    monkeypatch.setattr("distilclip.export.onnx_files.MAX_BYTES", text)
    assert sum(sizes.values()) > text
    write_onnx(clip, str(tmp_path))
    pictures = [picture(seed, size) for seed, size in enumerate(SIZES)]
    with torch.no_grad():
        image = clip.encode_image(torch.stack([clip.preprocess(p) for p in pictures])).numpy()
    np.testing.assert_allclose(open_onnx(str(tmp_path)).encode_images(pictures), image, atol=1e-4)


def test_a_missing_model_and_a_missing_precision_are_named(onnx_folder: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no clip\.json"):
        open_onnx(str(tmp_path))
    with pytest.raises(InputError, match="--quantize int8"):
        open_onnx(onnx_folder, precision="int8")


@pytest.fixture(scope="module")
def quantized(onnx_folder: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, dict[str, int]]]:
    folder = tmp_path_factory.mktemp("int8")
    for path in Path(onnx_folder).iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return str(folder), write_int8(str(folder))


def test_int8_is_smaller_and_measured_on_real_pairs(
    quantized: tuple[str, dict[str, dict[str, int]]], tmp_path: Path
) -> None:
    folder, sizes = quantized
    assert sizes["text"]["int8"] < sizes["text"]["fp32"] / 3
    assert sizes["image"]["int8"] < sizes["image"]["fp32"]
    members = [
        (f"{row:02d}.{kind}", content)
        for row in range(12)
        for kind, content in (("jpg", encoded(picture(row))), ("txt", f"number {row}".encode()))
        if (row, kind) != (3, "txt")
    ]
    members[0] = ("00.jpg", b"no picture")
    tar = write_tar(tmp_path / "0.tar", members)
    lost = measure_int8(folder, [tar], num_samples=9, batch_size=4)
    assert (lost["num_samples"], lost["num_unusable"]) == (9, 2)
    full, small = (open_onnx(folder, precision=precision) for precision in ("fp32", "int8"))
    rows = [1, 2, 4, 5, 6, 7, 8, 9, 10]
    from distilclip.data.samples import decode_image

    pictures = [decode_image(encoded(picture(row))) for row in rows]
    cosine = (full.encode_images(pictures) * small.encode_images(pictures)).sum(1)
    assert lost["cosine"]["image"]["mean"] == pytest.approx(cosine.mean(), abs=1e-4)
    assert 0.98 < lost["cosine"]["image"]["least"] <= lost["cosine"]["image"]["mean"] < 1
    captions = [f"number {row}" for row in rows]
    nearest = [(m.encode_images(pictures) @ m.encode_texts(captions).T).argmax(1) for m in (full, small)]
    assert lost["same_nearest"]["image_to_text"] == pytest.approx((nearest[0] == nearest[1]).mean(), abs=0.12)
    assert lost["recall_at_1"]["fp32"]["image_to_text"] == pytest.approx((nearest[0] == np.arange(9)).mean())


def test_int8_weights_are_unsigned(quantized: tuple[str, dict[str, dict[str, int]]]) -> None:
    """Signed ones saturate on AVX2 without VNNI."""
    types = {i.data_type for i in onnx.load(Path(quantized[0]) / "text.int8.onnx").graph.initializer}
    assert onnx.TensorProto.UINT8 in types
    assert onnx.TensorProto.INT8 not in types


def test_no_usable_pair_is_an_error(quantized: tuple[str, dict[str, dict[str, int]]], tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "0.tar", [("0.jpg", b"none"), ("0.txt", b"a")])
    with pytest.raises(InputError, match="no usable pair"):
        measure_int8(quantized[0], [tar], num_samples=5, batch_size=4)


def test_a_tower_that_torch_cannot_export_is_named(
    tiny_clip: Clip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*unused: object, **options: object) -> None:
        raise torch.onnx.OnnxExporterError("a page of advice") from RuntimeError("no such operator")

    monkeypatch.setattr(torch.onnx, "export", fail)
    with pytest.raises(InputError, match="cannot export its image tower to ONNX: no such operator"):
        write_onnx(tiny_clip, str(tmp_path))


def test_onnx_runtime_is_new_enough_for_the_opset() -> None:
    assert tuple(map(int, onnxruntime.__version__.split(".")[:2])) >= (1, 14)
