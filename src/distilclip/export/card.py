"""Write a model card from the records of the run that made the model.

What only a person can say is marked to be filled in.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from distilclip.errors import InputError
from distilclip.models import towers
from distilclip.stage_folder import StageRecord, read_finished, require

Form = Literal["open_clip", "huggingface", "sentence-transformers", "timm", "onnx"]
FILL_IN = "**to be filled in**"
_LIBRARY = {
    "open_clip": "open_clip",
    "huggingface": "transformers",
    "sentence-transformers": "sentence-transformers",
    "timm": "timm",
    "onnx": "onnx",
}
_TASK = {"sentence-transformers": "sentence-similarity", "timm": "image-feature-extraction"}  # others: zero-shot

_USE = {
    "open_clip": """\
import open_clip
{towers}
model, _, preprocess = open_clip.create_model_and_transforms("local-dir:model")
tokenizer = open_clip.get_tokenizer("local-dir:model")""",
    "huggingface": """\
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

model = CLIPModel.from_pretrained("model")
# Not CLIPTokenizer, which leaves curled quotation marks as they are.
tokenizer = AutoTokenizer.from_pretrained("model")
# Pictures are resized with Pillow, as in training; transformers' default, torchvision, rounds otherwise.
# Where the longer side, resized, is 3, 7, 11, ... pixels too long, transformers cuts one pixel earlier than open_clip.
processor = AutoImageProcessor.from_pretrained("model", backend="pil")""",
    "sentence-transformers": """\
from PIL import Image
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("model")
# Unit rows of one space; transformers resizes pictures with torchvision, which rounds otherwise than training did.
images, texts = model.encode([Image.open("cat.jpg")]), model.encode(["a photo of a cat"])
similarity = model.similarity(images, texts)""",
    "timm": """\
import timm
import torch
from PIL import Image

model = timm.create_model("local-dir:model", pretrained=True).eval()  # num_classes=0: features before the projection
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
with torch.no_grad():
    output = model(transform(Image.open("cat.jpg").convert("RGB"))[None])
image = torch.nn.functional.normalize(output, dim=-1)  # the image embedding""",
    "onnx": """\
import numpy as np
import onnxruntime
from tokenizers import Tokenizer

tokenizer = Tokenizer.from_file("model/tokenizer.json")
tokens = np.array([text.ids for text in tokenizer.encode_batch(["a photo of a cat"])])
text = onnxruntime.InferenceSession("model/text.onnx").run(None, {{"tokens": tokens}})[0]

# Pictures as clip.json says under `preprocessing`; distilclip.export.onnx_runtime.preprocess does it with Pillow alone.
pixels = np.zeros((1, 3, {height}, {width}), np.float32)
image = onnxruntime.InferenceSession("model/image.onnx").run(None, {{"pixels": pixels}})[0]
similarity = image @ text.T""",
}


@dataclass(frozen=True, kw_only=True)
class Records:
    """The finished folders behind a model; None or empty where there is no such record, or its folder is gone."""

    train: StageRecord | None = None
    embed: StageRecord | None = None
    balance: StageRecord | None = None
    cluster: StageRecord | None = None
    scores: list[dict[str, Any]] = field(default_factory=list)


def find_records(model: str, *, digest: str, evaluation: str | None = None) -> Records:
    """Find the records behind `model` (a train folder, or a checkpoint in one), through its inputs.

    Args:
        model: the model as the user named it.
        digest: that of its weights; of `evaluation`, only rows of these weights count.
        evaluation: a folder of `evaluate`.

    Raises:
        InputError: `evaluation` has no row of these weights.
    """
    scores = []
    if evaluation is not None:
        rows = require(evaluation, stage="evaluate")["rows"]
        scores = [row for row in rows if row["model_digest"] == digest]
        if not scores:
            others = {row["model_digest"]: row["model"] for row in rows}
            raise InputError(
                f"{evaluation} (from --evaluation) has no score of {model}, whose weights have SHA-256 {digest}, but "
                f"of {', '.join(f'{name} ({found})' for found, name in others.items()) or 'no model'}. "
                "Evaluate the model that is exported."
            )
    folders = (model, os.path.dirname(os.path.dirname(model.rstrip("/"))))
    train = next((record for path in folders if (record := read_finished(path, stage="train"))), None)
    if train is None:
        return Records(scores=scores)
    pack = train.config.get("pack")
    packed = read_finished(pack, stage="pack") if pack else None
    options = train.config if packed is None else packed.config  # what a pack was made from
    found = {
        stage: read_finished(path, stage=stage)
        for stage, option in (("embed", "store"), ("balance", "groups"), ("cluster", "clusters"))
        if (path := _first(options.get(option)))
    }
    return Records(train=train, scores=scores, **found)


