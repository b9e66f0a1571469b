"""Plan and write the corpus: pairs with duplicates, noisy captions and a known truth, and sets to evaluate on.

Everything is decided by (seed, sizes) before a picture is drawn: `plan_corpus` returns the tars to come, each of which
writes itself with random numbers of its own. So bytes depend neither on the number of workers nor on an interruption.

    OUT/train/00000.tar ...    key.jpg, key.txt, key.json
                               {caption, caption_kind, group, copy, change, background, objects}
    OUT/eval/SET/              test-00000.tar and, for the probe, train-00000.tar of key.jpg, key.cls
                               (a line of classnames.txt, counted from 0); classnames.txt, templates.txt
    OUT/eval/retrieval/        test-00000.tar of key.jpg, key.txt
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from distilclip import files
from distilclip.corpus.captions import COLOUR_TEMPLATES, SHAPE_TEMPLATES
from distilclip.corpus.scenes import (
    COLOURS,
    SHAPES,
    Prior,
    draw_distinct,
    draw_labelled,
    draw_scenes,
    held_out_combinations,
)
from distilclip.corpus.shard_writer import (
    CAPTION_KINDS,
    COPIES,
    PLAN,
    EvalShard,
    Shard,
    TrainShard,
    random_stream,
    write_shard,
)
from distilclip.errors import InputError

SETS = ("shape", "colour", "shape_colour_unseen", "sketch")
PROBED_SETS = ("shape", "colour", "sketch")  # the classes of the fourth are never seen in training, so it has no probe

# Pairs of one group: P(n) ~ n^-2.55 up to 64, 1.7 on average: 41 % of the pairs repeat another (LAION-400M: 43.7 %).
_GROUP_EXPONENT, _LARGEST_GROUP = 2.55, 64
WRONG, _EMPTY = 0.05, 0.01


@dataclass(frozen=True, kw_only=True)
class CorpusSummary:
    """What a corpus holds, by its truth."""

    num_pairs: int
    num_groups: int
    largest_group: int
    copies: dict[str, int]
    captions: dict[str, int]
    held_out: tuple[str, ...]
    num_eval: dict[str, int]

    @property
    def removable_ratio(self) -> float:
        """Share of pairs that repeat another pair's scene."""
        return 1 - self.num_groups / self.num_pairs


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """The tars and text files to come, and what they will hold."""

    shards: tuple[Shard, ...]
    texts: dict[str, str]
    summary: CorpusSummary


def plan_corpus(
    *,
    num_pairs: int,
    seed: int,
    image_size: int = 64,
    shard_size: int = 1000,
    num_eval: int = 1000,
    wrong_captions: float = WRONG,
) -> Corpus:
    """Decide everything about a corpus but its pixels and words.

    `image_size` is the side in pixels, `shard_size` the pairs per tar, `num_eval` the pictures of each evaluation set
    (as many again to fit its probe), `wrong_captions` the share of the pairs whose caption describes another picture.
    Raises `InputError` for sizes that make no corpus.
    """
    for name, value, least in (
        ("num_pairs", num_pairs, 1),
        ("seed", seed, 0),
        ("image_size", image_size, 16),
        ("shard_size", shard_size, 1),
        ("num_eval", num_eval, 1),
    ):
        if value < least:
            raise InputError(f"{name} is {value}; the synthetic corpus needs at least {least}.")
    rng = random_stream(seed, PLAN)
    prior = Prior.draw_ranking(rng)
    sizes = _group_sizes(rng, num_pairs)
    scenes = draw_distinct(lambda rows: draw_scenes(rng, len(rows), prior), len(sizes), np.empty(0, np.int64))
    group, copy, kind = _pairs(rng, sizes, wrong_captions)
    train = [
        TrainShard(
            path=f"train/{number:05d}.tar",
            seed=seed,
            image_size=image_size,
            first=first,
            prior=prior,
            scene=scenes[group[first : first + shard_size]],
            group=group[first : first + shard_size],
            copy=copy[first : first + shard_size],
            caption_kind=kind[first : first + shard_size],
        )
        for number, first in enumerate(range(0, num_pairs, shard_size))
    ]
    evaluation = _plan_evaluation(rng, prior, seed=seed, image_size=image_size, num=num_eval, taken=scenes)
    summary = CorpusSummary(
        num_pairs=num_pairs,
        num_groups=len(sizes),
        largest_group=int(sizes.max()),
        copies={name: int((copy == i).sum()) for i, name in enumerate(COPIES)},
        captions={name: int((kind == i).sum()) for i, name in enumerate(CAPTION_KINDS)},
        held_out=tuple(_classnames("shape_colour_unseen")),
        num_eval={shard.path: num_eval for shard in evaluation},
    )
    return Corpus(shards=(*train, *evaluation), texts=_texts(), summary=summary)


