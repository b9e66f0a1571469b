from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from distilclip import config as recipes
from distilclip.errors import InputError
from distilclip.evaluate.embedders import Embedder
from distilclip.evaluate.model_specs import split_model, weights_by_name
from distilclip.evaluate.protocol import Protocol, View
from distilclip.models.clip import create_clip
from distilclip.sets.dataset import EvaluationSet
from distilclip.sets.score import Score
from distilclip.stage_calls import build_config
from distilclip.stages.evaluate import Config, main
from tests.conftest import TINY_CLIP
from tests.sets import made_sets
from tests.sets.test_sets import write_own_sets


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, tiny_clip_json: str) -> tuple[str, str]:
    """Two models of random weights, `large` the teacher."""
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("small", "large")):
        create_clip(tiny_clip_json, seed=seed).save(str(folder / name))
    return str(folder / "small"), str(folder / "large")


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A labelled set with training images, and image-text pairs."""
    return write_own_sets(tmp_path_factory.mktemp("sets"), ["circle", "square", "star"], num_train=4, num_test=2)


def config_of(out: Path, models: tuple[str, ...], sets: tuple[str, ...], **options: object) -> Config:
    values = {"out": str(out), "models": models, "sets": sets, "device": "cpu", "num_workers": 0, **options}
    return build_config(Config, values, stage="evaluate")


def content(folder: Path) -> dict[str, bytes]:
    """Every file that a rerun must reproduce."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "env.json"
    }


