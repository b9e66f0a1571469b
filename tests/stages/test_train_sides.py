"""Whole pipelines on pictures alone, on sentences of a second language, and on rows of all kinds at once."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distilclip import cli, stage_folder
from distilclip.data.store import Store
from distilclip.models.clip import load_clip
from distilclip.train.checkpoint_files import folder_name
from tests.conftest import encoded, picture, write_tar
from tests.ranks import run_ranks

ENGLISH = ["red", "blue", "dog", "cat", "runs", "sleeps", "here", "there"]
OTHER = ["rouge", "bleu", "chien", "chat", "court", "dort", "ici", "loin"]


def run(*words: str | Path) -> None:
    assert cli.main([str(word) for word in words]) == 0


def result(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "result.json").read_text())


def embed(out: Path, teacher: str, data: str | Path, *may_lack: str) -> Path:
    run("embed", "--data", data, "--out", out, "--model", teacher, "--num-workers", 0, "--may-lack", *may_lack)
    return out


def words_of_train(out: Path, architecture: str, store: Path, *flags: str | Path) -> list[str]:
    sizes = "--batch-size 8 --num-steps 4 --warmup-steps 1 --checkpoint-every 2 --precision fp32 --num-workers 0"
    own = ["train", "--out", out, "--student", architecture, "--store", store, *sizes.split(), *flags]
    return [str(word) for word in own]  # a later flag replaces an earlier one


def train(out: Path, architecture: str, store: Path, *flags: str | Path) -> list[dict[str, float]]:
    run(*words_of_train(out, architecture, store, *flags))
    run("verify", out)
    return list(stage_folder.read_metrics(str(out / "metrics.jsonl")))


@pytest.mark.slow
def test_pictures_without_captions_go_through_the_whole_pipeline(
    tmp_path: Path, tiny_clip_json: str, tiny_clip_folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run(
        "corpus",
        "--out",
        tmp_path / "corpus",
        "--num-pairs",
        40,
        "--num-eval",
        20,
        "--image-size",
        32,
        "--num-workers",
        0,
    )
    (tar,) = (tmp_path / "corpus" / "train").glob("*.tar")
    with tarfile.open(tar) as pairs:
        pictures = [(member.name, pairs.extractfile(member)) for member in pairs if member.name.endswith(".jpg")]
        members = [(name, file.read()) for name, file in pictures if file is not None]
    store = embed(tmp_path / "store", tiny_clip_folder, write_tar(tmp_path / "alone.tar", members), "caption")
    assert (result(store)["num_captionless"], result(store)["num_invalid"]) == (40, 0)
    groups, clusters, out = tmp_path / "groups", tmp_path / "clusters", tmp_path / "train"
    run("balance", "--store", store, "--out", groups, "--metric", "cosine", "--threshold", 0.0003)
    run("cluster", "--store", store, "--groups", groups, "--out", clusters, "--num-centers", 3)
    num_kept = result(groups)["num_kept"]
    assert num_kept < 40
    for folder in (store, groups, clusters):
        run("verify", folder)

    terms = ["--terms", "cluster", "1", "intramodal", "1", "masked", "1"]
    inputs = ["--groups", groups, "--clusters", clusters, *terms]
    lines = train(out, tiny_clip_json, store, "--objective", "clip-kd", *inputs)
    said = capsys.readouterr().err
    assert f"of {num_kept} rows 0 have a picture and a caption, {num_kept} a picture alone" in said
    assert "left out: task, relational, interactive. The text tower keeps the weights" in said
    assert {"feature", "cluster", "intramodal", "masked", "cosine_image"} <= set(lines[0])
    assert not {"task", "relational", "interactive", "cosine_text", "agreement"} & set(lines[0])
    first, last = (load_clip(str(out / folder_name(step))) for step in (2, 4))
    for name, weight in first.model.named_parameters():
        moved = not torch.equal(weight, last.model.get_parameter(name))
        assert moved == name.startswith(("visual.", "logit_scale")), name

    run("export", "--what", "open_clip", "--model", out, "--out", tmp_path / "model")
    for what in ("tars", "keys", "clip-retrieval"):
        run("export", "--what", what, "--store", store, "--groups", groups, "--out", tmp_path / what)
    embeddings = np.load(next((tmp_path / "clip-retrieval" / "img_emb").glob("*.npy")))
    assert len(embeddings) == num_kept
    assert not (tmp_path / "clip-retrieval" / "text_emb").exists()

    flags = ["--store", store, "--groups", groups, "--top", "0.5", "--out", tmp_path / "selected"]
    assert cli.main([str(word) for word in ("select", "--score", "clip-score", *flags)]) == 2
    assert f"{num_kept} rows have no caption, and clip-score compares" in capsys.readouterr().err
    run("select", "--score", "norm-sim", "--targets", store, *flags)
    run("report", "--folders", store, groups, clusters, out, "--out", tmp_path / "page")


def sentences(path: Path) -> tuple[list[str], list[str]]:
    """A table of 32 English sentences and the same in another language, word by word."""
    places = [
        (colour, animal, verb, place) for colour in (0, 1) for animal in (2, 3) for verb in (4, 5) for place in (6, 7)
    ]
    places += [(animal, verb, place, colour) for colour, animal, verb, place in places]
    english, other = ([" ".join(words[at] for at in row) for row in places] for words in (ENGLISH, OTHER))
    path.write_text("caption,other\n" + "".join(f"{a},{b}\n" for a, b in zip(english, other, strict=True)))
    return english, other


def recall(model: str | Path, texts: list[str], targets: np.ndarray) -> float:
    """The share of texts whose nearest target is their own."""
    clip = load_clip(str(model))
    with torch.no_grad():
        found = clip.encode_text(clip.tokenizer(texts)).numpy()
    return float((np.argmax(found @ targets.T, axis=1) == np.arange(len(texts))).mean())


@pytest.mark.slow
def test_a_second_language_is_learned_from_sentences_alone(
    tmp_path: Path, tiny_clip_json: str, tiny_clip_folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    _, other = sentences(tmp_path / "sentences.csv")
    store = embed(tmp_path / "store", tiny_clip_folder, tmp_path / "sentences.csv", "image")
    targets = Store.open(str(store)).text(0).astype(np.float32)
    flags = ["--init", f"weights:{tiny_clip_folder}", "--student-captions", "other", "--objective", "clip-kd"]
    flags += ["--batch-size", "32", "--num-steps", "150", "--checkpoint-every", "150", "--learning-rate", "3e-3"]
    out = tmp_path / "train"
    lines = train(out, tiny_clip_json, store, *flags)
    assert "The image tower keeps the weights that it begins with" in capsys.readouterr().err
    assert "cosine_image" not in lines[-1]
    before = recall(tiny_clip_folder, other, targets)
    after = recall(out / folder_name(150), other, targets)
    assert before < 0.3
    assert after > 0.9
    teacher, student = load_clip(tiny_clip_folder), load_clip(str(out / folder_name(150)))
    for name, weight in teacher.model.visual.named_parameters():
        assert torch.equal(weight, student.model.visual.get_parameter(name)), name


def test_of_several_languages_a_row_shows_the_next_in_every_epoch_and_a_missing_column_is_said(
    tmp_path: Path, tiny_clip_json: str, tiny_clip_folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    sentences(tmp_path / "sentences.csv")
    store = embed(tmp_path / "store", tiny_clip_folder, tmp_path / "sentences.csv", "image")
    train(tmp_path / "both", tiny_clip_json, store, "--student-captions", "other", "caption", "--terms", "feature", "9")
    flags = ["train", "--out", tmp_path / "no", "--student", tiny_clip_json, "--store", store, "--num-steps", "1"]
    flags += ["--warmup-steps", "0", "--batch-size", "8", "--num-workers", "0", "--terms", "feature", "9"]
    assert cli.main([*map(str, flags), "--student-captions", "othr", "--max-bad-ratio", "1"]) == 2
    assert "nothing for the student in othr" in capsys.readouterr().err
    assert cli.main([*map(str, flags[:2]), str(tmp_path / "task"), *map(str, flags[3:13])]) == 2
    assert "None is left: give one of feature, intramodal, queue a weight" in capsys.readouterr().err


def mixed_store(folder: Path, teacher: str) -> Path:
    """Eight pairs, eight pictures alone and eight captions alone, in turn."""
    members = []
    for row in range(24):
        members += [(f"{row:02d}.jpg", encoded(picture(row)))] if row % 3 != 2 else []
        members += [(f"{row:02d}.txt", f"picture number {row}".encode())] if row % 3 != 1 else []
    return embed(folder / "store", teacher, write_tar(folder / "mixed.tar", members), "caption", "image")


def train_in_a_process(words: list[str]) -> int:
    return cli.main(words)


@pytest.mark.slow
def test_rows_of_all_kinds_train_together_on_one_rank_and_two(
    tmp_path: Path, tiny_clip_json: str, tiny_clip_folder: str
) -> None:
    store = mixed_store(tmp_path, tiny_clip_folder)
    groups, clusters = tmp_path / "groups", tmp_path / "clusters"
    run("balance", "--store", store, "--out", groups, "--metric", "cosine", "--threshold", 1e-5)
    assert (result(groups)["num_valid"], result(groups)["num_pictureless"]) == (16, 8)
    run("cluster", "--store", store, "--groups", groups, "--out", clusters, "--num-centers", 3)
    for folder in (store, groups, clusters):
        run("verify", folder)
    flags = ["--objective", "clip-cid-kd", "--groups", groups, "--clusters", clusters, "--held-out", store]
    one = train(tmp_path / "one", tiny_clip_json, store, *flags)
    assert result(tmp_path / "one")["num_rows"] == 24
    assert {"task", "cluster", "feature", "cosine_image", "cosine_text"} <= set(one[0])
    words = words_of_train(tmp_path / "two", tiny_clip_json, store, *flags)
    assert run_ranks(2, train_in_a_process, words) == [0, 0]
    two = list(stage_folder.read_metrics(str(tmp_path / "two" / "metrics.jsonl")))
    for line, other in zip(one, two, strict=True):
        names = [name for name in line if not name.endswith(("_share", "samples_per_second"))]
        assert {name: other[name] for name in names} == pytest.approx({n: line[n] for n in names}, rel=1e-3, abs=1e-5)
