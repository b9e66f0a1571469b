"""Drill: pickles that would leave a mark if anything loaded them, offered to every reader in every wrapping."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from distilclip import digests, stage_folder
from distilclip.config import read_recipe
from distilclip.data.samples import BadSample, decode_image
from distilclip.data.shards import open_shard
from distilclip.evaluate.cache import FeatureCache
from distilclip.export.uids import read_subset
from distilclip.models.clip import create_clip, load_clip
from distilclip.models.initial import initialise
from distilclip.row_weights import read_row_weights
from distilclip.sets.open import load_set
from distilclip.train.checkpoint import Progress, load_checkpoint, save_checkpoint
from tests.conftest import TINY_CLIP, encoded, picture, write_tar
from tests.faults import fuzz_stores
from tests.faults.children import run_child
from tests.faults.fuzz_runner import judge
from tests.faults.outcome import Outcome, Size
from tests.train.test_checkpoint import build


def drill(folder: Path, *, size: Size) -> list[Outcome]:
    """Offer every pickle to every reader; a small drill has two wrappings."""
    torch.set_num_threads(1)
    return [offer_pickles(folder, num_kinds=6 if size == "full" else 2)]


class Mark:
    """Unpickled, it makes a folder: that is how it shows that code ran."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.makedirs, (str(self.path),)


def payloads(mark: Path) -> dict[str, bytes]:
    """The pickle bare, as torch saves it, in a TorchScript archive, and in numpy's files."""
    bare = pickle.dumps(Mark(mark))
    saved, array, arrays, archive = (io.BytesIO() for _ in range(4))
    torch.save({"state_dict": {"visual.proj": Mark(mark)}}, saved)
    np.save(array, np.array([Mark(mark)], dtype=object), allow_pickle=True)
    np.savez(arrays, x=np.array([Mark(mark)], dtype=object))
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("model/data.pkl", bare)
        file.writestr("model/constants.pkl", bare)
        file.writestr("model/version", "3\n")
    legacy = io.BytesIO()
    torch.save({"x": Mark(mark)}, legacy, _use_new_zipfile_serialization=False)
    return {
        "a bare pickle": bare,
        "torch.save": saved.getvalue(),
        "torch.save of old": legacy.getvalue(),
        "TorchScript": archive.getvalue(),
        "numpy.save": array.getvalue(),
        "numpy.savez": arrays.getvalue(),
    }


Reader = Callable[[Path, bytes], object]
"""Puts bytes into the place of a file that it then reads; the folder is its own."""


def _replace_in_store(name: str) -> Reader:
    def read(folder: Path, content: bytes) -> object:
        fuzz_stores.make_template(folder)
        (folder / name).write_bytes(content)
        (folder / "result.json").write_text('{"stage": "embed"}')  # digests would refuse it before it is parsed
        digests.forget()
        return (
            fuzz_stores.read_everything(folder) if name != "weights.npy" else read_row_weights(str(folder / name), None)
        )  # type: ignore[arg-type]

    return read


def _replace_in_checkpoint(name: str) -> Reader:
    def read(folder: Path, content: bytes) -> object:
        training = build(json.dumps(TINY_CLIP), 0)
        save_checkpoint(str(folder / "ck"), training, Progress(step=1))
        assert (folder / "ck" / name).exists()
        (folder / "ck" / name).write_bytes(content)
        return load_checkpoint(str(folder / "ck"), training)

    return read


def _replace_in_model(name: str, *, remove: str = "") -> Reader:
    def read(folder: Path, content: bytes) -> object:
        create_clip(json.dumps(TINY_CLIP), seed=7).save(str(folder / "model"))
        (folder / "model" / (remove or name)).unlink()
        (folder / "model" / name).write_bytes(content)
        return load_clip(str(folder / "model"))

    return read


def _weights(name: str) -> Reader:
    def read(folder: Path, content: bytes) -> object:
        (folder / "tiny.json").write_text(json.dumps(TINY_CLIP))
        (folder / name).write_bytes(content)
        return load_clip(str(folder / "tiny.json"), weights=str(folder / name))

    return read


def _init(kind: str) -> Reader:
    def read(folder: Path, content: bytes) -> object:
        vision = {"timm_model_name": "test_resnet", "timm_pool": "avg", "timm_proj": "linear", "image_size": 32}
        architecture = TINY_CLIP | ({"vision_cfg": vision} if kind == "timm" else {})
        (folder / "weights.pt").write_bytes(content)
        return initialise(create_clip(json.dumps(architecture), seed=0), [f"{kind}:{folder / 'weights.pt'}"])

    return read


