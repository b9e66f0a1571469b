"""The synthetic corpus: its bytes are fixed by the seed, and what key.json says is what picture and caption say."""

from __future__ import annotations

import io
import itertools
import json
import re
import tarfile
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from distilclip.corpus.captions import SYNONYMS, describe, write_caption
from distilclip.corpus.composition import CorpusSummary, plan_corpus, write_shards, write_texts
from distilclip.corpus.scenes import (
    BACKGROUNDS,
    COLOURS,
    SHAPES,
    SIZES,
    TEXTURES,
    Prior,
    Scene,
    draw_distinct,
    draw_scenes,
    held_out_combinations,
    scene_of,
    seen_combinations,
)
from distilclip.corpus.shard_writer import EvalShard, write_shard
from distilclip.errors import InputError

SMALL = {"num_pairs": 240, "seed": 5, "image_size": 32, "shard_size": 90, "num_eval": 24}


def read_tar(path: Path) -> dict[str, dict[str, bytes]]:
    """The samples of a tar, read with plain `tarfile`."""
    samples: dict[str, dict[str, bytes]] = defaultdict(dict)
    with tarfile.open(path) as archive:
        for member in archive:
            key, _, suffix = member.name.partition(".")
            content = archive.extractfile(member)
            assert content is not None
            samples[key][suffix] = content.read()
    return dict(samples)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def write_corpus(folder: Path, num_workers: int = 0) -> CorpusSummary:
    corpus = plan_corpus(**SMALL)
    write_texts(str(folder), corpus.texts)
    assert len(list(write_shards(str(folder), corpus.shards, num_workers=num_workers))) == len(corpus.shards)
    return corpus.summary


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, CorpusSummary]:
    folder = tmp_path_factory.mktemp("corpus")
    return folder, write_corpus(folder)


@pytest.fixture(scope="module")
def pairs(written: tuple[Path, CorpusSummary]) -> list[dict[str, Any]]:
    """The training pairs in order: key.json, with the JPEG bytes added as `jpg` and the text as `txt`."""
    folder, _ = written
    samples = [s for path in sorted(folder.glob("train/*.tar")) for s in read_tar(path).values()]
    return [{**json.loads(s["json"]), "jpg": s["jpg"], "txt": s["txt"].decode()} for s in samples]


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    rng = np.random.default_rng(0)
    return [scene_of(code) for code in draw_scenes(rng, 800, Prior.draw_ranking(rng))]


def test_same_seed_gives_the_same_bytes_for_any_number_of_workers(
    written: tuple[Path, CorpusSummary], tmp_path: Path
) -> None:
    folder, summary = written
    assert write_corpus(tmp_path / "two", num_workers=2) == summary
    assert contents(tmp_path / "two") == contents(folder)
    write_shard(str(tmp_path / "other"), plan_corpus(**{**SMALL, "seed": 6}).shards[0])
    assert contents(tmp_path / "other")["train/00000.tar"] != contents(folder)["train/00000.tar"]


def test_pixels_of_a_pair_do_not_depend_on_the_size_of_its_shard(pairs: list[dict[str, Any]]) -> None:
    shards = plan_corpus(**{**SMALL, "shard_size": 100}).shards
    assert [files["jpg"] for _, files in shards[1].rows()] == [pair["jpg"] for pair in pairs[100:200]]


def test_layout_is_that_of_webdataset(written: tuple[Path, CorpusSummary]) -> None:
    folder, _ = written
    assert sorted(p.name for p in folder.glob("train/*")) == ["00000.tar", "00001.tar", "00002.tar"]
    with tarfile.open(folder / "train/00001.tar") as archive:
        names = archive.getnames()
        assert {m.mtime for m in archive.getmembers()} == {0}
    assert names[:3] == ["000000090.jpg", "000000090.txt", "000000090.json"]
    assert len(names) == 3 * 90


def test_summary_counts_what_was_written(written: tuple[Path, CorpusSummary], pairs: list[dict[str, Any]]) -> None:
    _, summary = written
    groups = Counter(pair["group"] for pair in pairs)
    assert len(pairs) == summary.num_pairs == SMALL["num_pairs"]
    assert len(groups) == summary.num_groups
    assert max(groups.values()) == summary.largest_group
    assert Counter(pair["copy"] for pair in pairs) == Counter(summary.copies)
    assert Counter(pair["caption_kind"] for pair in pairs) == Counter(summary.captions)
    assert all(pair["txt"] == pair["caption"] for pair in pairs)
    assert all((pair["txt"] == "") == (pair["caption_kind"] == "empty") for pair in pairs)


