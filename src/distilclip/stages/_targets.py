"""Read the pictures that `select --targets` names, and write down which of them the data holds copies of.

A part of `select`, no stage of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float16, Int

from distilclip import files, stage_folder
from distilclip.data.bad_samples import ErrorPolicy
from distilclip.data.columns import FORMAT_VERSION
from distilclip.data.images import ImageMatrix
from distilclip.data.store import Store, sample_id
from distilclip.data.tensors import read_tensors, write_tensors
from distilclip.devices import resolve_device
from distilclip.errors import InputError
from distilclip.evaluate.near_copies import embed_set, open_store_teacher
from distilclip.evaluate.provenance import set_digest
from distilclip.scoring.near_tables import NearPictures, near_name, write_near
from distilclip.scoring.pair_scores import nearest_targets
from distilclip.sets.dataset import ImageRef
from distilclip.sets.open import load_set
from distilclip.sets.specs import expand_groups, is_set


@dataclass(frozen=True, kw_only=True)
class Targets:
    """What the rows of a store are compared with: stores of the same teacher, and evaluation sets that it embeds.

    Embeddings of sets are files below `folder` until `remove`, so that workers and a resumed run read them.
    """

    specs: tuple[str, ...]
    folder: str

    @classmethod
    def of(cls, specs: Sequence[str], folder: str) -> Targets:
        """Return the targets that were named, groups of sets replaced by their sets."""
        return cls(specs=expand_groups(specs), folder=folder)

    def prepare(self, store: Store, *, data_root: str | None, device: str, num_workers: int) -> None:
        """Embed the sets among the targets that are not embedded yet."""
        sets = [(number, spec) for number, spec in enumerate(self.specs) if is_set(spec)]
        if not sets:
            return
        listed = {spec: set_digest(spec, data_root=data_root) for _, spec in sets}
        stage_folder.write_made_from(files.join(self.folder, "targets.json"), self.folder, listed)
        missing = [(number, spec) for number, spec in sets if not files.exists(self._path(number))]
        if not missing:
            return
        teacher = open_store_teacher(store, device=resolve_device(device), num_workers=num_workers)
        for number, spec in missing:
            dataset = load_set(spec, data_root=data_root)
            found = embed_set(teacher, dataset, policy=ErrorPolicy("skip", max_bad_ratio=1.0))
            places = [[ref.uri, ref.key, ref.offset, ref.size] for ref in found.pictures]
            said = {"name": found.name, "num_unreadable": found.num_unreadable}
            stage_folder.write_json(self._path(number, "json"), {**said, "pictures": places})
            write_tensors(self._path(number), {"image": found.image}, {"format": FORMAT_VERSION})

    def embeddings(self, number: int, store: Store) -> Float16[np.ndarray, "m dim"]:
        """Return the embeddings of a target's pictures."""
        if is_set(self.specs[number]):
            return np.asarray(read_tensors(self._path(number))["image"])
        images, valid = _open_images(self.specs[number], store)
        return images.take(valid)

    def all_embeddings(self, store: Store) -> Float16[np.ndarray, "m dim"]:
        """Return the embeddings of the pictures of all targets."""
        return np.concatenate([self.embeddings(number, store) for number in range(len(self.specs))])

    def report(self, store: Store, near: Mapping[int, np.ndarray], threshold: float, device: str) -> dict[str, Any]:
        """Write a table for each target of its pictures near any of the rows `near` (by shard), and count both."""
        found = [self._report(number, store, near, threshold, device) for number in range(len(self.specs))]
        return {"targets": found}

    def _report(
        self, number: int, store: Store, near: Mapping[int, np.ndarray], threshold: float, device: str
    ) -> dict[str, Any]:
        wanted, where = self.embeddings(number, store), resolve_device(device)
        nearest = np.zeros(len(wanted), np.uint64)
        similarity, num_rows = np.full(len(wanted), -1, np.float32), 0
        for shard, rows in near.items():
            if not len(rows):
                continue
            image = store.image(shard)[rows]
            num_rows += int((nearest_targets(image, wanted, device=where).similarity >= np.float32(threshold)).sum())
            best = nearest_targets(wanted, image, device=where)
            nearer = best.similarity > similarity
            nearest[nearer] = sample_id(shard, rows[best.place[nearer]].astype(np.uint32))
            similarity = np.maximum(similarity, best.similarity)
        hit = np.flatnonzero(similarity >= np.float32(threshold))
        name, refs, num_unreadable = self._describe(number, store, hit)
        table = NearPictures(
            picture=hit.astype(np.uint32),
            uri=[ref.uri for ref in refs],
            key=[ref.key for ref in refs],
            offset=np.array([ref.offset for ref in refs], np.uint64),
            size=np.array([ref.size for ref in refs], np.uint32),
            nearest=nearest[hit],
            similarity=similarity[hit],
        )
        write_near(self.folder, number, table)
        counts = {"num_pictures": len(wanted), "num_unreadable": num_unreadable, "num_near": len(hit)}
        return {"name": name, "target": self.specs[number], **counts, "num_rows": num_rows}

    def _describe(self, number: int, store: Store, hit: Int[np.ndarray, " m"]) -> tuple[str, list[ImageRef], int]:
        """Return the name of a target, where some of its pictures lie, and how many could not be read."""
        spec = self.specs[number]
        if is_set(spec):
            said = stage_folder.read_json(self._path(number, "json"))
            places = [said["pictures"][place] for place in hit.tolist()]
            refs = [ImageRef(uri=uri, key=key, offset=offset, size=size) for uri, key, offset, size in places]
            return said["name"], refs, int(said["num_unreadable"])
        images, valid = _open_images(spec, store)
        return spec.rstrip("/").rpartition("/")[2], _places_in_store(images, valid[hit]), len(images) - len(valid)

    @property
    def names(self) -> list[str]:
        """The names of the tables that `report` writes."""
        return [near_name(number) for number in range(len(self.specs))]

    def remove(self) -> None:
        """Remove the embeddings of the sets."""
        files.remove_folder(files.join(self.folder, "embedded"))

    def _path(self, number: int, suffix: str = "safetensors") -> str:
        return files.join(self.folder, "embedded", f"{number:02d}.{suffix}")


def _open_images(path: str, store: Store) -> tuple[ImageMatrix, Int[np.ndarray, " m"]]:
    """Open a store that is a target, with its valid rows; `InputError` where another teacher embedded it."""
    target = Store.open(path)
    if target.teacher["digest"] != store.teacher["digest"]:
        raise InputError(
            f"{path} was embedded by another teacher than {store.path}: {target.teacher['name']}, not "
            f"{store.teacher['name']}. Embed both with the same one."
        )
    images = ImageMatrix(target)
    return images, np.flatnonzero(images.valid())


def _places_in_store(images: ImageMatrix, rows: Int[np.ndarray, " m"]) -> list[ImageRef]:
    found: list[ImageRef] = []
    shards = np.searchsorted(images.starts, rows, side="right") - 1
    for shard in np.unique(shards).tolist():
        line, table = images.store.shards[shard], images.store.rows(shard)
        for row in (rows[shards == shard] - images.starts[shard]).tolist():
            offset, size = int(table.offset[row]), int(table.size[row])
            found.append(ImageRef(uri=line.uri, key=table.key[row], offset=offset, size=size))
    return found