def write_texts(out: str, texts: dict[str, str]) -> None:
    """Write text files, given by their paths below `out`."""
    for path, text in texts.items():
        files.write_bytes(files.join(out, path), text.encode())


def write_shards(out: str, shards: Iterable[Shard], *, num_workers: int = 0) -> Iterator[str]:
    """Write tars below `out`, yielding the path of each as it is done.

    `num_workers` processes share them; 0 draws in this one. Workers are spawned, so a script that asks for any needs
    Python's usual `if __name__ == "__main__"`.
    """
    if not num_workers:
        for shard in shards:
            yield write_shard(out, shard)
        return
    # Spawned, not forked: the caller may hold threads of torch, whose locks a fork would copy in mid-use.
    with ProcessPoolExecutor(num_workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        for future in as_completed([pool.submit(write_shard, out, shard) for shard in shards]):
            yield future.result()


def _group_sizes(rng: np.random.Generator, num_pairs: int) -> Int[np.ndarray, " g"]:
    size = np.arange(1, _LARGEST_GROUP + 1)
    weight = size**-_GROUP_EXPONENT
    sizes = rng.choice(size, size=num_pairs, p=weight / weight.sum())  # more groups than can be needed
    total = np.cumsum(sizes)
    last = int(np.searchsorted(total, num_pairs))
    sizes[last] -= total[last] - num_pairs
    return sizes[: last + 1]


def _pairs(
    rng: np.random.Generator, sizes: Int[np.ndarray, " g"], wrong: float
) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """Draw group, copy and caption kind of every pair: one original per group, copies of either kind, in any order."""
    group = np.repeat(np.arange(len(sizes)), sizes)
    copy = rng.integers(1, len(COPIES), size=len(group))
    copy[np.cumsum(sizes) - sizes] = COPIES.index("original")
    order = rng.permutation(len(group))
    kind = rng.choice(len(CAPTION_KINDS), size=len(group), p=[1 - wrong - _EMPTY, wrong, _EMPTY])
    return group[order], copy[order], kind


def _plan_evaluation(
    rng: np.random.Generator, prior: Prior, *, seed: int, image_size: int, num: int, taken: Int[np.ndarray, " t"]
) -> list[EvalShard]:
    """Plan the evaluation tars; none of their scenes is a training scene or another tar's."""
    parts = [(name, split) for name in SETS for split in ("train", "test") if split == "test" or name in PROBED_SETS]
    shards = []
    for stream, (name, split) in enumerate([*parts, ("retrieval", "test")]):
        label = None if name == "retrieval" else rng.permutation(np.arange(num) % len(_classnames(name)))
        scene = _eval_scenes(rng, prior, name, label, num, taken)
        taken = np.concatenate([taken, scene])
        shards.append(
            EvalShard(
                path=f"eval/{name}/{split}-00000.tar",
                seed=seed,
                stream=stream,
                image_size=image_size,
                style="sketch" if name == "sketch" else "scene",
                scene=scene,
                label=label,
            )
        )
    return shards


def _eval_scenes(
    rng: np.random.Generator,
    prior: Prior,
    name: str,
    label: Int[np.ndarray, " num"] | None,
    num: int,
    taken: Int[np.ndarray, " t"],
) -> Int[np.ndarray, " num"]:
    if label is None:
        return draw_distinct(lambda rows: draw_scenes(rng, len(rows), prior), num, taken)
    if name == "shape_colour_unseen":
        combination = np.array(held_out_combinations())[label]
    else:  # any seen combination of the labelled shape or colour, all alike: the test is balanced, unlike training
        column = 1 if name == "colour" else 0
        options = [prior.combinations[prior.combinations[:, column] == c] for c in range(len(_classnames(name)))]
        combination = np.stack([options[c][rng.integers(len(options[c]))] for c in label])
    return draw_distinct(lambda rows: draw_labelled(rng, combination[rows], prior), num, taken)


def _classnames(name: str) -> list[str]:
    if name == "shape_colour_unseen":
        return [f"{COLOURS[c]} {SHAPES[s]}" for s, c in held_out_combinations()]
    return list(COLOURS if name == "colour" else SHAPES)


def _texts() -> dict[str, str]:
    texts = {}
    for name in SETS:
        templates = COLOUR_TEMPLATES if name == "colour" else SHAPE_TEMPLATES
        texts[f"eval/{name}/classnames.txt"] = "".join(f"{line}\n" for line in _classnames(name))
        texts[f"eval/{name}/templates.txt"] = "".join(f"{line}\n" for line in templates)
    return texts
