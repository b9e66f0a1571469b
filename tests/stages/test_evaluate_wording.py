"""The prompts of a set of one's own: the spread over templates, those learned from captions, and the warnings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from distilclip import cli
from distilclip.errors import InputError
from distilclip.stage_calls import build_config
from distilclip.stages.evaluate import Config, main
from tests.conftest import encoded, picture, write_tar
from tests.sets.test_sets import write_images

CLASSES = ("cat", "dog", "owl")


@pytest.fixture
def values(tmp_path: Path, tiny_clip_folder: str) -> dict[str, object]:
    """Options of an evaluation on three classes, with captions that mention them."""
    for seed, name in enumerate(CLASSES):
        write_images(tmp_path / "animals" / name, ["0.jpg", "1.jpg"], seed=5 * seed)
    captions = [f"an icon of a {name} {i}" for name in CLASSES for i in range(4)] + ["owl", "cat", "dog", "sky 7"]
    members = []
    for row, caption in enumerate(captions):
        members += [(f"{row:03}.jpg", encoded(picture(row))), (f"{row:03}.txt", caption.encode())]
    return {
        "models": (tiny_clip_folder,),
        "sets": (f"folder:{tmp_path}/animals",),
        "training_captions": (write_tar(tmp_path / "pairs.tar", members),),
        "tasks": ("zero-shot",),
        "device": "cpu",
        "num_workers": 0,
    }


def evaluate(values: dict[str, object], out: Path, **changes: object) -> dict[str, object]:
    return main(build_config(Config, {**values, "out": str(out), **changes}, stage="evaluate"))


def top1_of(result: dict[str, object]) -> dict[str, object]:
    rows: list[dict[str, object]] = result["rows"]  # type: ignore[assignment]
    return next(row for row in rows if row["metric"] == "top1")


def test_without_captions_the_spread_over_plain_templates_is_told(tmp_path: Path, values: dict[str, object]) -> None:
    result = evaluate(values, tmp_path / "out", training_captions=())
    details = top1_of(result)["details"]
    spread = details["template_spread"]  # type: ignore[index]
    assert set(spread["top1"]) == {"a photo of a {}.", "{}"}
    assert spread["top1"]["a photo of a {}."] == top1_of(result)["value"]
    assert spread["min"] == min(spread["top1"].values())
    assert spread["max"] == spread["top1"][spread["max_template"]]
    assert "prompts_unlike_captions" not in details  # type: ignore[operator]
    assert "animals: top-1 with each of 2 templates alone: clip" in (tmp_path / "out" / "table.md").read_text()
    assert not (tmp_path / "out" / "templates").exists()


def test_learned_templates_are_offered_used_and_can_be_given_as_a_file(
    tmp_path: Path, values: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    offered = evaluate(values, tmp_path / "offered")
    path = tmp_path / "offered" / "templates" / "animals.txt"
    assert path.read_text() == "an icon of a {} 0\n{}\n"
    assert f"2 templates learned from 16 captions, in {path}: 'an icon of a {{}} 0', '{{}}'" in capsys.readouterr().err
    assert offered["sets"][0]["templates"] == ["a photo of a {}."]  # type: ignore[index]
    assert offered["sets"][0]["learned_templates"][0] == {  # type: ignore[index]
        "template": "an icon of a {} 0",
        "num_mentions": 12,
        "num_classes": 3,
    }
    assert set(top1_of(offered)["details"]["template_spread"]["top1"]) == {  # type: ignore[index]
        "a photo of a {}.",
        "an icon of a {} 0",
        "{}",
    }
    learned = evaluate(values, tmp_path / "learned", templates="learned")
    given = evaluate(values, tmp_path / "given", templates=str(path))
    assert learned["sets"][0]["templates"] == given["sets"][0]["templates"] == path.read_text().splitlines()  # type: ignore[index]
    assert top1_of(learned)["outcomes"] == top1_of(given)["outcomes"]
    assert "animals: templates learned from captions of" in (tmp_path / "learned" / "table.md").read_text()


def test_prompts_far_from_the_captions_are_warned_of(
    tmp_path: Path, values: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "far.txt").write_text("zygote quorum {} xylem byzantine flux\n")
    far = evaluate(values, tmp_path / "far", templates=str(tmp_path / "far.txt"))
    assert top1_of(far)["details"]["prompts_unlike_captions"] == 1.0  # type: ignore[index]
    (warning,) = far["warnings"]  # type: ignore[misc]
    assert f"100% of the time for clip. Give --templates learned, or edit {tmp_path}/far/templates/animals" in warning
    assert f"warning: evaluate: {warning}" in capsys.readouterr().err
    near = evaluate(values, tmp_path / "near", templates="learned")
    assert top1_of(near)["details"]["prompts_unlike_captions"] < 0.6  # type: ignore[index]
    assert near["warnings"] == []


def test_an_interrupted_run_and_a_second_one_give_the_same(tmp_path: Path, values: dict[str, object]) -> None:
    first = evaluate(values, tmp_path / "out", templates="learned")
    (tmp_path / "out" / "result.json").unlink()
    (tmp_path / "out" / "parts" / "00-00.json").unlink()
    assert evaluate(values, tmp_path / "out", templates="learned") == first
    (tmp_path / "pairs.tar").write_bytes((tmp_path / "pairs.tar").read_bytes() + bytes(10240))
    with pytest.raises(InputError, match="training captions came, went or changed"):
        evaluate(values, tmp_path / "out", templates="learned")


def test_captions_that_mention_no_class_teach_nothing(tmp_path: Path, values: dict[str, object]) -> None:
    (tmp_path / "animals" / "classnames.txt").write_text("cat\tlynx\ndog\tdingo\nowl\tkiwi\n")
    result = evaluate(values, tmp_path / "offered")
    assert "learned_templates" not in result["sets"][0]  # type: ignore[index]
    with pytest.raises(InputError, match=r"animals: none of 16 captions of .* mentions a class name .*'lynx'"):
        evaluate(values, tmp_path / "learned", templates="learned")


def test_options_that_would_do_nothing_are_refused(tmp_path: Path, values: dict[str, object]) -> None:
    with pytest.raises(InputError, match="--templates learned needs --training-captions"):
        evaluate(values, tmp_path / "out", training_captions=(), templates="learned")
    with pytest.raises(InputError, match="--training-captions is for your own labelled sets"):
        evaluate(values, tmp_path / "out", sets=(f"pairs:{tmp_path}/pairs.tar",))


def test_a_store_is_an_input_of_the_evaluation(
    tmp_path: Path, values: dict[str, object], tiny_clip_folder: str
) -> None:
    pairs, store, out = str(tmp_path / "pairs.tar"), str(tmp_path / "store"), str(tmp_path / "out")
    common = ["--device", "cpu", "--num-workers", "0"]
    assert cli.main(["embed", "--data", pairs, "--out", store, "--model", tiny_clip_folder, *common]) == 0
    sets = ["--sets", f"folder:{tmp_path}/animals", "--models", tiny_clip_folder, "--tasks", "zero-shot"]
    captions = ["--training-captions", store, "--templates", "learned"]
    assert cli.main(["evaluate", "--out", out, *sets, *captions, *common]) == 0
    assert set(json.loads((tmp_path / "out" / "inputs.json").read_text())) == {"embed"}
    assert (tmp_path / "out" / "templates" / "animals.txt").read_text() == "an icon of a {} 0\n{}\n"