def test_every_model_on_every_set_gets_its_rows(
    tmp_path: Path, models: tuple[str, str], sets: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    result = main(config_of(tmp_path / "out", models, sets, teacher="large"))
    found = {(row["model"], row["set"], row["task"], row["metric"]): row for row in result["rows"]}
    assert {(model, task) for model, _, task, _ in found} == {
        *((m, t) for m in ("small", "large") for t in ("zero-shot", "linear-probe", "retrieval")),
        ("small", "agreement"),  # the teacher is not compared with itself
    }
    assert found["small", "shape", "zero-shot", "top1"]["num_test"] == 6
    assert found["small", "pairs", "retrieval", "text_to_image_r10"]["value"] == 1.0
    assert all(row["value"] is None or row["metric"] == "kl" or -1 <= row["value"] <= 1 for row in found.values())
    digests = {row["model"]: row["model_digest"] for row in found.values()}
    assert digests["small"] != digests["large"]
    assert {model["name"]: model["digest"] for model in result["models"]} == digests
    (shape,) = (s for s in result["sets"] if s["name"] == "shape")
    assert shape["templates"] == ["a photo of a {}."]
    assert (shape["num_train"], shape["num_test"], shape["num_classes"]) == (12, 6, 3)
    assert "Linear probe" in capsys.readouterr().out
    assert "| small |" in (tmp_path / "out" / "table.md").read_text()
    assert len((tmp_path / "out" / "table.csv").read_text().splitlines()) == len(result["rows"]) + 1


def test_a_finished_folder_is_not_touched(tmp_path: Path, models: tuple[str, str], sets: tuple[str, str]) -> None:
    config = config_of(tmp_path / "out", models[:1], sets[:1])
    first = main(config)
    before = content(tmp_path / "out")
    assert main(config) == first
    assert content(tmp_path / "out") == before


def test_published_rows_are_printed_and_written_and_a_finished_folder_prints_them_too(
    tmp_path: Path, models: tuple[str, str], sets: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    imagenet = (f"imagenet={sets[0]}",)  # one's own set by that name
    options = {"tasks": ("zero-shot",), "cache": str(tmp_path / "cache")}
    asked = {"published": ("clip-kd-terms",), **options}
    own = main(config_of(tmp_path / "own", models[:1], imagenet, **options))
    before = content(tmp_path / "own")
    capsys.readouterr()
    main(config_of(tmp_path / "own", models[:1], imagenet, **asked))
    assert "34.23" in capsys.readouterr().out
    assert content(tmp_path / "own") == before  # printed only
    assert main(config_of(tmp_path / "both", models[:1], imagenet, **asked)) == own
    assert "| 34.23 |" in (tmp_path / "both/table.md").read_text()
    assert "34.23" not in (tmp_path / "both/table.csv").read_text()
    main(config_of(tmp_path / "none", models[:1], sets[:1], **asked))
    assert "clip-kd-terms: no published number is for these sets and tasks." in capsys.readouterr().err


def test_an_interrupted_run_measures_only_what_is_missing(
    tmp_path: Path, models: tuple[str, str], sets: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(tmp_path / "out", models, sets, teacher="large")
    main(config)
    before = content(tmp_path / "out")
    measured = []
    measure = Protocol.measure

    def counted(self: Protocol, model: Embedder, dataset: EvaluationSet, *, teacher: View | None) -> list[Score]:
        measured.append((model.name, dataset.name))
        return measure(self, model, dataset, teacher=teacher)

    monkeypatch.setattr(Protocol, "measure", counted)
    for part in sorted((tmp_path / "out" / "parts").iterdir()):
        part.unlink()
        (tmp_path / "out" / "result.json").unlink()
        main(config)
        assert content(tmp_path / "out") == before
    assert measured == [(model, name) for model in ("small", "large") for name in ("shape", "pairs")]


@pytest.mark.slow
def test_killed_at_any_moment_and_run_again_gives_the_same_files(
    tmp_path: Path, models: tuple[str, str], sets: tuple[str, str]
) -> None:
    # Processes of their own: the number of threads, which a test may have changed in this one, moves the last bits.
    flags = recipes.as_flags({"models": list(models), "sets": list(sets), "teacher": "large", "num_workers": 0})
    evaluate = [sys.executable, "-m", "distilclip", "evaluate", *flags, "--device", "cpu", "--out"]
    subprocess.run([*evaluate, str(tmp_path / "whole")], check=True)
    whole = content(tmp_path / "whole")
    # The process kills itself, without any clean-up, when it has written its second part.
    code = (
        "import os, signal, sys\n"
        "from distilclip import stage_folder\n"
        "from distilclip.cli import main\n"
        "write = stage_folder.write_json\n"
        "def dying(path, value):\n"
        "    write(path, value)\n"
        "    if path.endswith('00-01.json'): os.kill(os.getpid(), signal.SIGKILL)\n"
        "stage_folder.write_json = dying\n"
        "main(sys.argv[1:])\n"
    )
    out = str(tmp_path / "out")
    killed = subprocess.run([sys.executable, "-c", code, *evaluate[3:], out], capture_output=True, text=True)
    assert killed.returncode == -9, killed.stderr
    assert not (tmp_path / "out" / "result.json").exists()
    subprocess.run([*evaluate, out], check=True)
    found = content(tmp_path / "out")
    assert found.keys() == whole.keys()
    assert {name for name in whole if name != "config.json" and found[name] != whole[name]} == set()


def test_worker_processes_change_no_byte(tmp_path: Path, models: tuple[str, str], sets: tuple[str, str]) -> None:
    main(config_of(tmp_path / "a", models[:1], sets))
    main(config_of(tmp_path / "b", models[:1], sets, num_workers=1))
    results = [(tmp_path / name / "result.json").read_bytes() for name in "ab"]
    assert results[0] == results[1]


def test_templates_from_a_file_replace_the_sets_own(
    tmp_path: Path, models: tuple[str, str], sets: tuple[str, str]
) -> None:
    (tmp_path / "templates.txt").write_text("{}\nthe {}\n")
    templates = str(tmp_path / "templates.txt")
    result = main(config_of(tmp_path / "out", models[:1], sets[:1], tasks=("zero-shot",), templates=templates))
    assert result["sets"][0]["templates"] == ["{}", "the {}"]
    assert result["rows"][0]["details"]["num_templates"] == 2


def test_a_teacher_need_not_be_among_the_models(tmp_path: Path, models: tuple[str, str], sets: tuple[str, str]) -> None:
    result = main(config_of(tmp_path / "out", models[:1], sets[:1], tasks=("agreement",), teacher=models[1]))
    assert {row["model"] for row in result["rows"]} == {"small"}
    assert {row["metric"] for row in result["rows"]} == {"top1_agreement", "kl", "cka", "cosine"}


# Flags


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("runs/demo/train/student/", ("student", "runs/demo/train/student/")),
        ("kd=runs/demo/train/student", ("kd", "runs/demo/train/student")),
        ("hf-hub:org/model", ("model", "hf-hub:org/model")),
        ("ViT-B-32", ("ViT-B-32", "ViT-B-32")),
    ],
)
def test_model_names(spec: str, expected: tuple[str, str]) -> None:
    assert split_model(spec) == expected


def test_a_name_with_a_space_is_refused() -> None:
    with pytest.raises(InputError, match=r"'all pairs' cannot name a model\. A name has letters"):
        split_model("all pairs=runs/student")


def test_weights_belong_to_models_by_name() -> None:
    assert weights_by_name(["w.safetensors"], ["a"]) == {"a": "w.safetensors"}
    assert weights_by_name(["b=w.pt"], ["a", "b"]) == {"b": "w.pt"}
    with pytest.raises(InputError, match=r"write NAME=w\.pt"):
        weights_by_name(["w.pt"], ["a", "b"])
    with pytest.raises(InputError, match="Did you mean 'student'"):
        weights_by_name(["studnt=w.pt"], ["student", "b"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"models": ()}, "--models is missing"),
        ({"sets": ()}, "--sets is missing"),
        ({"tasks": ()}, "--tasks is empty"),
        ({"sets": ("pets",)}, "The set pets needs --data-root"),
        ({"sets": ("pests",)}, "Did you mean 'pets'"),
        ({"models": ("a/x", "b/x")}, "two entries called 'x'"),
        ({"sets": ("tar:a/x", "folder:b/x")}, "two entries called 'x'"),
        ({"sets": ("a/x",)}, "does not say of what kind"),
        ({"tasks": ("agreement",)}, "needs --teacher"),
        ({"teacher_weights": "w.pt"}, "needs --teacher"),
        ({"probe_l2": 0.0}, "must be positive"),
        ({"batch_size": 0}, "must be at least 1"),
        ({"max_bad_ratio": 2.0}, "between 0 and 1"),
        ({"weights": ("y=w.pt",)}, "no model is called 'y'"),
    ],
)
def test_flags_that_contradict_each_other_are_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    values = {"models": ("x",), "sets": ("tar:x",), **change}
    with pytest.raises(InputError, match=message):
        config_of(tmp_path / "out", **values)  # type: ignore[arg-type]


