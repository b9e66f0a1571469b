"""Stop at the first sample that cannot be used, or skip a limited share of such samples and count them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from distilclip.data.limits import OnError, check_bad_ratio
from distilclip.data.samples import reason_of
from distilclip.errors import InputError

EARLY = 1000
"""Samples before which a budget is not judged, so that one bad sample among the first ten stops nothing."""


@dataclass
class ErrorPolicy:
    """Counts samples and, by reason, the unusable ones; raises `InputError` once they are too many.

    `on_error="raise"` stops at the first. `"skip"` goes on while at most `max_bad_ratio` (a share of 1) of all samples
    seen are unusable.
    """

    on_error: OnError = "raise"
    max_bad_ratio: float = 0.05
    num_seen: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    first: str = ""

    def __post_init__(self) -> None:
        check_bad_ratio(self.max_bad_ratio)

    @property
    def num_bad(self) -> int:
        """Number of samples seen that cannot be used."""
        return sum(self.reasons.values())

    def forget(self) -> None:
        """Start counting again from zero."""
        self.num_seen, self.first = 0, ""
        self.reasons.clear()

    def seen(self, num_samples: int) -> None:
        """Count samples, the unusable ones among them included."""
        self.num_seen += num_samples

    def bad(self, error: str, *, where: str) -> None:
        """Count one unusable sample; `where` names file and member. Raises `InputError` if the policy is to raise."""
        if self.on_error == "raise":
            raise InputError(
                f"{where}: {error}. {_remedy(error)} "
                "Or pass over such samples, counted by reason: --on-error skip; in `train`, a --max-bad-ratio above 0."
            )
        self.reasons[reason_of(error)] += 1
        self.first = self.first or f"{where}: {error}"

    def count_rows(self, keys: Sequence[str], errors: Sequence[str], *, uri: str) -> None:
        """Count the samples of a file that were judged before; an empty error is none."""
        self.seen(len(keys))
        for key, error in zip(keys, errors, strict=True):
            if error:
                self.bad(error, where=f"{uri}: {key}")

    def check(self, *, final: bool = False) -> None:
        """Raise `InputError` if more than `max_bad_ratio` is unusable; before `EARLY` samples only when `final`."""
        if self.num_bad <= self.max_bad_ratio * self.num_seen or (self.num_seen < EARLY and not final):
            return
        counts = ", ".join(f"{reason} ({count})" for reason, count in self.reasons.most_common())
        common = self.reasons.most_common(1)[0][0]
        raise InputError(
            f"{self.num_bad} of {self.num_seen} samples cannot be used, over the budget of {self.max_bad_ratio:.1%}: "
            f"{counts}. The first is {self.first}. {_remedy(common)} Or allow more with --max-bad-ratio."
        )


def _remedy(error: str) -> str:
    return _REMEDIES.get(reason_of(error), "Repair the sample, or remove it from the data.")


_REMEDIES = {
    "no embedding": "Give the pairs that the embeddings were made from as --data, or leave out --data.",
    "duplicate key": "The members of a sample must lie side by side (`tar --sort=name`), under a key of their own.",
    "too many pixels": "Scale the image down, or raise --max-pixels (of `embed`, `evaluate`; `train` has the store's).",
    "too elongated": "Crop the picture, or remove it from the data.",
    "no memory for it": "Scale the image down, or use fewer --num-workers.",
    "tar cut": "The file is incomplete: fetch it again.",
    "unsafe member name": "Write the tar again with relative names.",
    "no caption": "Add `key.txt`, or a `caption` to `key.json`; `embed --may-lack caption` embeds pictures alone.",
    "no image": "Look at the data; `embed --may-lack image` embeds captions alone.",
    "missing image file": "Paths in the table start from the folder it lies in.",
    "unreadable image file": "Look at its path and its rights, or remove it from the data.",
    "unclosed quote": 'Close the quote, or write "" for each quote inside a quoted caption.',
    "more values than columns": "Put captions with commas into double quotes.",
}