def _first(value: str | list[str] | None) -> str | None:
    """Return the first of several stores: groups and clusters are of that one."""
    return next(iter(value), None) if isinstance(value, list) else value


def model_card(
    name: str,
    form: Form,
    *,
    digest: str,
    num_parameters: int,
    model_cfg: dict[str, Any] | None,
    preprocess_cfg: dict[str, Any],
    exported: dict[str, Any],
    records: Records,
) -> str:
    """Return the README.md of an exported model.

    Args:
        name: of the model.
        form: what it was exported as.
        digest: SHA-256 of its weights, as `evaluate` states it too.
        num_parameters: of both towers.
        model_cfg: open_clip's architecture; None where only the hub knows it.
        preprocess_cfg: open_clip's preprocessing.
        exported: what the export found: differences to torch, int8's loss.
        records: of the run.
    """
    sections = {
        "Model": _model(digest, num_parameters, model_cfg, preprocess_cfg),
        "Data": _data(records),
        "Teacher": _teacher(records),
        "Recipe": _recipe(records.train),
        "Evaluation": _evaluation(records.scores),
        "This export": _exported(exported),
        "Use": _use(form, model_cfg, preprocess_cfg),
        "Licence": _licence(),
    }
    body = "\n\n".join(f"## {title}\n\n{text}" for title, text in sections.items() if text)
    return f"{_front_matter(name, form)}\n# {name}\n\nA CLIP model made with distilclip.\n\n{body}\n"


def _front_matter(name: str, form: Form) -> str:
    return "\n".join(
        [
            "---",
            "license: unknown # to be filled in",
            f"library_name: {_LIBRARY[form]}",
            f"model_name: {json.dumps(name, ensure_ascii=False)}",  # a JSON string is a YAML string, whatever is in it
            f"pipeline_tag: {_TASK.get(form, 'zero-shot-image-classification')}",
            "tags: [clip, distillation]",
            "---",
        ]
    )


def _model(digest: str, num_parameters: int, model_cfg: dict[str, Any] | None, preprocess_cfg: dict[str, Any]) -> str:
    lines = [("parameters", f"{num_parameters:,}"), ("SHA-256 of the weights", f"`{digest}`")]
    lines += [(f"preprocessing, {key}", f"{value}") for key, value in preprocess_cfg.items()]
    table = _table(("", ""), lines)
    return table if model_cfg is None else f"{table}\n\n```json\n{json.dumps(model_cfg, indent=2)}\n```"


def _data(records: Records) -> str:
    lines: list[tuple[str, str]] = []
    if records.train is not None:
        # Names of files only: where they lay is nobody's business.
        patterns = records.train.config["data"] or (records.embed.config["data"] if records.embed else [])
        lines.append(("files", ", ".join(f"`{os.path.basename(p)}`" for p in patterns) or "not recorded"))
        lines.append(("pairs trained on", f"{records.train.result['num_rows']:,}"))
        lines.append(("pairs seen, with repetition", f"{records.train.result['num_samples_seen']:,}"))
    if records.embed is not None:
        found = records.embed.result
        lines.append(("pairs embedded", f"{found['num_valid']:,} of {found['num_rows']:,}"))
    if records.balance is not None:
        found = records.balance.result
        if records.balance.stage == "select":
            score = f" by {found['score']}" if found["score"] else ""
            lines.append(("selection", f"{found['num_kept']:,} of {found['num_scored']:,} pairs kept{score}"))
        else:
            lines.append(
                (
                    "semantic balance",
                    f"{found['num_kept']:,} of {found['num_valid']:,} images kept "
                    f"({found['metric']} distance under {found['threshold']:.4g})",
                )
            )
    source = f"Source of the data, its licence, and consent: {FILL_IN}."
    return f"{_table(('', ''), lines)}\n\n{source}" if lines else f"Not recorded. {source}"


