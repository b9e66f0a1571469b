from __future__ import annotations

import doctest
import itertools
import random
import re
from collections import Counter

import pytest

from distilclip.sets import template_learning
from distilclip.sets.template_learning import learn_templates

NAMES = ["cat", "red fox", "owl", "dog", "t-shirt"]


def templates(captions: list[str], names: list[str]) -> list[str]:
    return [found.template for found in learn_templates(captions, names)]


# A naive reference, from the four points of the docstring


def naive(captions: list[str], names: list[str]) -> list[tuple[str, int, int]]:
    def words_of(text: str) -> list[str]:
        return re.findall(r"\w+|[^\w\s]", text.casefold())

    def plain(words: list[str]) -> list[str]:
        return ["0" if word.isdigit() else word for word in words]

    captions = sorted(set(captions))
    spelled = {caption: re.findall(r"\w+|[^\w\s]", caption) for caption in captions}
    own = {name: words_of(name) for name in names}
    sentences = [plain(words_of(caption)) for caption in captions]
    everywhere = [word for words in sentences for word in words]

    def may(word: str, *, at: int) -> bool:
        return sum(words[at] == word for words in sentences if words) >= 0.05 * everywhere.count(word)

    mentions = []  # (name, frames), and every frame is (words, spelling)
    for caption in captions:
        words, place = words_of(caption), 0
        while place < len(words):
            found = [name for name in names if words[place : place + len(own[name])] == own[name]]
            if not found:
                place += 1
                continue
            name = max(found, key=lambda name: len(own[name]))
            stop, frames = place + len(own[name]), {}
            for before, after in itertools.product(range(6), range(6)):
                begin, end = place - before, stop + after
                if begin < 0 or end > len(words):
                    continue
                if before and begin and not may(plain(words)[begin], at=0):
                    continue
                if after and end < len(words) and not may(plain(words)[end - 1], at=-1):
                    continue
                left, right = plain(words)[begin:place], plain(words)[stop:end]
                shown = [*spelled[caption][begin:place], "{}", *spelled[caption][stop:end]]
                if left[-1:] == ["an"]:
                    left[-1], shown[len(left) - 1] = "a", shown[len(left) - 1][0]
                frames[(*left, "{}", *right)] = " ".join(shown)
            mentions.append((name, frames))
            place = stop

    def having(frame: tuple[str, ...]) -> list[str]:
        return [name for name, frames in mentions if frame in frames]

    num_named = len({name for name, _ in mentions})
    least = max(min(3, num_named), 0.05 * num_named)
    votes = []
    for name, frames in mentions:
        shared = [
            frame
            for frame in frames
            if frame == ("{}",) or (len(having(frame)) >= 0.01 * len(mentions) and len(set(having(frame))) >= least)
        ]
        longest = [frame for frame in shared if len(frame) == max(map(len, shared))]
        most = [frame for frame in longest if len(having(frame)) == max(len(having(f)) for f in longest)]
        votes.append((min(most), frames[min(most)], name))
    elected = []
    for frame in {frame for frame, _, _ in votes}:
        spellings = Counter(text for voted, text, _ in votes if voted == frame)
        text = min(text for text, count in spellings.items() if count == max(spellings.values()))
        classes = {name for voted, _, name in votes if voted == frame}
        elected.append((-len(classes), -spellings.total(), frame, text))
    return [(text, -minus_count, -minus_classes) for minus_classes, minus_count, _, text in sorted(elected)[:8]]


def made_captions(seed: int, count: int) -> list[str]:
    """Captions of a few patterns with noise around them; signs stand apart, so that words can be joined by blanks."""
    draw = random.Random(seed)
    patterns = ["a photo of a {}", "An {} outdoors", "{}", "{} no {n}", "my {} in the {x}", "the {x} and a {} , 20 {x}"]
    noise = ["garden", "house", "of", "a", "3", "cat", "Sun", "!"]
    names = ["cat", "Red  fox", "owl", "dog", "T - shirt", "nothing"]
    return [
        draw.choice(patterns)
        .replace("{n}", str(draw.randrange(4)))
        .replace("{x}", draw.choice(noise))
        .replace("{}", draw.choice(names))
        for _ in range(count)
    ]


@pytest.mark.parametrize(("seed", "count"), [(0, 1), (1, 12), (2, 60), (3, 150), (4, 150)])
def test_learning_equals_the_naive_reference(seed: int, count: int) -> None:
    captions = made_captions(seed, count)
    found = [(one.template, one.num_mentions, one.num_classes) for one in learn_templates(captions, NAMES)]
    assert found == naive(captions, NAMES)
    assert count < 60 or len(found) > 3


# By hand


def test_the_example_of_the_module_is_true() -> None:
    assert doctest.testmod(template_learning, raise_on_error=True).attempted > 1


def test_the_words_around_class_names_are_the_templates() -> None:
    captions = [f"a photo of a {name}." for name in ("cat", "dog", "red fox")] + ["one big CAT", "sky", "a dog", "fox"]
    found = learn_templates(captions, NAMES)
    assert [(one.template, one.num_mentions, one.num_classes) for one in found] == [
        ("a photo of a {}.", 3, 3),
        ("a {}", 1, 1),  # four classes have it, those of the longer frame among them
        ("{}", 1, 1),
    ]


def test_a_template_is_spelled_as_most_captions_spell_it() -> None:
    captions = ["Icon: cat, no 12", "Icon: dog, no 7", "icon: red fox, no 3", "Icon: an owl, no 12", "Icon: dog, no 12"]
    assert templates(captions, NAMES)[0] == "Icon: {}, no 12"


def test_an_before_a_name_is_the_same_as_a() -> None:
    assert templates(["An owl at night", "An elk at night", "a dog at night"], ["owl", "elk", "dog"]) == [
        "A {} at night"
    ]


def test_a_frame_does_not_stop_where_no_caption_does() -> None:
    captions = [f"{name} on the {place}" for name, place in zip(NAMES, "ABCDE", strict=True)]
    assert templates(captions, NAMES) == ["{}"]  # not "{} on the"


def test_names_are_whole_words_and_the_longest_counts() -> None:
    names = ["fox", "red fox", "shirt", "t-shirt"]
    found = learn_templates(["a red fox", "a T-Shirt", "foxes shirts", "a {}"], names)
    assert [(one.template, one.num_mentions, one.num_classes) for one in found] == [("a {}", 2, 2)]


def test_no_mention_gives_no_template() -> None:
    assert learn_templates(["nothing here", "", "..."], NAMES) == []
    assert learn_templates([], NAMES) == []
    assert learn_templates(["cat"], [""]) == []


# Properties


def test_order_and_repetition_of_captions_and_names_change_nothing() -> None:
    captions = made_captions(5, 200)
    shuffled = [*captions, *captions[:50]]
    random.Random(0).shuffle(shuffled)
    assert learn_templates(shuffled, NAMES[::-1]) == learn_templates(captions, NAMES)


def test_one_class_that_is_named_all_the_time_does_not_make_the_templates() -> None:
    captions = [f"cat {i} at home" for i in range(100)] + [f"icon of {name}" for name in NAMES]
    assert templates(captions, NAMES) == ["icon of {}", "{}"]
