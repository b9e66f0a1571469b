from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from distilclip import stage_folder
from distilclip.config import build
from distilclip.configs.export import MEANINGFUL, Config
from distilclip.errors import InputError
from distilclip.export.curated_tars import tar_path
from distilclip.export.selection import open_selection
from distilclip.models.clip import load_clip
from distilclip.options import option_fields
from distilclip.stage_calls import build_config
from distilclip.stages.export import main
from tests.conftest import TINY_CLIP, encoded, picture, write_tar
from tests.export.conftest import Made, make, write_balance


def options(**values: Any) -> Config:
    """A Config from options by their flags' names, whatever group they are in."""
    return build_config(Config, values, stage="export")


@pytest.fixture
def made(tmp_path: Path) -> Made:
    """A small store with groups; see `make`."""
    return make(tmp_path)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file that says what was found."""
    found = {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
    return {name: content for name, content in found.items() if name not in ("config.json", "env.json")}


def test_tars_are_curated_and_counted(made: Made, tmp_path: Path) -> None:
    result = main(options(what="tars", store=made.store, groups=made.groups, out=str(tmp_path / "out")))
    assert result == {
        "stage": "export",
        "what": "tars",
        "num_rows": 21,
        "num_tars": 3,
        "num_samples": 12,
        "num_bytes": sum(os.path.getsize(tar_path(str(tmp_path / "out"), shard)) for shard in range(3)),
        "num_renamed": 0,
    }
    again = main(options(what="tars", store=made.store, groups=made.groups, out=str(tmp_path / "out")))
    assert again == result


def test_processes_write_the_same_bytes(made: Made, tmp_path: Path) -> None:
    shared: dict[str, Any] = {"what": "tars", "store": made.store, "groups": made.groups, "samples_per_tar": 5}
    main(options(**shared, out=str(tmp_path / "here")))
    main(options(**shared, out=str(tmp_path / "there"), engine="processes", engine_workers=2))
    assert contents(tmp_path / "there") == contents(tmp_path / "here")


def test_a_killed_export_goes_on_to_the_same_bytes(made: Made, tmp_path: Path) -> None:
    """The process is killed while it writes its second tar; a store of pipes could not be killed more precisely."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    main(options(what="tars", store=made.store, groups=made.groups, out=str(whole)))
    code = (
        "import sys, time\n"
        "from distilclip.export import curated_tars\n"
        "from distilclip.stage_calls import build_config\n"
        "from distilclip.stages.export import Config, main\n"
        "check = curated_tars._check\n"
        "def slow(span, key, digest, *, uri, row):\n"
        "    check(span, key, digest, uri=uri, row=row)\n"
        "    if uri.endswith('1.tar') and row == 5:\n"
        "        print('now', flush=True)\n"
        "        time.sleep(60)\n"
        "curated_tars._check = slow\n"
        f"values = dict(what='tars', store={made.store!r}, groups={made.groups!r}, out={str(cut)!r})\n"
        "main(build_config(Config, values, stage='export'))\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "now\n"
        process.send_signal(signal.SIGKILL)
    assert len(list((cut / "tars").glob("*.tmp"))) == 1  # the half-written one
    assert not (cut / "result.json").exists()
    finished = (cut / "tars/00000.tar").stat().st_mtime_ns
    main(options(what="tars", store=made.store, groups=made.groups, out=str(cut)))
    assert contents(cut) == contents(whole)
    assert (cut / "tars/00000.tar").stat().st_mtime_ns == finished


def test_keys_subset_and_clip_retrieval_are_of_the_kept_rows(made: Made, tmp_path: Path) -> None:
    shared: dict[str, Any] = {"store": made.store, "groups": made.groups}
    keys = main(options(what="keys", out=str(tmp_path / "keys"), **shared))
    assert (keys["num_keys"], keys["num_ambiguous"], keys["plain"]) == (12, 8, False)
    subset = main(options(what="subset", out=str(tmp_path / "subset"), **shared))
    assert (subset["num_samples"], subset["num_uids"]) == (12, 12)
    retrieval = main(options(what="clip-retrieval", out=str(tmp_path / "npy"), **shared))
    assert retrieval["num_samples"] == 12
    assert np.load(tmp_path / "npy/img_emb/img_emb_2.npy").shape == (4, 4)


def test_a_subset_file_selects_what_it_was_written_from(made: Made, tmp_path: Path) -> None:
    main(options(what="subset", out=str(tmp_path / "subset"), store=made.store, groups=made.groups))
    uids = np.load(tmp_path / "subset/subset.npy")
    assert (uids == np.sort(uids)).all()
    subset = str(tmp_path / "subset/subset.npy")
    main(options(what="tars", out=str(tmp_path / "by_uid"), store=made.store, subset=subset))
    main(options(what="tars", out=str(tmp_path / "by_groups"), store=made.store, groups=made.groups))
    by_uid, by_groups = contents(tmp_path / "by_uid"), contents(tmp_path / "by_groups")
    differing = {name for name in {*by_uid, *by_groups} if by_uid.get(name) != by_groups.get(name)}
    assert differing == {"inputs.json", "subset.json"}


def test_a_subset_that_changed_between_two_runs_is_refused(made: Made, tmp_path: Path) -> None:
    uids = np.array([(0, 0), (0, 7919)], "u8,u8")
    np.save(tmp_path / "subset.npy", uids)
    config = options(what="tars", out=str(tmp_path / "out"), store=made.store, subset=str(tmp_path / "subset.npy"))
    assert main(config)["num_samples"] == 2
    (tmp_path / "out/result.json").unlink()
    np.save(tmp_path / "subset.npy", uids[:1])
    with pytest.raises(InputError, match=r"whose rows subset\.npy chooses, was made from other inputs"):
        main(config)


def test_moved_data_are_found(made: Made, tmp_path: Path) -> None:
    (tmp_path / "data").rename(tmp_path / "moved")
    config: dict[str, Any] = {"what": "tars", "store": made.store}
    with pytest.raises(InputError, match="is missing"):
        main(options(**config, out=str(tmp_path / "a")))
    result = main(options(**config, out=str(tmp_path / "b"), data=(str(tmp_path / "moved/*.tar"),)))
    assert result["num_samples"] == 18  # without groups, every valid row


def test_groups_of_another_store_are_refused(made: Made, tmp_path: Path) -> None:
    other = make(tmp_path / "other")
    write_balance(made.groups, open_selection(other.store).store)
    stage_folder.write_json(f"{made.groups}/inputs.json", {"embed": "another"})
    with pytest.raises(InputError, match="another store"):
        main(options(what="keys", store=made.store, groups=made.groups, out=str(tmp_path / "out")))


def test_every_flag_belongs_to_some_export() -> None:
    fields = {field.name for field in option_fields(Config)}
    assert len(fields) <= 25
    assert set().union(*MEANINGFUL.values()) | {"what", "out"} == fields


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"what": "keys", "store": "s", "samples_per_tar": 5}, "--samples-per-tar has no meaning with --what keys"),
        ({"what": "tars", "store": "s", "model": "m"}, "--model has no meaning with --what tars"),
        ({"what": "onnx", "model": "m", "groups": "g"}, "--groups has no meaning with --what onnx"),
        ({"what": "huggingface", "model": "m", "quantize": "int8"}, "--quantize has no meaning"),
        ({"what": "keys", "store": "s", "engine": "ray"}, "--engine has no meaning with --what keys"),
        ({"what": "tars"}, "needs --store"),
        ({"what": "onnx"}, "needs --model"),
        ({"what": "keys", "store": "s", "groups": "g", "subset": "n"}, "give one of them"),
        ({"what": "tars", "store": "s", "uid": "md5"}, "needs --what subset or --subset"),
        ({"what": "onnx", "model": "m", "quantize": "int8"}, "needs --data"),
        ({"what": "onnx", "model": "m", "data": ("d",)}, "give --quantize int8"),
        ({"what": "tars", "store": "s", "samples_per_tar": 0}, "samples_per_tar is 0"),
        ({"what": "onnx", "model": "m", "num_samples": 10**6}, "at most 20000"),
    ],
)
def test_flags_without_meaning_are_refused(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        options(out="out", **flags)


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"transformers is not installed: pip install 'distilclip\[huggingface\]'"):
        options(what="huggingface", model="m", out="out")
    with pytest.raises(InputError, match=r"distilclip\[onnx\]"):
        options(what="onnx", model="m", out="out")


