"""Learn prompt templates from captions: the words that stand around class names in them.

>>> captions = ["an icon of a cat", "an icon of an owl", "an icon of a dog", "cat", "my owl 7"]
>>> [learned.template for learned in learn_templates(captions, ["cat", "dog", "owl"])]
['an icon of a {}', '{}']
"""

from __future__ import annotations

import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

MOST_TEMPLATES = 8
MOST_WORDS = 5  # on either side of the name
LEAST_SHARE = 0.01  # of the mentions, so that a frame is shared
LEAST_CLASSES, LEAST_SHARE_OF_CLASSES = 3, 0.05  # likewise, of the classes that are mentioned
LEAST_AT_EDGE = 0.05  # of a word's places in captions, so that a frame may begin (or end) with it

Frame = tuple[str, ...]
_WORD = re.compile(r"\w+|[^\w\s]")
_NAME = "{}"


@dataclass(frozen=True, kw_only=True)
class LearnedTemplate:
    """Hold a template, how many mentions of class names voted for it, and how many classes these name."""

    template: str
    num_mentions: int
    num_classes: int


def learn_templates(captions: Iterable[str], names: Sequence[str]) -> list[LearnedTemplate]:
    """Learn templates from the captions that mention class names, the commonest first; none where none does.

    A mention is a class name as whole words, whatever their case; of names that overlap, the first and longest counts.
    Equal captions count once.

    1. The frames of a mention are its name with up to `MOST_WORDS` words (or signs) on either side. A frame begins at
       its caption's start, or with the name, or with a word that begins captions in `LEAST_AT_EDGE` of its places;
       likewise it ends. Numbers count as one word, and `an` before the name as `a`.
    2. A frame is shared if `LEAST_SHARE` of all mentions have it, and these name `LEAST_CLASSES` classes and
       `LEAST_SHARE_OF_CLASSES` of those mentioned anywhere. The bare name always is.
    3. A mention votes for its longest shared frame; of several, for the one that most mentions have.
    4. The frames voted for from most classes are the templates; of several, those with most votes. Each is spelled as
       most of its voters spell it.
    """
    different = list(dict.fromkeys(captions))
    mentions = list(_find_mentions(different, names))
    edges = _Edges.of(different)
    counts: Counter[Frame] = Counter()
    classes: defaultdict[Frame, set[int]] = defaultdict(set)
    for mention in mentions:
        for frame, _, _ in mention.frames(edges):
            counts[frame] += 1
            classes[frame].add(mention.index)
    num_named = len(classes[(_NAME,)])
    least_classes = max(min(LEAST_CLASSES, num_named), LEAST_SHARE_OF_CLASSES * num_named)
    shared = {
        frame: count
        for frame, count in counts.items()
        if frame == (_NAME,) or (count >= LEAST_SHARE * len(mentions) and len(classes[frame]) >= least_classes)
    }
    voters: defaultdict[Frame, set[int]] = defaultdict(set)
    spellings: defaultdict[Frame, Counter[str]] = defaultdict(Counter)
    for mention in mentions:
        own = (found for found in mention.frames(edges) if found[0] in shared)
        frame, start, stop = min(own, key=lambda found: (-len(found[0]), -shared[found[0]], found))
        voters[frame].add(mention.index)
        spellings[frame][mention.spelling(start, stop)] += 1
    best = sorted(voters, key=lambda frame: (-len(voters[frame]), -spellings[frame].total(), frame))
    return [
        LearnedTemplate(
            template=min(spellings[frame], key=lambda text: (-spellings[frame][text], text)),
            num_mentions=spellings[frame].total(),
            num_classes=len(voters[frame]),
        )
        for frame in best[:MOST_TEMPLATES]
    ]


@dataclass(frozen=True, slots=True)
class _Mention:
    """A class name in a caption: words `first` to `stop` of it; `spans` say where words lie in the text."""

    index: int
    caption: str
    words: Sequence[str]
    spans: Sequence[tuple[int, int]]
    first: int
    stop: int

    def frames(self, edges: _Edges) -> Iterator[tuple[Frame, int, int]]:
        """Yield the frames around the name, each with its first word and that after its last."""
        words, first, stop = self.words, self.first, self.stop
        starts = [i for i in range(max(0, first - MOST_WORDS), first) if i == 0 or words[i] in edges.first]
        stops = [
            i
            for i in range(stop + 1, min(len(words), stop + MOST_WORDS) + 1)
            if i == len(words) or words[i - 1] in edges.last
        ]
        for begin, end in itertools.product([*starts, first], [stop, *stops]):
            before = list(words[begin:first])
            if before and before[-1] == "an":
                before[-1] = "a"
            yield (*before, _NAME, *words[stop:end]), begin, end

    def spelling(self, begin: int, end: int) -> str:
        """Return the text from one word to before another as a template."""
        spans = self.spans
        left = self.caption[spans[begin][0] : spans[self.first][0]]
        right = self.caption[spans[self.stop - 1][1] : spans[end - 1][1]]
        left = re.sub(r"\b(a)n(\W*)$", r"\1\2", left, flags=re.IGNORECASE)
        return " ".join(f"{left}{_NAME}{right}".split())


@dataclass(frozen=True)
class _Edges:
    """Words that a frame may begin and end with."""

    first: frozenset[str]
    last: frozenset[str]

    @classmethod
    def of(cls, captions: Sequence[str]) -> _Edges:
        places: Counter[str] = Counter()
        first: Counter[str] = Counter()
        last: Counter[str] = Counter()
        for caption in captions:
            words = [_normal(word) for word in _WORD.findall(caption)]
            places.update(words)
            first.update(words[:1])
            last.update(words[-1:])
        first_words, last_words = (
            frozenset(word for word, count in found.items() if count >= LEAST_AT_EDGE * places[word])
            for found in (first, last)
        )
        return cls(first_words, last_words)


def _find_mentions(captions: Sequence[str], names: Sequence[str]) -> Iterator[_Mention]:
    index = {tuple(word.casefold() for word in _WORD.findall(name)): i for i, name in enumerate(names)}
    index.pop((), None)
    lengths = sorted({len(words) for words in index}, reverse=True)
    for caption in captions:
        matches = list(_WORD.finditer(caption))
        plain = tuple(match.group().casefold() for match in matches)
        place = 0
        while place < len(plain):
            name = next((name for n in lengths if (name := plain[place : place + n]) in index), ())
            if name:
                words, spans = [_normal(match.group()) for match in matches], [match.span() for match in matches]
                yield _Mention(index[name], caption, words, spans, place, place + len(name))
            place += max(1, len(name))


def _normal(word: str) -> str:
    return "0" if word.isdigit() else word.casefold()
