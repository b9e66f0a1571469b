"""List the terms of an objective and the methods that weigh them, without torch or numpy.

How a term is computed stands in `losses/terms.py`; its name, its words and its needs stand here, so that a command line
or a recipe is checked at once.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Literal, get_args

from distilclip.errors import InputError, did_you_mean

RowKind = Literal["pairs", "images", "sides"]
"""The rows that a term takes: those with a picture and a caption; those with a picture; pictures and captions apart."""
Need = Literal["teacher", "scale", "fusion", "masks", "centers", "queue"]
"""A teacher; a learned scale of the term's own; linear maps that fuse student and teacher; masked images; centers; the
teacher's embeddings of the batches before."""


@dataclass(frozen=True, kw_only=True)
class Term:
    """One loss as a part of an objective."""

    name: str
    """of its weight, of its column in metrics.jsonl, and of its chart in the report"""
    words: str
    """what it is, in a few plain words for the report"""
    needs: tuple[Need, ...] = ()
    default: float = 0.0
    """the weight where none is given"""
    rows: RowKind = "pairs"

    def applies(self, *, num_pairs: int, num_images: int, num_texts: int) -> bool:
        """Say whether the term teaches anything with data of so many pairs, pictures and captions."""
        if self.rows == "images" or "masks" in self.needs:
            return num_images > 0
        return num_pairs > 0 if self.rows == "pairs" else num_images + num_texts > 0


@dataclass(frozen=True, kw_only=True)
class Constants:
    """The constants inside the terms, beside their weights."""

    alpha: float = 0.999
    """share of the label loss in the cluster term; the rest is the KL"""
    temperature: float = 0.07
    """tau of the cluster term's KL"""
    class_scale: float = 1.0
    """s_l of the cluster term's label loss"""
    sample_rate: float = 1.0
    """share of the classes in each step's softmax (Partial FC); 1 means all"""
    gamma: float = 0.5
    """share of the image side in the instance term"""
    mask_ratio: float = 0.75
    """share of the patch grid that the masked term hides"""
    queue_length: float = 4096.0
    """how many rows before the batch the queue term compares with"""

    def __post_init__(self) -> None:
        for name in ("alpha", "gamma", "mask_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} is {getattr(self, name)}; it is a share, from 0 to 1.")
        for name in ("temperature", "class_scale"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"{name} is {getattr(self, name)}; it must be positive.")
        if not (self.queue_length >= 1 and self.queue_length == int(self.queue_length)):
            raise InputError(f"queue_length is {self.queue_length}; it is a number of rows, 1 or more.")
        if not 0 < self.sample_rate <= 1:
            raise InputError(f"sample_rate is {self.sample_rate}; it is a share of the classes, over 0 and up to 1.")


TERMS: dict[str, Term] = {}
"""Every term by its name."""


def constant_names() -> list[str]:
    """Return the names of all constants."""
    return [field.name for field in fields(Constants)]


def add_term(
    name: str, words: str, *, needs: tuple[Need, ...] = (), default: float = 0.0, rows: RowKind = "pairs"
) -> None:
    """Add a term, so that every objective knows its weight; `ValueError` for a name that is taken.

    The fields of `Term` say what the arguments are.
    """
    if name in TERMS or name in constant_names():
        raise ValueError(f"There is a term or constant {name!r} already: choose another name.")
    if unknown := set(needs) - set(get_args(Need)):
        raise ValueError(f"The term {name!r} needs {sorted(unknown)}; choose from {get_args(Need)}.")
    if needs and "teacher" not in needs:
        raise ValueError(f"The term {name!r} needs {needs}: only a term that needs a teacher gets these, too.")
    TERMS[name] = Term(name=name, words=words, needs=needs, default=default, rows=rows)


def find_term(name: str) -> Term:
    """Return a term by its name; `InputError` where there is none."""
    if name not in TERMS:
        raise InputError(f"There is no term {name!r} in methods.py. {did_you_mean(name, TERMS)}")
    return TERMS[name]


