"""Write the tars of the synthetic corpus; each draws its own samples from its own random numbers."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Literal, TypeAlias

import numpy as np
from jaxtyping import Int
from PIL import Image

from distilclip import files
from distilclip.corpus.captions import describe, write_caption
from distilclip.corpus.copies import encode_jpeg, perceptual_copy
from distilclip.corpus.drawing import draw_look, draw_scene, draw_sketch, vary_look
from distilclip.corpus.scenes import Prior, Scene, draw_scenes, scene_of

COPIES = ("original", "perceptual", "semantic")
CAPTION_KINDS = ("true", "wrong", "empty")

# First words of the random streams, so that no two purposes share one.
PLAN, _GROUP, _PAIR, _EVAL = range(4)

Row: TypeAlias = tuple[str, dict[str, bytes]]  # a key and its files by suffix


@dataclass(frozen=True, kw_only=True)
class TrainShard:
    """Pairs `first`, `first + 1`, ... of the corpus; copy and caption_kind index COPIES and CAPTION_KINDS."""

    path: str  # below the corpus folder
    seed: int
    image_size: int
    first: int
    prior: Prior
    scene: Int[np.ndarray, " n"]
    group: Int[np.ndarray, " n"]
    copy: Int[np.ndarray, " n"]
    caption_kind: Int[np.ndarray, " n"]

    def rows(self) -> Iterator[Row]:
        """Draw the pairs, in order."""
        columns = zip(self.scene, self.group, self.copy, self.caption_kind, strict=True)
        for index, (code, group, copy, kind) in enumerate(columns, start=self.first):
            rng = random_stream(self.seed, _PAIR, index)
            scene = scene_of(code)
            image, change = self._image(rng, scene, int(group), COPIES[copy])
            caption = _caption(rng, scene, CAPTION_KINDS[kind], self.prior)
            truth = {
                "caption": caption,
                "caption_kind": CAPTION_KINDS[kind],
                "group": int(group),
                "copy": COPIES[copy],
                "change": change,
                **asdict(scene),
            }
            yield _key(index), {"jpg": image, "txt": caption.encode(), "json": json.dumps(truth).encode()}

    def _image(self, rng: np.random.Generator, scene: Scene, group: int, copy: str) -> tuple[bytes, str]:
        shared = random_stream(self.seed, _GROUP, group)  # gives every pair of the group the same original
        look = draw_look(shared, scene)
        if copy == "semantic":
            picture = draw_scene(rng, scene, vary_look(rng, look), self.image_size)
            return encode_jpeg(rng, Image.fromarray(picture)), "redrawn"
        original = encode_jpeg(shared, Image.fromarray(draw_scene(shared, scene, look, self.image_size)))
        return (original, "none") if copy == "original" else perceptual_copy(rng, original)


@dataclass(frozen=True, kw_only=True)
class EvalShard:
    """Held-out pictures, with a class label each or, where `label` is None, the full description for retrieval."""

    path: str  # below the corpus folder
    seed: int
    stream: int
    image_size: int
    style: Literal["scene", "sketch"]
    scene: Int[np.ndarray, " n"]
    label: Int[np.ndarray, " n"] | None

    def rows(self) -> Iterator[Row]:
        """Draw the samples, in order."""
        draw = draw_sketch if self.style == "sketch" else draw_scene
        for index, code in enumerate(self.scene):
            rng = random_stream(self.seed, _EVAL, self.stream, index)
            scene = scene_of(code)
            image = encode_jpeg(rng, Image.fromarray(draw(rng, scene, draw_look(rng, scene), self.image_size)))
            if self.label is None:
                yield _key(index), {"jpg": image, "txt": describe(scene).encode()}
            else:
                yield _key(index), {"jpg": image, "cls": str(self.label[index]).encode()}


Shard: TypeAlias = TrainShard | EvalShard


def write_shard(out: str, shard: Shard) -> str:
    """Write one tar atomically, equal rows giving equal bytes (no times, owners or modes of this machine)."""
    path = files.join(out, shard.path)
    with (
        files.atomic_write(path) as file,
        tarfile.open(fileobj=file, mode="w|", format=tarfile.USTAR_FORMAT) as archive,
    ):
        for key, contents in shard.rows():
            for suffix, content in contents.items():
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return path


def random_stream(seed: int, *words: int) -> np.random.Generator:
    """Return the random numbers of one purpose: they depend on the seed and the purpose, not on what ran before."""
    return np.random.default_rng([seed, *words])


def _key(index: int) -> str:
    return f"{index:09d}"


def _caption(rng: np.random.Generator, scene: Scene, kind: str, prior: Prior) -> str:
    if kind == "empty":
        return ""
    if kind == "true":
        return write_caption(rng, scene)
    truth = {word for o in scene.objects for word in (o.shape, o.colour)}
    while True:  # the words of a picture that shares no shape and no colour: false, whatever part of them is told
        other = scene_of(draw_scenes(rng, 1, prior)[0])
        if not any(o.shape in truth or o.colour in truth for o in other.objects):
            return write_caption(rng, other)