def _teacher(records: Records) -> str:
    licence = f"Licence of the teacher's weights: {FILL_IN}."
    if records.embed is not None:
        teacher = records.embed.result["teacher"]
        lines = [
            ("name", f"`{os.path.basename(str(teacher['name']).rstrip('/'))}`"),
            ("SHA-256 of the weights", f"`{teacher['digest']}`"),
            ("embeddings", f"{records.embed.result['dim']} wide, computed in {teacher['precision']}"),
        ]
        return f"{_table(('', ''), lines)}\n\n{licence}"
    live = records.train.config.get("live_teacher") if records.train else None
    if live:
        return f"`{os.path.basename(str(live).rstrip('/'))}`, run during training.\n\n{licence}"
    return f"None recorded: if there was one, name it here ({FILL_IN})."


def _recipe(train: StageRecord | None) -> str:
    if train is None:
        return f"Not recorded: the model is no train folder of distilclip. {FILL_IN}"
    weights = {name: value for name, value in train.result["objective"].items() if value}
    objective = ", ".join(f"{name} {value:g}" for name, value in weights.items())
    names = (
        "num_steps",
        "num_epochs",
        "batch_size",
        "learning_rate",
        "weight_decay",
        "warmup_steps",
        "precision",
        "seed",
    )
    values = {**train.config, "num_steps": train.result.get("num_steps", train.config.get("num_steps"))}
    options = [(name, f"{values[name]}") for name in (*names, "precision", "seed") if values.get(name) is not None]
    return _table(("", ""), [("objective", f"{train.config['objective']}: {objective}"), *options])


def _evaluation(scores: Sequence[dict[str, Any]]) -> str:
    shown = [row for row in scores if row.get("headline") and row["value"] is not None]
    if not shown:
        return f"None in the records: run `distilclip evaluate` and export with --evaluation. {FILL_IN}"
    lines = [
        (
            row["set"],
            row["task"],
            row["metric"],
            f"{row['value']:.4f}",
            f"{row['low']:.4f} to {row['high']:.4f}" if row.get("low") is not None else "",
            f"{row['num_test']}",
        )
        for row in shown
    ]
    return _table(("set", "task", "metric", "value", "95 % interval", "samples"), lines)


def _exported(exported: dict[str, Any]) -> str:
    lines = []
    for name, value in exported.items():
        flat = _flatten(name, value) if isinstance(value, dict) else [(name, value)]
        lines += [(key, f"{found:.4g}" if isinstance(found, float) else f"{found}") for key, found in flat]
    return _table(("", ""), lines) if lines else ""


def _flatten(prefix: str, values: dict[str, Any]) -> list[tuple[str, Any]]:
    pairs = []
    for name, value in values.items():
        key = f"{prefix}, {name}"
        pairs += _flatten(key, value) if isinstance(value, dict) else [(key, value)]
    return pairs


def _licence() -> str:
    return (
        f"Licence of these weights: {FILL_IN}, and the field `license` at the top of this page.\n\n"
        f"Intended use, and uses that are out of place: {FILL_IN}.\n\nKnown weaknesses and biases: {FILL_IN}."
    )


def _use(form: Form, model_cfg: dict[str, Any] | None, preprocess_cfg: dict[str, Any]) -> str:
    tower = ((model_cfg or {}).get("vision_cfg") or {}).get("timm_model_name") or ""
    own = (
        "import distilclip.models.towers  # the image tower is one of distilclip's\n" if hasattr(towers, tower) else ""
    )
    size = preprocess_cfg["size"]
    height, width = (size, size) if isinstance(size, int) else size
    return f"```python\n{_USE[form].format(towers=own, height=height, width=width)}\n```"


def _table(columns: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [columns, ["---"] * len(columns), *lines]
    return "\n".join("| " + " | ".join(map(_cell, row)) + " |" for row in rows)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