@pytest.fixture(scope="module")
def checkpoint(tiny_clip_folder: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A train folder as far as export reads it, with the tiny model as its checkpoint."""
    folder = tmp_path_factory.mktemp("train")
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints/step-000010").symlink_to(tiny_clip_folder)
    config = {"data": ["x/*.tar"], "objective": "clip", "num_steps": 10, "batch_size": 4, "learning_rate": 1e-3}
    config |= {"weight_decay": 0.1, "warmup_steps": 1, "precision": "fp32", "seed": 0}
    result = {
        "checkpoint": "checkpoints/step-000010",
        "num_rows": 9,
        "num_samples_seen": 40,
        "objective": {"task": 1.0},
    }
    stage_folder.write_json(f"{folder}/config.json", {"stage": "train", **config})
    stage_folder.write_json(f"{folder}/result.json", {"stage": "train", **result})
    return str(folder)


def run_example(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names that the card's example defines, run beside the model."""
    (example,) = re.findall(r"```python\n(.*?)```", (folder / "model/README.md").read_text(), flags=re.DOTALL)
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {}
    exec(example, names)
    return names


def test_an_open_clip_folder_loads_in_open_clip_itself(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = main(options(what="open_clip", model=checkpoint, name="small", out=str(tmp_path / "out")))
    clip = load_clip(checkpoint)
    assert (result["name"], result["digest"]) == ("small", clip.digest)
    example = run_example(tmp_path / "out", monkeypatch)
    pixels = example["preprocess"](picture(1))[None]
    with torch.no_grad():
        found = example["model"].eval().encode_image(pixels, normalize=True)
        torch.testing.assert_close(found, clip.encode_image(pixels))
    card = (tmp_path / "out/model/README.md").read_text()
    assert "| pairs trained on | 9 |" in card
    assert clip.digest in card
    for folder in ("out/model", "out"):
        assert load_clip(str(tmp_path / folder)).digest == clip.digest


def test_a_hugging_face_folder_is_complete(checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    result = main(options(what="huggingface", model=checkpoint, out=str(tmp_path / "out")))
    assert max(result["difference"].values()) < 1e-5
    names = {path.name for path in (tmp_path / "out/model").iterdir()}
    assert names >= {"config.json", "model.safetensors", "tokenizer.json", "preprocessor_config.json", "README.md"}
    assert run_example(tmp_path / "out", monkeypatch)["model"].config.projection_dim == 16


def test_a_sentence_transformers_folder_is_complete(checkpoint: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    result = main(options(what="sentence-transformers", model=checkpoint, out=str(tmp_path / "out")))
    assert max(result["difference"].values()) < 1e-5
    names = {path.name for path in (tmp_path / "out/model").iterdir()}
    assert names >= {"modules.json", "config_sentence_transformers.json", "model.safetensors", "README.md"}
    card = (tmp_path / "out/model/README.md").read_text()
    assert "library_name: sentence-transformers\n" in card
    assert 'SentenceTransformer("model")' in card


def test_the_cards_example_of_a_timm_model_gives_the_embedding(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = main(options(what="timm", model=checkpoint, out=str(tmp_path / "out")))
    assert max(result["difference"].values()) < 1e-5
    assert "library_name: timm\n" in (tmp_path / "out/model/README.md").read_text()
    (tmp_path / "out/cat.jpg").write_bytes(encoded(picture(1)))
    found = run_example(tmp_path / "out", monkeypatch)["image"]
    clip = load_clip(checkpoint)
    with Image.open(tmp_path / "out/cat.jpg") as image, torch.no_grad():
        own = clip.encode_image(clip.preprocess(image.convert("RGB"))[None])
    torch.testing.assert_close(found, own, atol=1e-5, rtol=0)


def test_a_tower_that_transformers_lacks_is_refused(tmp_path: Path) -> None:
    from distilclip.models.clip import create_clip

    vision = {"timm_model_name": "cnn_w8", "timm_pool": "max", "timm_proj": "linear", "image_size": 32}
    create_clip(json.dumps({**TINY_CLIP, "vision_cfg": vision}), seed=0).save(str(tmp_path / "cnn"))
    with pytest.raises(InputError, match=r"timm's 'cnn_w8'.*--what onnx"):
        main(options(what="huggingface", model=str(tmp_path / "cnn"), out=str(tmp_path / "out")))


@pytest.mark.slow
def test_onnx_with_int8_reports_its_loss(checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    members = [
        (f"{row}.{kind}", content)
        for row in range(6)
        for kind, content in (("jpg", encoded(picture(row))), ("txt", f"number {row}".encode()))
    ]
    tar = write_tar(tmp_path / "0.tar", members)
    flags = {"what": "onnx", "model": checkpoint, "quantize": "int8", "data": [tar], "out": str(tmp_path / "out")}
    result = main(build(Config, flags, stage="export"))
    assert result["opset"] == 18
    assert max(result["difference"].values()) < 1e-4
    assert result["int8"]["num_samples"] == 6
    assert 0.98 < result["int8"]["cosine"]["text"]["mean"] < 1
    assert set(result["int8"]["same_nearest"]) == {"image_to_text", "text_to_image"}
    assert "| int8, cosine, text, mean |" in (tmp_path / "out/model/README.md").read_text()
    clip = load_clip(checkpoint)
    with torch.no_grad():
        text = clip.encode_text(clip.tokenizer(["a photo of a cat"])).numpy()
    np.testing.assert_allclose(run_example(tmp_path / "out", monkeypatch)["text"], text, atol=1e-4)


def test_times_are_not_part_of_a_result(made: Made, tmp_path: Path) -> None:
    config: dict[str, Any] = {"what": "clip-retrieval", "store": made.store, "groups": made.groups}
    main(options(**config, out=str(tmp_path / "a")))
    time.sleep(1.1)
    main(options(**config, out=str(tmp_path / "b")))
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
