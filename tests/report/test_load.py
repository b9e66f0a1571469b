from __future__ import annotations

import json
from pathlib import Path

import pytest

from distilclip.errors import InputError
from distilclip.report.load import load
from tests.report.made_run import write_evaluate, write_run, write_stage, write_train


def test_every_stage_folder_is_found_once_however_often_it_is_named(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    results = load([str(tmp_path / "run"), str(tmp_path / "run" / "train")])
    stages = [folder.stage for folder in results.folders]
    assert sorted(stages) == ["balance", "cluster", "embed", "evaluate", *["train"] * 4]


def test_paths_are_shown_as_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_evaluate(tmp_path / "run" / "evaluate")
    monkeypatch.chdir(tmp_path)
    assert [folder.path for folder in load(["run"]).folders] == ["run/evaluate"]


def test_a_url_is_searched_like_a_path(tmp_path: Path) -> None:
    write_run(tmp_path)
    local, remote = load([str(tmp_path)]), load([f"file://{tmp_path}"])
    assert [folder.stage for folder in local.folders] == [folder.stage for folder in remote.folders]


def test_pages_and_summaries_of_runs_are_no_results(tmp_path: Path) -> None:
    write_stage(tmp_path / "report", "report", {"page": "index.html"})
    write_stage(tmp_path, "run", {"steps": []})
    write_evaluate(tmp_path / "evaluate")
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "config.json").write_text('{"model_cfg": {}}')
    assert [folder.stage for folder in load([str(tmp_path)]).folders] == ["evaluate"]


def test_a_folder_without_result_is_unfinished_and_gives_no_numbers(tmp_path: Path) -> None:
    write_stage(tmp_path / "train", "train", None)
    write_evaluate(tmp_path / "evaluate")
    results = load([str(tmp_path)])
    assert [folder.stage for folder in results.unfinished] == ["train"]
    assert results.trainings == []


def test_nothing_to_report_names_the_folder_and_the_remedy(tmp_path: Path) -> None:
    write_stage(tmp_path / "train", "train", None)
    with pytest.raises(InputError, match=rf"No result.json under {tmp_path}.*distilclip run"):
        load([str(tmp_path)])
    with pytest.raises(InputError, match=r"nowhere.*does not exist"):
        load([str(tmp_path / "nowhere")])


def test_a_damaged_result_names_its_file(tmp_path: Path) -> None:
    write_stage(tmp_path, "train", None)
    (tmp_path / "result.json").write_text('{"stage": "train", ')
    with pytest.raises(InputError, match=r"result.json is not valid JSON"):
        load([str(tmp_path)])


def test_the_log_is_read_up_to_a_line_cut_by_a_kill(tmp_path: Path) -> None:
    write_train(tmp_path, {"task": 1.0}, store=None, height=3.0)
    log = tmp_path / "metrics.jsonl"
    lines = [{"step": 10, "loss": 3.0, "samples_per_second": 5.0}, {"step": 20, "loss": float("nan")}]
    more = {"step": 30, "loss": 2, "samples_per_second": 90.0, "note": "x"}
    log.write_text("".join(json.dumps(line) + "\n" for line in (*lines, more)) + '{"step": 40, "lo')
    (training,) = load([str(tmp_path)]).trainings
    assert training.logged["loss"].step.tolist() == [10, 30], "no value that is not finite"
    assert training.num_steps == 30
    assert training.samples_per_second == 90.0, "the first line holds the warm-up"
    assert "note" not in training.logged


def test_weights_leave_out_constants_and_unused_terms(tmp_path: Path) -> None:
    write_train(tmp_path / "a", {"task": 1.0, "cluster": 0.0}, store=None, height=3.0)
    write_train(tmp_path / "b", {"task": 1.0, "feature": 2000.0}, store=None, height=3.0)
    plain, distilled = load([str(tmp_path)]).trainings
    assert (plain.weights, plain.distilled) == ({"task": 1.0}, False)
    assert (distilled.weights, distilled.distilled) == ({"task": 1.0, "feature": 2000.0}, True)


def test_models_of_one_name_and_different_weights_stay_apart(tmp_path: Path) -> None:
    row = {"model": "student", "set": "shape", "task": "zero-shot", "metric": "top1"}
    for seed, digest in enumerate(("aaaaaaaaaa", "bbbbbbbbbb", "bbbbbbbbbb")):
        rows = [{**row, "model_digest": digest, "value": 0.1 * seed}]
        write_stage(tmp_path / f"evaluate-{seed}", "evaluate", {"rows": rows, "models": []})
    scores = load([str(tmp_path)]).scores
    assert {s.model: s.value for s in scores} == {"student aaaaaaa": 0.0, "student bbbbbbb": 0.2}


def test_terms_are_named_in_the_words_of_their_training_and_by_the_log_of_an_older_one(tmp_path: Path) -> None:
    write_train(tmp_path, {"task": 1.0, "toy": 5.0, "feature": 0.0}, store=None, height=3.0)
    path = tmp_path / "result.json"
    older = json.loads(path.read_text())
    del older["objective"]["feature"]
    path.write_text(json.dumps(older))
    (training,) = load([str(tmp_path)]).trainings
    assert (training.words, training.terms) == ({"task": "", "toy": ""}, ["task", "toy"])
    path.write_text(json.dumps({**older, "terms": {"task": "own loss", "toy": "a toy", "feature": "FD"}}))
    (training,) = load([str(tmp_path)]).trainings
    assert training.words == {"task": "own loss", "toy": "a toy", "feature": "FD"}
    assert training.weights == {"task": 1.0, "toy": 5.0}
