"""Word the prompts of the user's own sets: learn templates from captions, and say what wording does to scores."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from distilclip import files
from distilclip.errors import InputError
from distilclip.evaluate.embedders import Embedder
from distilclip.evaluate.protocol import Protocol
from distilclip.evaluate.wording import describe_spread, measure_spread, measure_unlikeness
from distilclip.messages import say
from distilclip.sets.caption_sample import read_captions
from distilclip.sets.dataset import EvaluationSet, LabelledSet
from distilclip.sets.score import Score
from distilclip.sets.specs import parse_spec
from distilclip.sets.template_learning import LearnedTemplate, learn_templates


@dataclass(frozen=True, kw_only=True)
class OwnPrompts:
    """Hold a set of the user's own with the templates that are used, those learned for it, and training captions."""

    dataset: LabelledSet
    captions: Sequence[str] = ()
    learned: Sequence[LearnedTemplate] = ()

    @property
    def record(self) -> dict[str, Any]:
        """Return what a result says of the learned templates; nothing where there are none."""
        return {"learned_templates": [dataclasses.asdict(found) for found in self.learned]} if self.learned else {}

    def judge(self, scores: Sequence[Score], model: Embedder, protocol: Protocol) -> list[Score]:
        """Return the scores of a model on the set, those of zero-shot with what the wording of the prompts does."""
        if not any(score.task == "zero-shot" and score.value is not None for score in scores):
            return list(scores)
        view = protocol.view(model, self.dataset)
        names, templates = self.dataset.classes.names, protocol.describe(self.dataset)["templates"]
        top1 = measure_spread(
            model,
            names,
            view.images.embedding,
            torch.from_numpy(self.dataset.test.labels)[view.images.rows],
            templates=[*templates, *(found.template for found in self.learned)],
        )
        details: dict[str, Any] = {"template_spread": describe_spread(top1)}
        if self.captions:
            details["prompts_unlike_captions"] = measure_unlikeness(
                model, names, templates=templates, captions=self.captions
            )
        return [score.with_details(**details) if score.task == "zero-shot" else score for score in scores]


def word_own_sets(
    datasets: Mapping[str, EvaluationSet], *, captions_of: Sequence[str], use: Literal["own", "learned"], folder: str
) -> dict[str, OwnPrompts]:
    """Return the prompts of the user's own labelled sets whose classes have names, by spec.

    With `captions_of` (stores, or pairs), templates are learned from their captions and written into `folder`; with
    `use="learned"` they take the place of the sets' own.

    Raises `InputError` where captions cannot be read, or where templates are to be used that no caption teaches.
    """
    own = {
        spec: dataset
        for spec, dataset in datasets.items()
        if parse_spec(spec)[1] != "known" and isinstance(dataset, LabelledSet) and dataset.classes.named
    }
    captions = read_captions(captions_of) if own and captions_of else []
    found = {}
    for spec, dataset in own.items():
        learned = learn_templates(captions, dataset.classes.names)
        if learned:
            _write(dataset.name, learned, len(captions), folder)
        elif use == "learned":
            raise InputError(
                f"{dataset.name}: none of {len(captions):,} captions of {', '.join(captions_of)} mentions a class name "
                f"(such as {dataset.classes.names[0]!r}), so no templates can be learned. Write them into a file, one "
                "a line, and give --templates FILE."
            )
        if use == "learned":
            templates = tuple(template.template for template in learned)
            record = {**dataset.record, "templates_source": f"learned from captions of {', '.join(captions_of)}"}
            dataset = dataclasses.replace(dataset, templates=templates, record=record)
        found[spec] = OwnPrompts(dataset=dataset, captions=captions, learned=learned)
    return found


def templates_path(folder: str, name: str) -> str:
    """Return the file of the templates learned for a set, in a folder of `evaluate`."""
    return files.join(folder, "templates", f"{name}.txt")


def _write(name: str, learned: Sequence[LearnedTemplate], num_captions: int, folder: str) -> None:
    path = templates_path(folder, name)
    files.write_bytes(path, "".join(f"{found.template}\n" for found in learned).encode())
    shown = ", ".join(repr(found.template) for found in learned)
    say(f"{name}: {len(learned)} templates learned from {num_captions:,} captions, in {path}: {shown}")