def test_groups_are_scenes(pairs: list[dict[str, Any]]) -> None:
    scene_of_group: dict[int, str] = {}
    originals: Counter[int] = Counter()
    for pair in pairs:
        scene = json.dumps([pair["background"], pair["objects"]])
        assert scene_of_group.setdefault(pair["group"], scene) == scene
        originals[pair["group"]] += pair["copy"] == "original"
    assert len(set(scene_of_group.values())) == len(scene_of_group)
    assert set(originals.values()) == {1}


def test_copies_look_like_their_original_and_few_are_the_same_file(pairs: list[dict[str, Any]]) -> None:
    def pixels(pair: dict[str, Any]) -> np.ndarray:
        return np.asarray(Image.open(io.BytesIO(pair["jpg"])).resize((16, 16), Image.Resampling.BOX), np.float32)

    original = {pair["group"]: pair for pair in pairs if pair["copy"] == "original"}
    copies = [pair for pair in pairs if pair["copy"] != "original"]
    assert np.mean([pair["jpg"] == original[pair["group"]]["jpg"] for pair in copies]) < 0.05
    near = [np.abs(pixels(pair) - pixels(original[pair["group"]])).mean() for pair in copies]
    far = [np.abs(pixels(a) - pixels(b)).mean() for a, b in itertools.pairwise(pairs)]
    assert np.median(near) < 0.2 * np.median(far)
    assert {pair["change"] for pair in copies} == {"redrawn", "reencoded", "resized", "cropped", "recoloured"}


def test_held_out_combinations_are_in_no_training_picture_or_caption(scenes: list[Scene]) -> None:
    held_out = {(SHAPES[s], COLOURS[c]) for s, c in held_out_combinations()}
    assert len(held_out) == 24
    assert {s for s, _ in held_out} == set(SHAPES)
    assert {c for _, c in held_out} == set(COLOURS)
    assert not held_out & {(o.shape, o.colour) for scene in scenes for o in scene.objects}
    corpus = plan_corpus(**{**SMALL, "num_pairs": 3000})
    for shard in corpus.shards:
        shown = {(o.shape, o.colour) for code in shard.scene for o in scene_of(code).objects}
        if "unseen" in shard.path:
            assert held_out & shown
        else:
            assert not held_out & shown


def test_wrong_captions_name_no_held_out_combination(pairs: list[dict[str, Any]]) -> None:
    phrase = re.compile("|".join(rf"\b{COLOURS[c]} {SHAPES[s]}\b" for s, c in held_out_combinations()))
    assert not [pair["caption"] for pair in pairs if phrase.search(pair["caption"].lower())]


def words_of(text: str, vocabulary: tuple[str, ...]) -> set[str]:
    """The words of a vocabulary that a caption uses, synonyms as the word they stand for."""
    found = set()
    for word in vocabulary:
        for synonym in SYNONYMS.get(word, (word,)):
            if re.search(rf"\b{synonym}\b", text.lower()):
                found.add(word)
    return found


def false_words(text: str, scene: Scene) -> set[str]:
    """Words of a caption that are not true of any object or of the background."""
    truths = {word for o in scene.objects for word in (o.shape, o.colour, o.texture, o.size)} | {scene.background}
    said = words_of(text, SHAPES + COLOURS + TEXTURES + SIZES + BACKGROUNDS)
    return said - truths


def test_captions_tell_a_part_of_the_truth_and_nothing_else(scenes: list[Scene]) -> None:
    rng = np.random.default_rng(1)
    captions = [write_caption(rng, scene) for scene in scenes]
    assert not [(c, s) for c, s in zip(captions, scenes, strict=True) if false_words(c, s)]
    assert all(words_of(c, SHAPES + COLOURS) for c in captions)
    assert len(set(captions)) > 0.8 * len(captions)
    assert not [s for s in scenes if false_words(describe(s), s)]


def test_captions_relate_objects_as_they_stand(scenes: list[Scene]) -> None:
    rng = np.random.default_rng(2)
    axis = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}
    checked = 0
    for scene in scenes:
        shapes = {o.shape: o for o in scene.objects}
        relation = re.search("left of|right of|above|below", text := write_caption(rng, scene))
        if relation is None or len(shapes) < len(scene.objects):
            continue
        first, second = (words_of(part, SHAPES) for part in re.split(relation[0], text))
        if first and second:
            column_or_row, sign = axis[relation[0]]
            here, there = (_column_row(shapes[s.pop()].place)[column_or_row] for s in (first, second))
            assert (here - there) * sign > 0, text
            checked += 1
    assert checked > 15


def _column_row(place: str) -> tuple[int, int]:
    return ("right" in place) - ("left" in place), ("bottom" in place) - ("top" in place)


