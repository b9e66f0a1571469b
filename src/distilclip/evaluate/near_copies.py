"""Embed the pictures of evaluation sets with the teacher of a store, to find those that have a near copy in it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float16, Float32

from distilclip import stage_folder
from distilclip.data.bad_samples import ErrorPolicy
from distilclip.data.side_files import kept_images
from distilclip.data.store import Store
from distilclip.devices import PRECISIONS
from distilclip.errors import InputError
from distilclip.evaluate.cache import FeatureCache
from distilclip.evaluate.embedders import Embedder
from distilclip.evaluate.encode import Encoding
from distilclip.models.clip import load_clip
from distilclip.scoring.pair_scores import nearest_targets
from distilclip.sets.dataset import EvaluationSet, ImageRef, MissingSet, PairSet


@dataclass(frozen=True, kw_only=True)
class SetPictures:
    """The test pictures of a set that could be read: where they lie, and their embeddings as a store holds them."""

    name: str
    pictures: tuple[ImageRef, ...]
    image: Float16[np.ndarray, "m dim"]
    num_unreadable: int = 0


def open_store_teacher(
    store: Store, *, device: torch.device, num_workers: int, cache: FeatureCache | None = None
) -> Embedder:
    """Load the model that a store was embedded with, in the precision that it was used in.

    Raises `InputError` where the store does not say which it was, or where it is another one now.
    """
    record = stage_folder.read_record(store.path)
    values = record.config if record is not None else {}
    if not values.get("model"):
        raise InputError(
            f"{store.path} does not say which model embedded it. Embed the sets with that model yourself, and name "
            "these stores instead."
        )
    clip = load_clip(values["model"], weights=values.get("weights"), device=device)
    if clip.digest != store.teacher["digest"]:
        raise InputError(
            f"{store.path} was embedded by {store.teacher['name']} from {values['model']}, which holds other weights "
            "now. Restore them."
        )
    encoding = Encoding(dtype=PRECISIONS[values.get("precision", "fp32")], num_workers=num_workers)
    return Embedder(clip, encoding, cache)


def embed_set(teacher: Embedder, dataset: EvaluationSet, *, policy: ErrorPolicy) -> SetPictures:
    """Embed the test pictures of a set. Raises `InputError` for a set that is not there."""
    if isinstance(dataset, MissingSet):
        raise InputError(f"{dataset.name}: {dataset.reason}.")
    images = dataset.images if isinstance(dataset, PairSet) else dataset.test.images
    found = teacher.image_features(images, ("embedding",), policy=policy, name=dataset.name)
    return SetPictures(
        name=dataset.name,
        pictures=tuple(images[row] for row in found.rows.tolist()),
        image=found.embedding.numpy().astype(np.float16),
        num_unreadable=found.num_unreadable,
    )


@dataclass(frozen=True, kw_only=True)
class TrainingImages:
    """The images that a model was trained on: the valid rows of a store, or those of them that `groups` keeps."""

    path: str
    store: Store
    groups: str | None

    @classmethod
    def open(cls, path: str) -> TrainingImages:
        """Open a folder of `embed`, or of a stage that says which of its rows are kept."""
        record = stage_folder.read_record(path)
        if record is None or "embed" in (record.stage, stage_folder.STANDS_FOR.get(record.stage)):
            return cls(path=path, store=Store.open(path), groups=None)
        store = str(record.config["store"])
        stage_folder.require(path, stage=record.stage, store=store)
        return cls(path=path, store=Store.open(store), groups=path)

    def count_copies(
        self, pictures: SetPictures, *, threshold: float, device: torch.device | str = "cpu"
    ) -> dict[str, int | float | str]:
        """Return how many pictures have a cosine of `threshold` or more to an image trained on, for the result."""
        similarity = similarity_to_store(pictures.image, self.store, groups=self.groups, device=device)
        num_near = int((similarity >= np.float32(threshold)).sum())
        return {
            "training_store": self.path,
            "teacher": str(self.store.teacher["name"]),
            "threshold": threshold,
            "num_pictures": len(similarity),
            "num_near": num_near,
            "share": num_near / max(len(similarity), 1),
        }


def similarity_to_store(
    image: Float16[np.ndarray, "m dim"], store: Store, *, groups: str | None = None, device: torch.device | str = "cpu"
) -> Float32[np.ndarray, " m"]:
    """Return the largest cosine of each picture to any row of a store that is valid, and kept by `groups`."""
    best = np.full(len(image), -1, np.float32)
    for shard in range(store.num_shards):
        rows = np.flatnonzero(kept_images(store, shard, groups))
        if len(rows):
            best = np.maximum(best, nearest_targets(image, store.image(shard)[rows], device=device).similarity)
    return best
