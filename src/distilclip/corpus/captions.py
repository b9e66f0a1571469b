"""Write captions for scenes: web-like ones that tell a random part of the truth, and full descriptions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from distilclip.corpus.scenes import Object, Scene

# The ways to say a word of the vocabulary: the plain one first, which is also the commonest.
SYNONYMS: dict[str, tuple[str, ...]] = {
    "circle": ("circle", "disc"),
    "square": ("square", "box"),
    "cross": ("cross", "plus"),
    "ring": ("ring", "donut"),
    "diamond": ("diamond", "rhombus"),
    "crescent": ("crescent", "moon"),
    "oval": ("oval", "ellipse"),
    "cyan": ("cyan", "turquoise"),
    "purple": ("purple", "violet"),
    "grey": ("grey", "gray"),
    "small": ("small", "little", "tiny"),
    "medium": ("medium", "medium sized"),
    "large": ("large", "big", "huge"),
    "solid": ("solid", "plain"),
    "striped": ("striped", "with stripes"),
    "dotted": ("dotted", "spotted", "with dots"),
    "checkered": ("checkered", "with checks"),
}
_PLACES = {
    "top left": "in the top left",
    "top": "at the top",
    "top right": "in the top right",
    "left": "on the left",
    "middle": "in the middle",
    "right": "on the right",
    "bottom left": "in the bottom left",
    "bottom": "at the bottom",
    "bottom right": "in the bottom right",
}
_FRAMES = (
    "{}",
    "a photo of {}",
    "photo of {}",
    "a picture of {}",
    "an image of {}",
    "image: {}",
    "there is {}",
    "this is {}",
    "we see {}",
)
_BACKGROUNDS = ("on a {} background", "on {}", "in front of a {} wall")
_TAILS = ("stock photo", "free image", "clip art")

# Prompts for zero-shot classification, in the wording that the captions use.
SHAPE_TEMPLATES = ("a {}", "a photo of a {}", "a picture of a {}", "an image of a {}", "a small {}", "a big {}")
COLOUR_TEMPLATES = ("something {}", "a {} object", "a photo of a {} shape", "a picture of a {} object", "a {} shape")


def write_caption(rng: np.random.Generator, scene: Scene) -> str:
    """Write a caption that tells a random part of the truth, at least one shape or colour, and nothing false."""
    count = len(scene.objects) if rng.random() < 0.6 else int(rng.integers(1, len(scene.objects) + 1))
    mentioned = [scene.objects[i] for i in rng.permutation(len(scene.objects))[:count]]
    if len(scene.objects) > 1 and rng.random() < 0.1 and (one := _only_of_its_size(scene, mentioned[0])):
        text = f"the {_say(rng, one.size)} one is {_with_article(rng, _phrase(rng, one, size=0.0))}"
    else:
        text = _pick(rng, _FRAMES).format(_list(rng, mentioned))
        if count == 1 and rng.random() < 0.15:
            text = f"{text} {_PLACES[mentioned[0].place]}"
    if rng.random() < 0.15:
        text = f"{text} {_pick(rng, _BACKGROUNDS).format(scene.background)}"
    if rng.random() < 0.06:
        text = f"{text} - {_pick(rng, _TAILS)}"
    return text.capitalize() if rng.random() < 0.3 else text


def describe(scene: Scene) -> str:
    """Describe the whole truth in plain words; different scenes have different descriptions."""
    objects = ", ".join(f"{o.size} {o.texture} {o.colour} {o.shape} {o.place}" for o in scene.objects)
    return f"{objects} on {scene.background}"


def _only_of_its_size(scene: Scene, item: Object) -> Object | None:
    same = [o for o in scene.objects if o.size == item.size]
    return item if len(same) == 1 and item.size != "medium" else None


def _list(rng: np.random.Generator, objects: Sequence[Object]) -> str:
    phrases = [_with_article(rng, _phrase(rng, o)) for o in objects]
    if len(phrases) == 2 and rng.random() < 0.4:
        return f"{phrases[0]} {_relation(rng, *objects)} {phrases[1]}"
    if len(phrases) == 1:
        return phrases[0]
    joint = _pick(rng, (" and ", ", ", " with "))
    return f"{', '.join(phrases[:-1])}{joint}{phrases[-1]}"


def _relation(rng: np.random.Generator, first: Object, second: Object) -> str:
    """Return a true word for where the first stands, seen from the second; two places differ in a row or a column."""
    true = [
        word
        for word, edge, opposite in (
            ("left of", "left", "right"),
            ("right of", "right", "left"),
            ("above", "top", "bottom"),
            ("below", "bottom", "top"),
        )
        if (edge in first.place and edge not in second.place)
        or (opposite in second.place and opposite not in first.place)
    ]
    return _pick(rng, true)


def _phrase(rng: np.random.Generator, item: Object, *, size: float = 0.2) -> str:
    """Word the object without an article; `size` is the probability that its size is told."""
    tell_colour, tell_texture, tell_size = rng.random(3) < (0.5, 0.25, size)
    adjectives: list[str] = []
    afterwards: list[str] = []
    if tell_size:
        adjectives.append(_say(rng, item.size))
    if tell_texture:
        texture = _say(rng, item.texture)
        (afterwards if texture.startswith("with") else adjectives).append(texture)
    if tell_colour and rng.random() < 0.1:
        if not adjectives and not afterwards and rng.random() < 0.5:
            return f"something {_say(rng, item.colour)}"
        noun = _pick(rng, ("object", "shape", "thing"))
        return " ".join([*adjectives, _say(rng, item.colour), noun, *afterwards])
    noun = _say(rng, item.shape)
    if tell_colour and rng.random() < 0.12:
        return " ".join([*adjectives, noun, *afterwards, _pick(rng, ("that is", "in")), _say(rng, item.colour)])
    if tell_colour:
        adjectives.insert(int(rng.integers(len(adjectives) + 1)), _say(rng, item.colour))
    return " ".join([*adjectives, noun, *afterwards])


def _with_article(rng: np.random.Generator, phrase: str) -> str:
    if phrase.startswith("something") or rng.random() < 0.2:
        return phrase
    if rng.random() < 0.1:
        return f"the {phrase}"
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def _say(rng: np.random.Generator, word: str) -> str:
    synonyms = SYNONYMS.get(word, (word,))
    return synonyms[0] if rng.random() < 0.7 else _pick(rng, synonyms)


def _pick(rng: np.random.Generator, options: Sequence[str]) -> str:
    return options[int(rng.integers(len(options)))]
