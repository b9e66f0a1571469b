"""Embeddings as other programs write them, made up and small."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

DIM = {"b32": 16, "l14": 24}
TEACHER = {"teacher_name": "ViT-L-14 openai", "teacher_digest": "its digest"}


def unit_rows(num_rows: int, dim: int, seed: int, dtype: type = np.float16) -> np.ndarray:
    """Random rows of unit length."""
    rows = np.random.default_rng(seed).standard_normal((num_rows, dim))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(dtype)


def uid(part: int, row: int) -> str:
    """The 128-bit name of a sample, in hex."""
    return hashlib.md5(f"{part} {row}".encode()).hexdigest()


def write_datacomp(folder: Path, *, parts: int = 2, rows: int = 12) -> list[Path]:
    """DataComp's metadata: NAME.npz with five arrays and NAME.parquet with their rows; the .npz files, sorted.

    Source: mlfoundations/datacomp, download_upstream.py and baselines/; the columns are those of its pools on the hub.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for part in range(parts):
        name = f"{part}{hashlib.md5(str(part).encode()).hexdigest()[1:]}"
        arrays = {
            f"{model}_{kind}": unit_rows(rows, dim, seed=10 * part + place)
            for place, (model, kind, dim) in enumerate((m, k, d) for m, d in DIM.items() for k in ("img", "txt"))
        }
        dedup = np.random.default_rng(part).random((rows, 8)).astype(np.float32)
        np.savez(folder / f"{name}.npz", **arrays, dedup=dedup)
        columns = {
            "uid": [uid(part, row) for row in range(rows)],
            "url": [f"https://example.org/{part}/{row}.jpg" for row in range(rows)],
            "text": [f"picture {row} of part {part}" for row in range(rows)],
            "original_width": np.full(rows, 640),
            "original_height": np.full(rows, 480),
            "clip_b32_similarity_score": np.full(rows, 0.25, np.float32),
            "clip_l14_similarity_score": np.full(rows, 0.2, np.float32),
            "face_bboxes": pa.array([[[0.1, 0.2, 0.3, 0.4]]] * rows, pa.list_(pa.list_(pa.float64()))),
            "sha256": [hashlib.sha256(f"{part} {row}".encode()).hexdigest() for row in range(rows)],
        }
        pq.write_table(pa.table(columns), folder / f"{name}.parquet")
    return sorted(folder.glob("*.npz"))
