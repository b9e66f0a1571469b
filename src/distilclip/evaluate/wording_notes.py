"""Say what the wording of prompts does to the scores of one's own sets. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from distilclip.sets.score import Score

FAR = 0.9
"""Prompts are far from captions where their `unlikeness` is at least this; 0.5 is what captions have."""


def note_wording(scores: Sequence[Score]) -> list[str]:
    """Say of each set of one's own how top-1 depends on the template, and how unlike captions the prompts are."""
    notes = []
    for name, worded in _by_set(scores).items():
        spreads = [
            f"{model} {100 * spread['min']:.1f} ({spread['min_template']!r}) to {100 * spread['max']:.1f} "
            f"({spread['max_template']!r})"
            for model, spread in _details(worded, "template_spread")
        ]
        num = len(_details(worded, "template_spread")[0][1]["top1"])
        notes.append(f"{name}: top-1 with each of {num} templates alone: {', '.join(spreads)}.")
        unlike = [f"{model} {value:.2f}" for model, value in _details(worded, "prompts_unlike_captions")]
        if unlike:
            found = ", ".join(unlike)
            notes.append(f"{name}: prompts unlike the training captions (0.5 as those are, 1 most): {found}.")
    return notes


def list_wording_warnings(scores: Sequence[Score], *, templates_files: dict[str, str]) -> list[str]:
    """Say which sets have prompts that are far from the captions, or whose wording weighs more than the models do.

    `templates_files` are the files of learned templates, by set.
    """
    return [
        warning
        for name, worded in _by_set(scores).items()
        for warning in (_far(name, worded, templates_files.get(name)), _reordered(name, worded))
        if warning
    ]


def _far(name: str, scores: Sequence[Score], templates_file: str | None) -> str:
    far = [(model, value) for model, value in _details(scores, "prompts_unlike_captions") if value >= FAR]
    if not far:
        return ""
    models = ", ".join(f"{value:.0%} of the time for {model}" for model, value in far)
    remedy = (
        f"Give --templates learned, or edit {templates_file}, which holds the learned templates, and give that."
        if templates_file
        else "Write templates in the words of the captions into a file, one a line, and give --templates FILE."
    )
    return (
        f"{name}: the prompts are unlike the training captions: a prompt is farther from them than a caption is from "
        f"the others {models}. {remedy}"
    )


def _reordered(name: str, scores: Sequence[Score]) -> str:
    """Compare the widest spread over templates with the distance between the models, and their order by template."""
    value = {score.model: score.value for score in scores if score.value is not None}
    spreads = dict(_details(scores, "template_spread"))
    widest = max(spread["max"] - spread["min"] for spread in spreads.values())
    apart = max(value.values()) - min(value.values())
    best = max(value, key=value.__getitem__)
    leads = [  # by how much another model comes first with a template alone
        (spreads[model]["top1"][template] - own, model, template)
        for template, own in spreads[best]["top1"].items()
        for model in value
        if template in spreads[model]["top1"]
    ]
    lead, other, template = max(leads)
    if lead <= 0 or widest <= apart:
        return ""
    return (
        f"{name}: the order of the models depends on the wording: with {template!r} alone, {other} is {100 * lead:.1f} "
        f"above {best}. One template or another moves a model by up to {100 * widest:.1f}, while the models lie "
        f"{100 * apart:.1f} apart. Word the prompts as the captions are (--training-captions, --templates)."
    )


def _by_set(scores: Sequence[Score]) -> dict[str, list[Score]]:
    """Return the top-1 scores of sets whose wording was measured, by set."""
    found: dict[str, list[Score]] = {}
    for score in scores:
        if score.task == "zero-shot" and score.metric == "top1" and "template_spread" in score.details:
            found.setdefault(score.set, []).append(score)
    return found


def _details(scores: Sequence[Score], name: str) -> list[tuple[str, Any]]:
    return [(score.model, score.details[name]) for score in scores if name in score.details]
