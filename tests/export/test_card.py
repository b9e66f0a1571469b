from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from distilclip.errors import InputError
from distilclip.export.card import Form, Records, find_records, model_card

TRAIN = {
    "stage": "train",
    "data": [],
    "store": "store",
    "groups": "groups",
    "clusters": None,
    "live_teacher": None,
    "objective": "clip-cid",
    "num_steps": 7,
    "batch_size": 8,
    "learning_rate": 0.002,
    "weight_decay": 0.1,
    "warmup_steps": 1,
    "precision": "fp32",
    "seed": 5,
}


def write(folder: Path, config: dict[str, Any], result: dict[str, Any]) -> str:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "result.json").write_text(json.dumps({"stage": config["stage"], **result}))
    return str(folder)


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, str]:
    """A run's folders, as far as a card reads them."""
    store = write(
        tmp_path / "store",
        {"stage": "embed", "data": ["/secret/place/{000..012}.tar"]},
        {
            "num_rows": 12000,
            "num_valid": 11885,
            "dim": 16,
            "teacher": {"name": "/x/big", "digest": "d1", "precision": "fp32"},
        },
    )
    groups = write(
        tmp_path / "groups",
        {"stage": "balance"},
        {"num_kept": 7012, "num_valid": 11885, "metric": "cosine", "threshold": 0.033467},
    )
    result = {"num_rows": 7012, "num_samples_seen": 56, "objective": {"task": 1.0, "cluster": 0.5, "feature": 0.0}}
    train = write(tmp_path / "train", {**TRAIN, "store": store, "groups": groups}, result)
    row = {"set": "shape", "task": "zero-shot", "metric": "top1", "headline": True, "num_test": 700}
    rows = [
        {**row, "model_digest": "mine", "value": 0.5243, "low": 0.49, "high": 0.5629},
        {**row, "model_digest": "other", "value": 0.9999, "low": 0.99, "high": 1.0},
        {**row, "model_digest": "mine", "set": "missing", "value": None},
    ]
    evaluation = write(tmp_path / "evaluate", {"stage": "evaluate"}, {"rows": rows})
    return {"train": train, "evaluation": evaluation}


def card(records: Records, form: Form = "onnx", **replaced: Any) -> str:
    values: dict[str, Any] = {
        "digest": "mine",
        "num_parameters": 1234567,
        "model_cfg": {"embed_dim": 16, "vision_cfg": {"timm_model_name": "cnn_w8"}},
        "preprocess_cfg": {"size": [64, 64]},
        "exported": {"difference": {"image": 1.5e-7}},
        "records": records,
    }
    return model_card("stu: dent", form, **{**values, **replaced})


def test_the_card_states_what_the_records_say(folders: dict[str, str]) -> None:
    text = card(find_records(folders["train"], digest="mine", evaluation=folders["evaluation"]))
    for fact in (
        "| parameters | 1,234,567 |",
        "| pairs trained on | 7,012 |",
        "| pairs embedded | 11,885 of 12,000 |",
        "7,012 of 11,885 images kept (cosine distance under 0.03347)",
        "| name | `big` |",
        "clip-cid: task 1, cluster 0.5 |",
        "| learning_rate | 0.002 |",
        "| shape | zero-shot | top1 | 0.5243 | 0.4900 to 0.5629 | 700 |",
        "| difference, image | 1.5e-07 |",
        "`{000..012}.tar`",
    ):
        assert fact in text
    assert "0.9999" not in text  # of another model
    assert "secret" not in text  # where the data lay
    assert "missing" not in text


def test_an_evaluation_of_another_model_is_refused_by_both_digests(folders: dict[str, str]) -> None:
    path = Path(folders["evaluation"], "result.json")
    result = json.loads(path.read_text())
    rows = [{**row, "model": "big", "model_digest": "theirs"} for row in result["rows"]]
    path.write_text(json.dumps({**result, "rows": rows}))
    with pytest.raises(InputError, match=r"--evaluation\) has no score of .*train, .* mine, but of big \(theirs\)"):
        find_records(folders["train"], digest="mine", evaluation=folders["evaluation"])


def test_names_of_any_letters_keep_the_cards_tables_and_head() -> None:
    row = {"set": "a|b\nc", "task": "zero-shot", "metric": "top1", "headline": True, "value": 0.5, "num_test": 7}
    text = model_card(
        '"né" 🙂 [x]: {y}',
        "huggingface",
        digest="d",
        num_parameters=1,
        model_cfg=None,
        preprocess_cfg={"size": 32},
        exported={},
        records=Records(scores=[row]),
    )
    assert "| a\\|b c | zero-shot | top1 | 0.5000 |  | 7 |" in text
    head = yaml.safe_load(text.split("---")[1])
    assert head["model_name"] == '"né" 🙂 [x]: {y}'


def test_what_only_a_person_can_say_is_marked(folders: dict[str, str]) -> None:
    text = card(find_records(folders["train"], digest="mine"))
    for field in ("Licence of these weights", "Licence of the teacher's weights", "Source of the data, its licence"):
        assert any(field in line and "**to be filled in**" in line for line in text.splitlines())
    assert "export with --evaluation" in text
    assert text.startswith("---\nlicense: unknown")
    assert 'model_name: "stu: dent"' in text


def test_a_checkpoint_leads_to_its_train_folder(folders: dict[str, str]) -> None:
    checkpoint = f"{folders['train']}/checkpoints/step-000007"
    assert find_records(checkpoint, digest="mine").embed is not None


def test_a_model_without_records_says_so(tmp_path: Path) -> None:
    records = find_records("ViT-B-32", digest="mine")
    assert records == Records()
    text = card(records, "huggingface", model_cfg=None)
    assert "Not recorded: the model is no train folder" in text
    assert "CLIPModel.from_pretrained" in text


def test_own_towers_are_imported_in_the_example() -> None:
    assert "import distilclip.models.towers" in card(Records(), "open_clip")
    for vision_cfg in ({}, {"timm_model_name": "resnet18"}):
        assert "import distilclip.models.towers" not in card(
            Records(), "open_clip", model_cfg={"vision_cfg": vision_cfg}
        )


def test_live_teachers_are_named(tmp_path: Path) -> None:
    config = {**TRAIN, "store": None, "groups": None, "data": ["a/*.tar"], "live_teacher": "/x/giant"}
    result = {"num_rows": 1, "num_samples_seen": 1, "objective": {"task": 1.0}}
    text = card(find_records(write(tmp_path / "t", config, result), digest="mine"))
    assert "`giant`, run during training" in text
    assert "`*.tar`" in text
