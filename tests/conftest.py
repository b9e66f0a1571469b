"""Tiny real things that every test folder uses: pictures, tars as img2dataset writes them, a two-layer CLIP."""

from __future__ import annotations

import gc
import importlib
import io
import json
import logging
import pkgutil
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import jaxtyping
import numpy as np
import pytest
from PIL import Image

import distilclip.stages

TINY_CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Send the tests of a file to one worker of xdist, so that what they share is made once."""
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(item.nodeid.partition("::")[0]))


def pytest_sessionstart() -> None:
    """Leave the garbage collector out while millions of objects are made by imports and collection."""
    gc.disable()


def pytest_sessionfinish() -> None:
    gc.unfreeze()


def pytest_collection_finish(session: pytest.Session) -> None:
    """Import every stage before the first test of a worker of xdist, and spare the collector what stays for good.

    A stage that is imported while its command runs is parsed by jaxtyping's hook in one thread while another is at
    work; Python 3.11 then fails at times with "AST constructor recursion depth mismatch".
    """
    if hasattr(session.config, "workerinput"):
        for module in pkgutil.iter_modules(distilclip.stages.__path__, "distilclip.stages."):
            importlib.import_module(module.name)
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    """Set the number of threads that torch computes on, until the test ends: sums of later tests depend on it."""
    import torch

    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_clip_json() -> str:
    """An open_clip model config of two layers, 16 wide, 32 pixels."""
    return json.dumps(TINY_CLIP)


@pytest.fixture(scope="session")
def tiny_clip_folder(tmp_path_factory: pytest.TempPathFactory, tiny_clip_json: str) -> str:
    """A saved two-layer CLIP with random weights, as a teacher."""
    from distilclip.models.clip import create_clip

    folder = tmp_path_factory.mktemp("tiny") / "clip"
    create_clip(tiny_clip_json, seed=7).save(str(folder))
    return str(folder)


def picture(seed: int, size: tuple[int, int] = (40, 32)) -> Image.Image:
    """A picture of random 8-pixel blocks: smooth enough for JPEG, different for every seed."""
    blocks = np.random.default_rng(seed).integers(0, 256, (size[1] // 8, size[0] // 8, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize(size, Image.Resampling.NEAREST)


def encoded(image: Image.Image, format: str = "JPEG") -> bytes:
    """The picture as file bytes."""
    buffer = io.BytesIO()
    image.save(buffer, format)
    return buffer.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> str:
    """A tar with these members in this order, as plain `tarfile` writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return str(path)


@pytest.fixture
def pair_tars(tmp_path: Path) -> Callable[..., list[str]]:
    """A function that writes tars of jpg + txt pairs: `pair_tars(shards=2, rows=8)` gives their paths."""

    def write(*, shards: int = 2, rows: int = 8, folder: str = "pairs") -> list[str]:
        paths = []
        for shard in range(shards):
            members = []
            for row in range(rows):
                number = shard * rows + row
                members.append((f"{number:05d}.jpg", encoded(picture(number))))
                members.append((f"{number:05d}.txt", f"picture number {number}".encode()))
            paths.append(write_tar(tmp_path / folder / f"{shard:05d}.tar", members))
        return paths

    return write


@pytest.fixture(autouse=True)
def _messages_begin_anew() -> Iterator[None]:
    """Every test hears what a fresh process would say, at the level of its own environment."""
    yield
    logger = logging.getLogger("distilclip")
    logger.handlers.clear()
    logger.propagate = True  # else pytest adds handlers of its own, and somebody would seem to listen


@pytest.fixture
def unchecked_shapes() -> Iterator[None]:
    """Turns the shape checks of the test session off, so that the library's own message can be seen."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)