add_term("task", "contrastive loss of the student's own image and text embeddings", default=1.0)
add_term("cluster", "CLIP-CID cluster discrimination", needs=("teacher", "centers"), rows="images")
add_term("instance", "CLIP-CID instance discrimination", needs=("teacher", "scale"))
add_term("relational", "CLIP-KD relational distillation (CRD)", needs=("teacher",))
add_term("feature", "CLIP-KD feature distillation (FD)", needs=("teacher",), rows="sides")
add_term("masked", "CLIP-KD masked feature distillation (MFD)", needs=("teacher", "masks"), rows="sides")
add_term("gradient", "CLIP-KD gradient distillation (GD)", needs=("teacher",))
add_term("interactive", "CLIP-KD interactive contrast (ICL)", needs=("teacher", "scale"))
add_term("augmented", "CLIP-KD augmented features (AFD)", needs=("teacher", "scale", "fusion"))
add_term("intramodal", "relations of pictures to pictures, and of texts to texts", needs=("teacher",), rows="sides")
add_term(
    "queue",
    "relations to the teacher's rows of earlier batches",
    needs=("teacher", "scale", "queue"),
    rows="sides",
)


@dataclass(frozen=True, init=False)
class Weights:
    """The weight of every term and the constants inside them: what a method is.

    `Weights(feature=2000.0, alpha=0.9)` takes the weights of `TERMS` and the `Constants` by their names, and each of
    them can be read as an attribute. Raises `InputError` for an unknown name and for values that no term can have.
    """

    weights: Mapping[str, float]
    """every term's weight"""
    constants: Constants

    def __init__(self, **values: float) -> None:
        known = [*TERMS, *constant_names()]
        for name in values:
            if name not in known:
                raise InputError(f"The objective has no term or constant {name!r}. {did_you_mean(name, known)}")
            if not isinstance(values[name], numbers.Real):
                raise InputError(f"{name} is {values[name]!r}; a weight or constant of the objective is a number.")
        weights = {name: values.get(name, term.default) for name, term in TERMS.items()}
        for name, value in weights.items():
            if not 0 <= value < math.inf:  # so that nan is refused, too
                raise InputError(f"The weight of the term {name!r} is {value}; weights are 0 or more.")
        if not any(weights.values()):
            raise InputError("All term weights are 0: nothing would be learned.")
        constants = Constants(**{name: value for name, value in values.items() if name not in TERMS})
        object.__setattr__(self, "weights", weights)
        object.__setattr__(self, "constants", constants)

    def __getattr__(self, name: str) -> float:
        values = {} if name.startswith("_") else self.values
        if name not in values:
            raise AttributeError(f"The objective has no term or constant {name!r}.")
        return values[name]

    @property
    def values(self) -> dict[str, float]:
        """Every weight and constant by its name."""
        return {**self.__dict__["weights"], **asdict(self.__dict__["constants"])}

    def needs(self, what: Need) -> bool:
        """Say whether any term with a weight needs it."""
        return any(weight and what in find_term(name).needs for name, weight in self.weights.items())

    @property
    def needs_teacher(self) -> bool:
        """Whether any term compares with a teacher."""
        return self.needs("teacher")


METHODS: dict[str, Mapping[str, float]] = {
    "clip": {},
    "clip-cid": {"cluster": 1.0, "instance": 1.0},
    "clip-kd": {"relational": 1.0, "feature": 2000.0, "interactive": 1.0},
    # The best on the corpus, and as good as any on icons (docs/results.md): CLIP-KD's relations and contrast, a feature
    # weight for short trainings, and a queue. It bears, and wants, four times the learning rate that the task alone
    # takes, and a student as wide as its teacher.
    "distil": {"relational": 1.0, "feature": 200.0, "interactive": 1.0, "queue": 3.0},
    # Both papers' terms in one sum, each with its own paper's weight. Neither paper trains it: how the two methods are
    # weighed against each other is open, and whether the instance term and ICL, which both contrast student and
    # teacher, are one too many. 2000 for FD is for 32 epochs: `--terms feature 200` in short trainings. A first trial
    # put the sum between the two methods: it is a start for a mixture of one's own.
    "clip-cid-kd": {"cluster": 1.0, "instance": 1.0, "relational": 1.0, "feature": 2000.0, "interactive": 1.0},
}
"""The values by which a method differs from the defaults."""


def weights_of(name: str, overrides: Mapping[str, float] | None = None) -> Weights:
    """Return the weights of a named method (`METHODS`: `clip`, `clip-cid`, `clip-kd`, `clip-cid-kd`), some replaced.

    Raises `InputError` for an unknown method, term or constant.
    """
    if name not in METHODS:
        raise InputError(f"No objective {name!r}. {did_you_mean(str(name), METHODS)}")
    return Weights(**{**METHODS[name], **(overrides or {})})
