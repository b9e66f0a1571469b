"""A run's folders as the stages leave them, made by hand: tiny tars, a store, groups, labels, logs and scores."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from distilclip.data import side_files
from distilclip.data.shards import key_digest, open_shard
from distilclip.data.store import Rows, SourceFile, finished_shard, sample_id, write_manifest, write_shard
from tests.conftest import encoded, picture, write_tar

NUM_SHARDS, NUM_ROWS, DIM = 2, 12, 8
NASTY = "<script>alert('caption')</script> a red circle & a \"square\""
TEACHER = {
    "digest": hashlib.sha256(b"teacher").hexdigest(),
    "preprocessing": "{}",
    "tokenizer": "simple",
    "precision": "fp32",
    "scale": 100.0,
}
CLASSES = {
    "classes": [["ring", 40, 10], [NASTY, 10, 9]],
    "confusions": [["ring", NASTY, 30], [NASTY, "ring", 1]],
}
STUDENTS: dict[str, dict[str, float]] = {
    "plain": {"task": 1.0},
    "clip-kd": {"task": 1.0, "relational": 1.0, "feature": 2000.0, "interactive": 1.0},
    "clip-cid": {"task": 1.0, "cluster": 1.0, "instance": 1.0},
}


def write_run(folder: Path) -> Path:
    """All stage folders of a run, finished; the folder."""
    teacher = str(folder / "train" / "teacher")
    store = write_embed(folder / "embed", write_pairs(folder / "pairs"), teacher=teacher)
    write_balance(folder / "balance", store)
    write_cluster(folder / "cluster", store)
    write_train(folder / "train" / "teacher", {"task": 1.0}, store=None, height=3.0)
    for place, (name, weights) in enumerate(STUDENTS.items()):
        write_train(folder / "train" / name, weights, store=str(store), height=4.0 - 0.3 * place)
    write_evaluate(folder / "evaluate")
    return folder


def digest(name: str) -> str:
    """What stands for the digest of a model's weights."""
    return hashlib.sha256(name.encode()).hexdigest()


def write_stage(folder: Path, stage: str, result: dict[str, Any] | None, **config: Any) -> None:
    """config.json, env.json and, where there is one, result.json."""
    folder.mkdir(parents=True, exist_ok=True)
    environment = {"python": "3.11.2", "command": ["distilclip", stage], "versions": {"torch": "2.15"}}
    (folder / "config.json").write_text(json.dumps({"stage": stage, "out": str(folder), **config}))
    (folder / "env.json").write_text(json.dumps(environment))
    if result is not None:
        (folder / "result.json").write_text(json.dumps({"stage": stage, **result}))


def write_pairs(folder: Path) -> list[str]:
    """Tars of jpg + txt; row 3 of every shard is cut short, row 0 has a caption that would like to be HTML."""
    tars = []
    for shard in range(NUM_SHARDS):
        members = []
        for row in range(NUM_ROWS):
            image = encoded(picture(100 * shard + row, size=(96, 64)))
            members.append((f"{row:05d}.jpg", image[:60] if row == 3 else image))
            caption = NASTY if row == 0 else f"picture {row} of shard {shard}"
            members.append((f"{row:05d}.txt", caption.encode()))
        tars.append(write_tar(folder / f"{shard:05d}.tar", members))
    return tars


def write_embed(folder: Path, tars: list[str], *, teacher: str) -> Path:
    """A finished store of the tars, with random embeddings."""
    embeddings = np.random.default_rng(0).normal(size=(NUM_SHARDS, NUM_ROWS, DIM))
    embeddings /= np.linalg.norm(embeddings, axis=-1, keepdims=True)
    for shard, tar in enumerate(tars):
        entries = open_shard(tar).index()
        errors = ["truncated image: byte 60" if row == 3 else "" for row in range(len(entries))]
        valid = np.array([not error for error in errors])
        rows = Rows(
            key=[entry.key for entry in entries],
            offset=np.array([entry.offset for entry in entries], np.uint64),
            size=np.array([entry.size for entry in entries], np.uint32),
            valid=valid,
            error=errors,
            image_sha256=np.zeros((len(entries), 32), np.uint8),
        )
        kept = (embeddings[shard] * valid[:, None]).astype(np.float16)
        write_shard(
            str(folder),
            shard,
            rows,
            image=kept,
            text=kept,
            source=SourceFile(
                uri=tar,
                num_bytes=Path(tar).stat().st_size,
                sha256=hashlib.sha256(Path(tar).read_bytes()).hexdigest(),
                truncated=False,
            ),
            teacher={**TEACHER, "name": teacher},
        )
        assert key_digest(rows.key) == finished_shard(str(folder), shard).key_digest  # type: ignore[union-attr]
    shards = [finished_shard(str(folder), shard) for shard in range(NUM_SHARDS)]
    write_manifest(str(folder), [shard for shard in shards if shard], dim=DIM, teacher={**TEACHER, "name": teacher})
    result = {
        "num_shards": NUM_SHARDS,
        "num_rows": NUM_SHARDS * NUM_ROWS,
        "num_valid": NUM_SHARDS * (NUM_ROWS - 1),
        "num_invalid": NUM_SHARDS,
        "reasons": {"truncated image": NUM_SHARDS},
        "truncated": [],
        "dim": DIM,
        "teacher": {**TEACHER, "name": teacher},
    }
    write_stage(folder, "embed", result, data=tars, model=teacher)
    return folder