def test_flags_parse_from_the_command_line(tmp_path: Path) -> None:
    argv = "--out o --models a b=c --sets tar:x pairs:y --tasks zero-shot retrieval --probe-features projected"
    config = recipes.parse(Config, argv.split(), stage="evaluate")
    assert config.models == ("a", "b=c")
    assert config.tasks == ("zero-shot", "retrieval")
    assert config.probe.probe_features == "projected"


def test_a_published_set_that_is_missing_is_a_row_and_its_group_a_counted_average(
    tmp_path: Path, models: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("pets", "dtd"):
        made_sets.write_webdataset(tmp_path / "data" / f"wds_{name}", ["cat", "dog"], ["a {c}."], count=4)
    config = config_of(tmp_path / "out", models[:1], ("paper",), data_root=str(tmp_path / "data"), tasks=("zero-shot",))
    result = main(config)
    headline = {row["set"]: row for row in result["rows"] if row["headline"]}
    assert len(headline) == 14
    assert {name for name, row in headline.items() if row["value"] is not None} == {"pets", "dtd"}
    assert headline["pets"]["metric"] == "mean_per_class"
    assert "--list" in headline["food101"]["reason"]
    assert headline["pets"]["details"]["layout"] == "webdataset"
    table = (tmp_path / "out" / "table.md").read_text()
    assert "mean of 2 of 14 papers' sets" in table
    assert "| food101 | - | 84.0 |" in table
    record = json.loads((tmp_path / "out" / "clip_benchmark" / "small_pets_zero-shot.json").read_text())
    assert record["metrics"]["mean_per_class_recall"] == headline["pets"]["value"]


def test_a_second_evaluation_reads_the_features_of_the_first(
    tmp_path: Path, models: tuple[str, str], sets: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = str(tmp_path / "cache")
    first = main(config_of(tmp_path / "a", models[:1], sets, cache=cache))
    monkeypatch.setattr("distilclip.evaluate.embedders.encode_images", None)  # a forward would fail
    monkeypatch.setattr("distilclip.evaluate.embedders.encode_texts", None)
    again = main(config_of(tmp_path / "b", (f"renamed={models[0]}",), sets, cache=cache))
    assert [row["value"] for row in again["rows"]] == [row["value"] for row in first["rows"]]
    assert not (tmp_path / "a" / "cache").exists()


def test_the_list_needs_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = recipes.parse(Config, ["--list", "--data-root", str(tmp_path)], stage="evaluate")
    assert main(config) == {}
    printed = capsys.readouterr().out
    assert "flowers102" in printed
    assert f"not found; looked for {tmp_path}/food-101/meta" in printed
    assert list(tmp_path.iterdir()) == []


def test_a_missing_set_stops_before_any_model_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"{tmp_path}/absent is not a folder"):
        main(config_of(tmp_path / "out", ("no/such/model",), (f"folder:{tmp_path}/absent",)))


def test_result_is_plain_json_without_times(tmp_path: Path, models: tuple[str, str], sets: tuple[str, str]) -> None:
    main(config_of(tmp_path / "out", models[:1], sets[:1], tasks=("zero-shot",)))
    text = (tmp_path / "out" / "result.json").read_text()
    assert json.loads(text)["stage"] == "evaluate"
    assert "seconds" not in text
    assert "NaN" not in text


# What lies under an unchanged path


@pytest.fixture
def own(tmp_path: Path, models: tuple[str, str], sets: tuple[str, str]) -> tuple[Config, Path]:
    """A config of copies that a test may change."""
    for name, source in (("model", models[0]), ("shape", sets[0].removeprefix("tar:"))):
        shutil.copytree(source, tmp_path / name)
    (tmp_path / "templates.txt").write_text("the {}\n")
    options = {"tasks": ("zero-shot",), "templates": str(tmp_path / "templates.txt")}
    return config_of(tmp_path / "out", (str(tmp_path / "model"),), (f"tar:{tmp_path}/shape",), **options), tmp_path


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("what", ["templates", "set", "model"])
def test_another_content_under_the_same_path_is_refused(
    own: tuple[Config, Path], tiny_clip_json: str, what: str, finished: bool
) -> None:
    config, folder = own
    main(config)
    if not finished:
        (folder / "out" / "result.json").unlink()
    main(config)
    if what == "templates":
        (folder / "templates.txt").write_text("one {}\n")
    elif what == "set":
        (folder / "shape" / "classnames.txt").write_text("circle\nsquare\nmoon\n")
    else:
        create_clip(tiny_clip_json, seed=9).save(str(folder / "model"))
    message = (
        rf"\(model on shape\) was made from other inputs .*since then, {what} came, went or changed. Choose another"
    )
    with pytest.raises(InputError, match=message):
        main(config)


def test_another_teacher_under_its_name_is_another_teacher(
    tmp_path: Path, models: tuple[str, str], sets: tuple[str, str], tiny_clip_json: str
) -> None:
    shutil.copytree(models[1], tmp_path / "large")
    config = config_of(
        tmp_path / "out", (models[0], str(tmp_path / "large")), sets[1:], tasks=("agreement",), teacher="large"
    )
    main(config)
    create_clip(tiny_clip_json, seed=9).save(str(tmp_path / "large"))
    with pytest.raises(
        InputError, match=r"\(small on pairs\) was made from other inputs .*, teacher's model came, went or changed"
    ):
        main(config)


def test_what_failed_before_it_was_measured_may_be_mended(own: tuple[Config, Path]) -> None:
    config, folder = own
    (folder / "shape" / "classnames.txt").write_text("circle\nsquare\nstar\nmoon\n")
    with pytest.raises(InputError, match="moon"):
        main(config)
    (folder / "shape" / "classnames.txt").write_text("circle\nsquare\nstar\n")
    assert main(config)["rows"]


# Models that differ in more than weights


def test_equal_weights_with_another_activation_are_compared(tmp_path: Path, sets: tuple[str, str]) -> None:
    for name, quick in (("plain", False), ("quick", True)):
        create_clip(json.dumps({**TINY_CLIP, "quick_gelu": quick}), seed=3).save(str(tmp_path / name))
    paths = (str(tmp_path / "plain"), str(tmp_path / "quick"))
    result = main(config_of(tmp_path / "out", paths, sets[:1], tasks=("agreement",), teacher="plain"))
    found = {(row["model"], row["metric"]): row["value"] for row in result["rows"]}
    assert {model for model, _ in found} == {"quick"}
    assert found["quick", "cosine"] < 1 - 1e-6


def test_features_of_a_tower_without_a_layer_before_the_projection_are_called_what_they_are(
    tmp_path: Path, models: tuple[str, str], sets: tuple[str, str]
) -> None:
    vision = {"layers": [1, 1, 1, 1], "width": 8, "image_size": 32}
    create_clip(json.dumps({**TINY_CLIP, "vision_cfg": vision}), seed=3).save(str(tmp_path / "resnet"))
    paths = (models[0], str(tmp_path / "resnet"))
    result = main(config_of(tmp_path / "out", paths, sets[:1], tasks=("linear-probe",), probe_l2=1.0))
    features = {row["model"]: row["details"]["features"] for row in result["rows"]}
    assert features == {"small": "backbone", "resnet": "embedding"}
    table = (tmp_path / "out" / "table.md").read_text()
    assert "Features before the projection." in table
    assert "resnet: embeddings before they are normalised" in table


def test_brackets_are_printed_as_they_are(
    tmp_path: Path, models: tuple[str, str], sets: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    main(config_of(tmp_path / "out", models[:1], sets[1:], tasks=("retrieval",), caption_prefix="[/x] [b]:cat: "))
    assert "[/x] [b]:cat: " in capsys.readouterr().out.replace("\n", " ")