def _cache(folder: Path, content: bytes) -> object:
    cache = FeatureCache(str(folder))

    def compute() -> dict[str, torch.Tensor]:
        return {"x": torch.zeros(2)}

    cache.tensors(["a"], compute, key={"model": "m"})
    for file in folder.glob("*.safetensors"):
        file.write_bytes(content)
    return cache.tensors(["a"], compute, key={"model": "m"})


def _read_samples(path: Path) -> None:
    shard = open_shard(str(path))
    for entry in shard.index():
        try:
            sample = shard.read(entry.offset, entry.size)
            decode_image(sample.image or b"")
            _ = sample.captions
        except BadSample:
            continue


def _tar(folder: Path, content: bytes) -> None:
    members = [(f"{n}.{e}", content) for n, e in enumerate(("pkl", "pth", "npy", "pyd", "cls", "json", "txt", "jpg"))]
    _read_samples(Path(write_tar(folder / "a.tar", [*members, ("9.jpg", encoded(picture(0))), ("9.pkl", content)])))


def _table(folder: Path, content: bytes) -> None:
    pq.write_table(pa.table({"image": [content], "caption": ["x"], "pickle": [content]}), folder / "a.parquet")
    (folder / "x.pkl").write_bytes(content)
    (folder / "a.csv").write_text("filepath,caption\nx.pkl,x\n")
    for name in ("a.parquet", "a.csv"):
        _read_samples(folder / name)


def _file(name: str, use: Callable[[str], object]) -> Reader:
    def read(folder: Path, content: bytes) -> object:
        (folder / name).write_bytes(content)
        return use(str(folder / name))

    return read


def _cifar(folder: Path, content: bytes) -> object:
    base = folder / "cifar10" / "cifar-10-batches-py"
    base.mkdir(parents=True)
    for name in (
        "data_batch_1",
        "data_batch_2",
        "data_batch_3",
        "data_batch_4",
        "data_batch_5",
        "test_batch",
        "batches.meta",
    ):
        (base / name).write_bytes(content)
    return load_set("cifar10", data_root=str(folder))


_STORE_FILES = ("manifest.parquet", "000000.rows.parquet", "000000.safetensors", *fuzz_stores.SIDES, "weights.npy")
_CHECKPOINT_FILES = ("open_clip_model.safetensors", "heads.safetensors", "optimizer.safetensors", "state.json")
READERS: dict[str, Reader] = {
    **{f"store, {name}": _replace_in_store(name) for name in _STORE_FILES},
    **{f"checkpoint, {name}": _replace_in_checkpoint(name) for name in _CHECKPOINT_FILES},
    **{
        f"model folder, {name}": _replace_in_model(name)
        for name in ("open_clip_model.safetensors", "open_clip_config.json")
    },
    **{
        f"model folder, {name}": _replace_in_model(name, remove="open_clip_model.safetensors")
        for name in ("open_clip_pytorch_model.bin", "pytorch_model.bin", "open_clip_model.bin")
    },
    **{
        f"--weights {name}": _weights(name)
        for name in ("w.pt", "w.pth", "w.bin", "w.npz", "w.npy", "w.safetensors", "w")
    },
    **{f"--init {kind}": _init(kind) for kind in ("weights", "timm")},
    "cache of features": _cache,
    "tar of pairs": _tar,
    "tables of pairs": _table,
    "CIFAR-10's batches": _cifar,
    "recipe.toml": _file("recipe.toml", read_recipe),
    "config.json": _file("config.json", read_recipe),
    "result.json": _file("result.json", stage_folder.read_json),
    "subset.npy": _file("subset.npy", read_subset),
}


def offer_pickles(folder: Path, *, num_kinds: int) -> Outcome:
    """Let every reader meet every pickle, each in a child."""
    started = time.monotonic()
    mark = folder / "mark"
    num_cases, faults = 0, []
    for kind, content in list(payloads(mark).items())[:num_kinds]:
        for name, read in READERS.items():
            own = folder / "own"
            shutil.rmtree(own, ignore_errors=True)
            own.mkdir()

            def work(read: Reader = read, own: Path = own, content: bytes = content) -> int:
                fault, _ = judge(lambda: bool(read(own, content)) or True)
                print(fault)
                return 4 if fault else 0

            ended = run_child(work, folder)
            num_cases += 1
            if mark.exists():
                faults.append(f"{name} ran {kind}")
                shutil.rmtree(mark)
            elif ended.code:
                faults.append(f"{name} of {kind}: {ended.said.strip()[-200:]}")
    return Outcome(
        promise="A pickle is never loaded, whatever it stands in place of.",
        how=f"{len(READERS)} readers meet {num_kinds} wrappings of one that makes a folder where it is loaded",
        num_cases=num_cases,
        num_survived=num_cases - len(faults),
        seconds=time.monotonic() - started,
        notes="; ".join(faults),
    )
