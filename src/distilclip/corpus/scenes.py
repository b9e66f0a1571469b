"""Draw scenes, the truth about the corpus' pictures, each stored as one integer.

A scene is a background and one to three objects; an object is a size, shape, colour, texture and place. Scenes are
drawn by the million as integers, so that "no two groups show the same scene" is a comparison of integers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

SHAPES = (
    "circle",
    "square",
    "triangle",
    "star",
    "heart",
    "cross",
    "ring",
    "diamond",
    "hexagon",
    "crescent",
    "arrow",
    "oval",
)
COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink", "brown", "grey")
TEXTURES = ("solid", "striped", "dotted", "checkered")
SIZES = ("small", "medium", "large")
PLACES = ("top left", "top", "top right", "left", "middle", "right", "bottom left", "bottom", "bottom right")
BACKGROUNDS = ("white", "black", "cream", "mint", "lavender")

MAX_OBJECTS = 3
SMALL, MEDIUM, LARGE = range(3)

# Size leads, so that a larger code is a larger object: sorted downwards, objects stand in the order of drawing and a
# large one never hides a small one.
_RADICES = (len(SIZES), len(SHAPES), len(COLOURS), len(TEXTURES), len(PLACES))
_NUM_OBJECTS = int(np.prod(_RADICES))
_ABSENT = -1


@dataclass(frozen=True)
class Object:
    """One object of a scene, in the words of the vocabulary above."""

    shape: str
    colour: str
    texture: str
    size: str
    place: str


@dataclass(frozen=True)
class Scene:
    """The whole truth about a picture; objects stand from the back to the front."""

    objects: tuple[Object, ...]
    background: str


def scene_of(code: int | np.integer) -> Scene:
    """Return the scene that a code stands for."""
    rest, digits = int(code), []
    for _ in range(MAX_OBJECTS):
        rest, digit = divmod(rest, _NUM_OBJECTS + 1)
        digits.append(digit + _ABSENT)
    return Scene(tuple(_object_of(d) for d in reversed(digits) if d != _ABSENT), BACKGROUNDS[rest])


def held_out_combinations() -> list[tuple[int, int]]:
    """Return the 24 (shape, colour) indices that no training picture or caption shows together.

    Two colours for each shape, and each colour with two or three shapes: the parts are all seen in training.
    """
    count = len(COLOURS)
    return sorted((s, (3 * s + shift) % count) for s in range(len(SHAPES)) for shift in (1, 6))


def seen_combinations() -> list[tuple[int, int]]:
    """Return every other (shape, colour), in order."""
    held_out = set(held_out_combinations())
    return [(s, c) for s in range(len(SHAPES)) for c in range(len(COLOURS)) if (s, c) not in held_out]


@dataclass(frozen=True)
class Prior:
    """How often training scenes show each combination: Zipf-Mandelbrot, 1 / (rank + 8)."""

    combinations: Int[np.ndarray, "m 2"]
    probability: Float[np.ndarray, " m"]

    @classmethod
    def draw_ranking(cls, rng: np.random.Generator) -> Prior:
        """Draw a prior over the seen combinations: its ranking comes from `rng`."""
        combinations = rng.permutation(np.array(seen_combinations()))
        weight = 1.0 / (np.arange(len(combinations)) + 8.0)
        return cls(combinations, weight / weight.sum())

    def draw(self, rng: np.random.Generator, num: int) -> Int[np.ndarray, "num 2"]:
        """Draw `num` combinations as (shape, colour) indices."""
        return self.combinations[rng.choice(len(self.combinations), size=num, p=self.probability)]


def draw_scenes(rng: np.random.Generator, num: int, prior: Prior) -> Int[np.ndarray, " num"]:
    """Draw codes of `num` training scenes. At most one object is large, so that none is hidden."""
    combination = prior.draw(rng, num * MAX_OBJECTS).reshape(num, MAX_OBJECTS, 2)
    size = rng.choice([SMALL, MEDIUM], size=(num, MAX_OBJECTS), p=[0.4, 0.6])
    size[:, 0] = rng.choice(len(SIZES), size=num, p=[0.25, 0.4, 0.35])
    present = np.arange(MAX_OBJECTS) < rng.choice([1, 2, 3], size=num, p=[0.7, 0.2, 0.1])[:, None]
    return _scene_codes(rng, size, combination, present)


def draw_labelled(
    rng: np.random.Generator, combination: Int[np.ndarray, "num 2"], prior: Prior
) -> Int[np.ndarray, " num"]:
    """Draw codes of scenes that show one main object with the given (shape, colour) indices.

    Three in ten have a small second object, of another shape and another colour, beside a larger main one.
    """
    num = len(combination)
    size = np.full((num, MAX_OBJECTS), SMALL)
    size[:, 0] = rng.choice(len(SIZES), size=num, p=[0.2, 0.4, 0.4])
    combinations = np.zeros((num, MAX_OBJECTS, 2), np.int64)
    combinations[:, 0] = combination
    combinations[:, 1] = prior.draw(rng, num)
    clutter = (rng.random(num) < 0.3) & (size[:, 0] != SMALL) & (combinations[:, 1] != combination).all(axis=1)
    present = np.stack([np.ones(num, bool), clutter, np.zeros(num, bool)], axis=1)
    return _scene_codes(rng, size, combinations, present)


def draw_distinct(
    draw: Callable[[Int[np.ndarray, " m"]], Int[np.ndarray, " m"]], num: int, taken: Int[np.ndarray, " t"]
) -> Int[np.ndarray, " num"]:
    """Draw `num` different codes, none of them in `taken`; `draw(rows)` draws the codes of those rows anew."""
    seen = set(taken.tolist())
    codes = np.empty(num, np.int64)
    missing = np.arange(num)
    while len(missing):
        drawn = draw(missing)
        fresh = np.ones(len(missing), bool)
        for i, code in enumerate(drawn.tolist()):
            fresh[i] = code not in seen
            seen.add(code)
        codes[missing[fresh]] = drawn[fresh]
        missing = missing[~fresh]
    return codes


def _object_of(code: int) -> Object:
    size, shape, colour, texture, place = np.unravel_index(code, _RADICES)
    return Object(SHAPES[shape], COLOURS[colour], TEXTURES[texture], SIZES[size], PLACES[place])


def _scene_codes(
    rng: np.random.Generator,
    size: Int[np.ndarray, "num 3"],
    combination: Int[np.ndarray, "num 3 2"],
    present: Bool[np.ndarray, "num 3"],
) -> Int[np.ndarray, " num"]:
    """Add textures, places (no two objects share one) and a background, and pack each scene into one integer."""
    texture = rng.choice(len(TEXTURES), size=size.shape, p=[0.46, 0.18, 0.18, 0.18])
    place = rng.permuted(np.tile(np.arange(len(PLACES)), (len(size), 1)), axis=1)[:, :MAX_OBJECTS]
    code = np.ravel_multi_index((size, combination[..., 0], combination[..., 1], texture, place), _RADICES)
    objects = -np.sort(-np.where(present, code, _ABSENT), axis=1)
    scene = rng.choice(len(BACKGROUNDS), size=len(size), p=[0.35, 0.2, 0.15, 0.15, 0.15])
    for k in range(MAX_OBJECTS):
        scene = scene * (_NUM_OBJECTS + 1) + (objects[:, k] - _ABSENT)
    return scene