def test_wrong_captions_are_false(pairs: list[dict[str, Any]]) -> None:
    wrong = [pair for pair in pairs if pair["caption_kind"] == "wrong"]
    assert wrong
    for pair in wrong:
        truths = {o[name] for o in pair["objects"] for name in ("shape", "colour")}
        assert not words_of(pair["caption"], SHAPES + COLOURS) & truths


def test_descriptions_of_different_scenes_differ(scenes: list[Scene]) -> None:
    assert len({describe(scene) for scene in scenes}) == len(set(scenes))


def test_distribution_is_long_tailed_and_duplicates_are_as_frequent_as_in_laion() -> None:
    summary = plan_corpus(**{**SMALL, "num_pairs": 12_000}).summary
    assert 0.35 < summary.removable_ratio < 0.45
    assert summary.largest_group > 20
    assert 0.04 < summary.captions["wrong"] / summary.num_pairs < 0.06
    assert 0.005 < summary.captions["empty"] / summary.num_pairs < 0.015
    noisy = plan_corpus(**{**SMALL, "num_pairs": 12_000}, wrong_captions=0.3).summary
    assert 0.28 < noisy.captions["wrong"] / noisy.num_pairs < 0.32
    rng = np.random.default_rng(0)
    drawn = Counter(map(tuple, Prior.draw_ranking(rng).draw(rng, 50_000).tolist()))
    frequency = sorted(drawn.values(), reverse=True)
    assert len(frequency) == len(seen_combinations()) == 96
    assert frequency[0] > 8 * frequency[-1]
    assert sum(frequency[:10]) > 0.28 * 50_000


def test_draw_distinct_avoids_what_is_taken() -> None:
    rng = np.random.default_rng(0)
    codes = draw_distinct(lambda rows: rng.integers(0, 60, len(rows)), 50, np.arange(10))
    assert sorted(codes) == sorted(set(codes.tolist()))
    assert codes.min() >= 10


def test_evaluation_scenes_are_not_training_scenes() -> None:
    corpus = plan_corpus(**{**SMALL, "num_pairs": 3000, "num_eval": 200})
    train = {int(code) for shard in corpus.shards if shard.path.startswith("train") for code in shard.scene}
    held_out = [int(code) for shard in corpus.shards if shard.path.startswith("eval") for code in shard.scene]
    assert len(set(held_out)) == len(held_out)
    assert not train & set(held_out)


def test_labels_are_balanced_and_name_what_is_shown(written: tuple[Path, CorpusSummary]) -> None:
    folder, _ = written
    for shard in plan_corpus(**SMALL).shards:
        if not isinstance(shard, EvalShard) or shard.label is None:
            continue
        names = (folder / shard.path).parent.joinpath("classnames.txt").read_text().splitlines()
        samples = read_tar(folder / shard.path)
        labels = [int(sample["cls"]) for sample in samples.values()]
        assert set(Counter(labels).values()) <= {SMALL["num_eval"] // len(names), SMALL["num_eval"] // len(names) + 1}
        for code, label in zip(shard.scene, labels, strict=True):
            main = scene_of(code).objects[0]
            assert names[label] in (main.shape, main.colour, f"{main.colour} {main.shape}")


def test_every_set_has_prompts_and_three_have_a_probe_split(written: tuple[Path, CorpusSummary]) -> None:
    folder, _ = written
    for name in ("shape", "colour", "shape_colour_unseen", "sketch"):
        templates = (folder / "eval" / name / "templates.txt").read_text().splitlines()
        assert len(templates) >= 5
        assert all(line.count("{}") == 1 for line in templates)
    assert len(list(folder.glob("eval/*/train-00000.tar"))) == 3
    retrieval = read_tar(folder / "eval/retrieval/test-00000.tar")
    assert len({sample["txt"] for sample in retrieval.values()}) == len(retrieval) == SMALL["num_eval"]


def test_sketches_are_colourless_outlines(written: tuple[Path, CorpusSummary]) -> None:
    folder, _ = written
    for sample in read_tar(folder / "eval/sketch/test-00000.tar").values():
        pixels = np.asarray(Image.open(io.BytesIO(sample["jpg"])), np.float32)
        assert np.abs(pixels - pixels.mean(axis=2, keepdims=True)).max() < 8
        assert np.mean(pixels > 200) > 0.6


@pytest.mark.parametrize(("name", "value"), [("num_pairs", 0), ("seed", -1), ("image_size", 8), ("num_eval", 0)])
def test_impossible_sizes_are_named(name: str, value: int) -> None:
    with pytest.raises(InputError, match=name):
        plan_corpus(**{**SMALL, name: value})
