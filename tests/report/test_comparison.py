from __future__ import annotations

from pathlib import Path

import pytest

from distilclip.evaluate.tables import build_tables
from distilclip.report.comparison import MAX_COLUMNS, Row, Table, compare
from distilclip.report.load import load
from distilclip.report.roles import Model, models
from distilclip.sets.score import Score, title
from tests.report.made_run import digest, write_evaluate, write_run, write_stage, write_train


def score(model: str, value: float | None, *, dataset: str = "shape", task: str = "zero-shot", **more: object) -> Score:
    fields = {"model_digest": model, "metric": "top1", "chance": 0.1, "headline": True, **more}
    return Score(model=model, set=dataset, task=task, value=value, **fields)  # type: ignore[arg-type]


def named(*names: str) -> list[Model]:
    roles = {"teacher": "teacher", "plain": "baseline", "other": "other"}
    return [Model(name=n, role=roles.get(n, "student"), series=i) for i, n in enumerate(names)]  # type: ignore[arg-type]


def cells(table: Table, name: str) -> Row:
    return next(row for row in table.rows if row.model.name == name)


def test_roles_follow_from_the_folders(tmp_path: Path) -> None:
    results = load([str(write_run(tmp_path))])
    found = {model.name: (model.role, model.series) for model in models(results)}
    assert found == {
        "teacher": ("teacher", 0),
        "plain": ("baseline", 1),
        "clip-kd": ("student", 2),
        "clip-cid": ("student", 3),
    }
    assert next(iter(found)) == "teacher", "the teacher comes first"


def test_a_scored_model_is_joined_to_its_training_by_digest_not_by_name(tmp_path: Path) -> None:
    write_train(tmp_path / "train" / "first", {"task": 1.0}, store=None, height=3.0)
    write_train(tmp_path / "train" / "second", {"task": 1.0, "feature": 1.0}, store=None, height=3.0)
    row = {"set": "shape", "task": "zero-shot", "metric": "top1", "value": 0.5}
    rows = [{**row, "model": "first", "model_digest": digest("second")}]
    write_stage(tmp_path / "evaluate", "evaluate", {"rows": rows, "models": []})
    found = {model.name: model.training for model in models(load([str(tmp_path)]))}
    first = str(tmp_path / "train" / "first")
    assert {name: training and training.name for name, training in found.items()} == {"first": "second", first: "first"}


def test_a_model_that_nobody_trained_is_no_student(tmp_path: Path) -> None:
    write_evaluate(tmp_path)
    roles = {model.name: model.role for model in models(load([str(tmp_path)]))}
    assert roles == {"teacher": "teacher", "plain": "other", "clip-kd": "other", "clip-cid": "other"}


def test_best_and_gain_by_hand() -> None:
    scores = [score("teacher", 0.9), score("plain", 0.3), score("kd", 0.45), score("cid", 0.4504), score("other", 0.99)]
    table = compare(scores, named("teacher", "plain", "kd", "cid", "other"))
    row = {r.model.name: r.cells[0] for r in table.rows}
    assert {name: cell.best for name, cell in row.items()} == {
        "teacher": False,
        "plain": False,
        "kd": True,  # equal as printed
        "cid": True,
        "other": False,
    }
    assert row["kd"].gain == pytest.approx(0.15)
    assert row["plain"].gain is None


def test_without_a_baseline_there_is_no_gain() -> None:
    table = compare([score("kd", 0.4), score("cid", 0.5)], named("kd", "cid"))
    assert all(cell.gain is None for row in table.rows for cell in row.cells)


def test_a_mean_needs_every_set() -> None:
    scores = [score("kd", 0.4), score("kd", 0.2, dataset="sketch"), score("cid", 0.5)]
    table = compare(scores, named("kd", "cid"))
    assert [column.set for column in table.columns] == ["mean of 2 sets", "shape", "sketch"]
    assert [cell.value for cell in cells(table, "kd").cells] == pytest.approx([0.3, 0.4, 0.2])
    assert [cell.value for cell in cells(table, "cid").cells] == [None, 0.5, None]
    assert table.columns[0].chance == pytest.approx(0.1)


def test_means_are_of_the_papers_groups_and_say_of_how_many() -> None:
    values = {"food101": 0.8, "dtd": 0.4, "objectnet": 0.3, "imagenet-a": 0.1}
    scores = [score("kd", value, dataset=name, task="linear-probe") for name, value in values.items()]
    table = compare([*scores, score("kd", None, dataset="pets", task="linear-probe", reason="not found")], named("kd"))
    found = {column.set: cell.value for column, cell in zip(table.columns, cells(table, "kd").cells, strict=True)}
    assert list(found)[:3] == ["mean of 2 of 14 papers' sets", "mean of 2 of 5 robustness sets", "food101"]
    assert list(found.values())[:2] == pytest.approx([0.6, 0.2])
    mixed = [score("kd", 0.5, dataset="mine"), score("kd", None, dataset="yours"), score("kd", 0.1, dataset="dtd")]
    assert [column.set for column in compare(mixed, named("kd")).columns] == ["mean of 2 of 3 sets", "mine", "dtd"]


def test_tasks_and_metrics_have_the_words_of_the_evaluations_own_table() -> None:
    shown = {"zero-shot": "Zero-shot", "linear-probe": "Linear probe"}
    table = compare([score("kd", 0.4, task=task) for task in shown], named("kd"))
    assert [name for name, _ in table.tasks] == list(shown.values())
    (ours,) = build_tables([score("kd", 0.5, task="agreement", metric="top1_agreement")])
    assert ours.columns == ["model", f"shape, {title('top1_agreement')}"]


def test_a_set_without_any_score_is_left_out() -> None:
    scores = [score("kd", 0.4), score("kd", None, dataset="sketch", reason="no training images")]
    assert [column.set for column in compare(scores, named("kd")).columns] == ["shape"]


def test_a_column_per_headline_metric() -> None:
    scores = [
        score("kd", 0.1, dataset="coco", task="retrieval", metric="text_to_image_r1"),
        score("kd", 0.4, metric="top1", headline=False),
        score("kd", 0.3, metric="mean_per_class"),
    ]
    columns = compare(scores, named("kd")).columns
    assert [column.metric for column in columns] == ["mean_per_class", "text_to_image_r1"]


def test_a_table_too_wide_is_split_by_task_without_loss() -> None:
    scores = [
        score("kd", 0.4, dataset=f"set-{number}", task=task)
        for task in ("zero-shot", "linear-probe")
        for number in range(MAX_COLUMNS)
    ]
    table = compare(scores, named("kd"))
    parts = table.split()
    assert [part.tasks for part in parts] == [[("Zero-shot", 13)], [("Linear probe", 13)]]
    assert [cell for part in parts for cell in part.rows[0].cells] == table.rows[0].cells