def write_balance(folder: Path, store: Path) -> None:
    """In every shard, rows 1, 2 and 4 removed for row 0, and row 6 for row 5 at a distance near the threshold."""
    removed_for = {1: (0, 0.01), 2: (0, 0.02), 4: (0, 0.045), 6: (5, 0.0699)}
    for shard in range(NUM_SHARDS):
        rows = np.array([row for row in range(NUM_ROWS) if row != 3], np.uint32)
        because = np.array([removed_for.get(int(row), (int(row), 0.0))[0] for row in rows])
        distance = np.array([removed_for.get(int(row), (0, 0.0))[1] for row in rows], np.float32)
        representative = sample_id(shard, because)
        side_files.write_groups(
            str(folder),
            shard,
            side_files.Groups(
                row=rows,
                group=representative,
                representative=representative,
                distance=distance,
                keep=np.array([int(row) not in removed_for for row in rows]),
            ),
        )
    side_files.write_forest(str(folder), forest_edges())
    curve = [
        {"threshold": 0.01 * step, "num_groups": 22 - step, "removed_ratio": step / 22, "largest_group": 1 + step // 2}
        for step in range(15)
    ]
    result = {
        "threshold": 0.07,
        "saturated": None,
        "metric": "sqeuclidean",
        "num_valid": 22,
        "num_kept": 14,
        "num_groups": 14,
        "removed_ratio": 8 / 22,
        "largest_group": 4,
        "curve": curve,
        "chained": 2,
        "borderline": {
            "under": [{"left": int(sample_id(0, 5)), "right": int(sample_id(0, 6)), "distance": 0.0699}],
            "over": [{"left": int(sample_id(0, 7)), "right": int(sample_id(1, 8)), "distance": 0.0701}],
        },
        "largest_groups": [{"group": int(sample_id(0, 0)), "num_images": 4, "farthest": 0.045}],
    }
    write_stage(folder, "balance", result, store=str(store), threshold=0.07, metric="sqeuclidean")


def forest_edges() -> side_files.ForestEdges:
    """Fourteen edges, one below each step of the curve: stars around row 0 of both shards, which a last one joins."""
    rows = [row for row in range(NUM_ROWS) if row != 3]
    ends = [(sample_id(k % 2, 0), sample_id(k % 2, rows[1 + k // 2])) for k in range(13)]
    ends.append((sample_id(0, 0), sample_id(1, 0)))
    left, right = (np.array(column, np.uint64) for column in zip(*ends, strict=True))
    return side_files.ForestEdges(left=left, right=right, distance=(0.01 * np.arange(14) + 0.005).astype(np.float32))


def naive_largest(left: list[int], right: list[int]) -> int:
    """The size of the largest group, by relabelling all rows at every edge."""
    label = {row: row for row in {*left, *right}}
    for a, b in zip(left, right, strict=True):
        old, new = label[b], label[a]
        label = {row: new if own == old else own for row, own in label.items()}
    return max([list(label.values()).count(own) for own in label.values()], default=1)


def write_cluster(folder: Path, store: Path) -> None:
    """Three clusters of the kept rows, of unequal size."""
    for shard in range(NUM_SHARDS):
        rows = np.array([0, 5, 7, 8, 9, 10, 11], np.uint32)
        cluster = np.array([0, 0, 0, 0, 1, 1, 2], np.uint32)
        distance = np.linspace(0.1, 0.7, len(rows), dtype=np.float32)
        side_files.write_labels(str(folder), shard, side_files.Labels(row=rows, cluster=cluster, distance=distance))
    side_files.write_centers(str(folder), np.eye(3, DIM, dtype=np.float32))
    sizes = {"largest": 8, "smallest": 2, "gini": 0.286, "histogram": [0, 0, 1, 1, 1]}
    before = {"largest": 14, "smallest": 2, "gini": 0.4, "histogram": [0, 0, 1, 0, 2]}
    result = {"num_centers": 3, "objective": 0.41, "num_labelled": 14, "sizes": sizes, "sizes_before_balance": before}
    write_stage(folder, "cluster", result, store=str(store), num_centers=3)


def write_train(folder: Path, weights: dict[str, float], *, store: str | None, height: float) -> None:
    """A finished train folder with a log of 60 lines; one with distillation logs cosines too."""
    steps = np.arange(0, 600, 10)
    values = {"loss": height * np.exp(-steps / 200) + 1}
    values.update({name: values["loss"] / (place + 1) for place, name in enumerate(weights)})
    values["data_share"] = np.full(len(steps), 0.02)
    values["samples_per_second"] = np.where(steps == 0, 50.0, 700.0 + 10 * height)
    if len(weights) > 1:
        values["cosine_image"] = 0.8 - 0.6 * np.exp(-steps / 150)
        values["cosine_text"] = 0.7 - 0.6 * np.exp(-steps / 150)
    curve = {40: {"validate/sketch/top1": 0.2, "validate/held-out/loss": 3.0}, 59: {"validate/sketch/top1": 0.3}}
    lines = [
        {"step": int(step), **{k: float(v[i]) for k, v in values.items()}, **curve.get(i, {})}
        for i, step in enumerate(steps)
    ]
    result = {
        "objective": {**weights, "alpha": 0.999, "temperature": 0.07},
        "num_parameters": 1_234_567,
        "num_samples_seen": 153_600,
        "digest": digest(folder.name),
    }
    write_stage(folder, "train", result, store=store, student="{}")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_evaluate(folder: Path) -> None:
    """Scores of teacher and students on three sets; `sketch` has no images to train a probe on."""
    rows = []
    for model, level in {"teacher": 0.62, "plain": 0.35, "clip-kd": 0.48, "clip-cid": 0.515}.items():
        rows += [
            *_accuracies(model, "shape", "zero-shot", level),
            *_accuracies(model, "sketch", "zero-shot", level - 0.12),
            *_accuracies(model, "shape", "linear-probe", level + 0.1),
            _score(model, "sketch", "linear-probe", "top1", None, reason="the set has no training images"),
        ]
        for metric in ("image_to_text_r1", "text_to_image_r1", "image_to_text_r5"):
            rows.append(_score(model, "retrieval", "retrieval", metric, level / 2, chance=1 / 400, num_test=400))
        for metric, value in (("top1_agreement", 0.2 + level), ("cka", 0.9), ("kl", 1.25)):
            rows.append(_score(model, "shape", "agreement", metric, value))
    models = [{"name": name, "digest": digest(name), "num_parameters": 1_234_567} for name in ("teacher", *STUDENTS)]
    write_stage(folder, "evaluate", {"rows": rows, "models": models}, models=["teacher", *STUDENTS], teacher="teacher")


def _accuracies(model: str, dataset: str, task: str, value: float) -> list[dict[str, Any]]:
    return [
        _score(
            model,
            dataset,
            task,
            metric,
            value - 0.01 * place,
            chance=1 / 12,
            num_classes=12,
            details=CLASSES if (task, metric, dataset) == ("zero-shot", "top1", "shape") else {},
        )
        for place, metric in enumerate(("top1", "mean_per_class"))
    ]


def _score(model: str, dataset: str, task: str, metric: str, value: float | None, **more: Any) -> dict[str, Any]:
    row = {"model": model, "model_digest": digest(model), "set": dataset, "task": task, "metric": metric}
    interval = {"low": value - 0.04, "high": value + 0.04} if value is not None else {"low": None, "high": None}
    headline = metric in ("top1", "image_to_text_r1", "text_to_image_r1", "top1_agreement", "cka")
    return {
        **row,
        "value": value,
        **interval,
        "headline": headline,
        "chance": None,
        "num_test": 500,
        "reason": "",
        "details": {},
        **more,
    }
