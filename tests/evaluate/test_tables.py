from __future__ import annotations

import csv
import io
import json
from typing import Any

import pytest

from distilclip.evaluate.records import clip_benchmark_records, write_csv
from distilclip.evaluate.tables import build_tables
from distilclip.sets.catalogue import GROUPS
from distilclip.sets.published import published_rows
from distilclip.sets.references import LINEAR_PROBE, REFERENCE_MODEL, ZERO_SHOT
from distilclip.sets.score import Score


def row(set_name: str, value: float | None, *, model: str = "tiny", task: Any = "zero-shot", **more: Any) -> Score:
    values = {"metric": "top1", "headline": True, "model_digest": "0123456789abcdef", **more}
    return Score(model=model, set=set_name, task=task, value=value, **values)


def test_a_score_is_read_as_it_was_written_and_an_older_row_too() -> None:
    score = row("pets", 0.25, low=0.2, high=0.3, num_test=8, details={"features": "backbone"})
    written = json.loads(json.dumps(score.row()))
    assert list(written)[:6] == ["model", "model_digest", "set", "task", "metric", "value"]
    assert Score.from_row(written) == score
    old = {
        "model": "a",
        "model_digest": "b",
        "set": "c",
        "task": "knn-probe",
        "metric": "top1",
        "value": 0.5,
        "shots": 3,
    }
    assert Score.from_row(old) == row("c", 0.5, model="a", model_digest="b", task="knn-probe")


def test_a_table_shows_headlines_in_percent_and_says_what_is_missing() -> None:
    rows = [
        row("mine", 0.4567, num_unreadable=2),
        row("mine", 0.9, metric="top5", headline=False),
        row("food|2", None, task="linear-probe", reason="the set has no training images"),
        row("food|2", None, task="linear-probe", reason="the set has no training images", model="other"),
    ]
    zero_shot, probe = build_tables(rows)
    assert zero_shot.columns == ["model", "mine"]
    assert zero_shot.rows == [["tiny", "45.7"]]
    assert zero_shot.notes == ["mine: 2 images could not be read and are left out."]
    assert probe.markdown() == (
        "## Linear probe\n\n| model | food\\|2 |\n| --- | ---: |\n| tiny | - |\n| other | - |\n\n"
        "food|2: the set has no training images.\n"
    )


def test_intervals_stand_behind_scores_and_means_and_a_note_says_what_they_are() -> None:
    rows = [row("mine", 0.2, low=0.15, high=0.27), row("yours", 0.4, low=0.35, high=0.45)]
    rows += [row("mine", 0.3, model="bare"), row("yours", 0.5, model="bare", low=0.4, high=0.6)]
    (table,) = build_tables(rows)
    # Of the mean: sqrt(5^2 + 5^2) / 2 below and sqrt(7^2 + 5^2) / 2 above.
    assert table.rows == [["tiny", "30.0 ±3.9", "20.0 ±6.0", "40.0 ±5.0"], ["bare", "40.0", "30.0", "50.0 ±10.0"]]
    assert table.notes == [
        "± is half the width of the 95 % interval over the test images; another training seed is not in it."
    ]


def test_an_average_says_over_how_many_sets_it_is() -> None:
    rows = [row("food101", 0.8), row("dtd", 0.4), row("pets", None, reason="not found")]
    (table,) = build_tables(rows)
    assert table.columns == ["model", "mean of 2 of 14 papers' sets", "food101", "dtd", "pets"]
    assert table.rows[0] == ["tiny", "60.0", "80.0", "40.0", "-"]
    assert table.rows[1] == [REFERENCE_MODEL, "64.2", "84.0", "44.4", "87.0"]
    assert table.notes == ["pets: not found.", f"{REFERENCE_MODEL}: its weights run again."]


def test_a_model_that_lacks_a_set_has_no_average() -> None:
    rows = [row("food101", 0.8), row("dtd", 0.4), row("food101", 0.9, model="other")]
    (table,) = build_tables(rows)
    assert [line[:2] for line in table.rows[:2]] == [["tiny", "60.0"], ["other", "-"]]


def test_all_fourteen_have_the_papers_average_and_stand_in_rows() -> None:
    rows = [row(name, 0.5) for name in (*GROUPS["paper"], *GROUPS["robustness"])]
    (table,) = build_tables(rows)
    assert table.columns == ["set", "tiny", REFERENCE_MODEL]
    assert [line[0] for line in table.rows[:3]] == ["mean of 14 papers' sets", "mean of 5 robustness sets", "food101"]
    assert len(table.rows) == 2 + 14 + 5
    assert table.rows[0][1] == "50.0"


def test_ones_own_sets_are_averaged_among_themselves_and_with_the_others() -> None:
    (table,) = build_tables([row("mine", 0.2), row("yours", 0.4)])
    assert table.columns == ["model", "mean of 2 sets", "mine", "yours"]
    assert table.rows == [["tiny", "30.0", "20.0", "40.0"]]


def test_an_average_of_ones_own_sets_says_that_one_is_missing() -> None:
    (table,) = build_tables([row("mine", 0.2), row("yours", 0.4), row("theirs", None, reason="no training images")])
    assert table.columns[1] == "mean of 2 of 3 sets"


PROBE = {"features": "backbone", "sweep": [[1.0, 0.5]]}
CAPTIONS = {"captions": "all", "caption_prefix": "", "num_captions": 25_010}


@pytest.mark.parametrize(
    ("task", "name", "metric", "details", "shown"),
    [
        ("zero-shot", "cifar10", "top1", {"clips_prompts": True, "own_templates": False}, "89.8"),
        ("zero-shot", "cifar10", "top1", {"clips_prompts": None}, "89.8"),
        ("zero-shot", "cifar10", "top1", {"clips_prompts": False}, None),
        ("zero-shot", "cifar10", "top1", {"clips_prompts": True, "own_templates": True}, None),
        ("linear-probe", "pets", "mean_per_class", PROBE, "90.0"),
        ("linear-probe", "pets", "mean_per_class", {**PROBE, "features": "projected"}, None),
        ("linear-probe", "pets", "mean_per_class", {**PROBE, "sweep": []}, None),
        ("retrieval", "coco", "image_to_text_r1", CAPTIONS, "50.1"),
        ("retrieval", "coco", "image_to_text_r1", {**CAPTIONS, "captions": "first"}, None),
        ("retrieval", "coco", "image_to_text_r1", {**CAPTIONS, "caption_prefix": "a photo of "}, None),
    ],
)
def test_a_reference_stands_only_beside_what_was_measured_as_it_was(
    task: str, name: str, metric: str, details: dict[str, Any], shown: str | None
) -> None:
    (table,) = build_tables([row(name, 0.3, task=task, metric=metric, details=details)])
    assert [line for line in table.rows if line[0] == REFERENCE_MODEL] == ([[REFERENCE_MODEL, shown]] if shown else [])
    assert any(REFERENCE_MODEL in note for note in table.notes) == (shown is not None)


def test_a_set_measured_otherwise_takes_the_reference_from_it_alone() -> None:
    mine = {"clips_prompts": False}
    (table,) = build_tables([row("food101", 0.8), row("dtd", 0.4, details=mine), row("dtd", None, model="other")])
    assert [line for line in table.rows if line[0] == REFERENCE_MODEL] == [[REFERENCE_MODEL, "-", "84.0", "-"]]


def test_numbers_that_only_the_paper_has_are_said() -> None:
    (table,) = build_tables([row("food101", 0.8), row("birdsnap", 0.4)])
    assert table.notes == [f"{REFERENCE_MODEL}: its weights run again; birdsnap from the CLIP paper."]
    (table,) = build_tables([row("food101", 0.8, task="linear-probe", details=PROBE)])
    assert table.notes[-1] == f"{REFERENCE_MODEL}: from the CLIP paper."


def test_prompts_that_only_the_folder_vouches_for_are_said() -> None:
    (table,) = build_tables([row("dtd", 0.4, details={"clips_prompts": None})])
    assert table.notes[0] == "dtd: class names and templates are those in its folder, which may not be CLIP's."


def test_ones_own_templates_are_said() -> None:
    (table,) = build_tables([row("dtd", 0.4, details={"clips_prompts": True, "own_templates": True})])
    assert table.notes == ["Templates of one's own (--templates), not the sets'."]


def test_references_are_those_of_the_papers_sets() -> None:
    assert set(LINEAR_PROBE) == set(GROUPS["paper"])
    assert set(ZERO_SHOT) == {*GROUPS["paper"], *GROUPS["robustness"]}


def test_sizes_and_prompts_that_differ_from_the_published_are_said() -> None:
    details = {"published_num_test": 1880, "clips_prompts": False}
    (table,) = build_tables([row("dtd", 0.5, num_test=10, details=details)])
    assert table.notes[0] == "dtd: 10 test images; the published set has 1,880."
    assert "not CLIP's prompts" in table.notes[1]


def test_what_retrieval_searched_and_what_probes_saw_is_said() -> None:
    details = {"captions": "all", "caption_prefix": "", "num_captions": 25_010, "published_num_test": 5000}
    recall = {"task": "retrieval", "metric": "image_to_text_r1"}
    (table,) = build_tables([row("coco", 0.3, num_test=4999, details=details, **recall)])
    assert table.notes == [
        "coco: 4,999 test images; the published set has 5,000.",
        "coco: 4,999 images, 25,010 captions; any own caption counts.",
        f"{REFERENCE_MODEL}: its weights run again.",
    ]
    details = {"captions": "first", "caption_prefix": "a photo of ", "num_captions": 9}
    (table,) = build_tables([row("mine", 0.3, num_test=9, details=details, **recall)])
    assert table.notes == ["mine: 9 images, 9 captions; the first caption of each image only, behind 'a photo of '."]
    (table,) = build_tables([row(name, 0.3, task="linear-probe", details={"features": "backbone"}) for name in "ab"])
    assert table.notes == ["Features before the projection."]


def test_csv_holds_every_score_as_a_fraction() -> None:
    rows = [row("pets", 0.25, low=0.2, high=0.3, num_test=8), row("pets", 0.5, metric="top5", headline=False)]
    read = list(csv.DictReader(io.StringIO(write_csv(rows))))
    assert [(r["metric"], r["value"], r["headline"]) for r in read] == [
        ("top1", "0.25", "True"),
        ("top5", "0.5", "False"),
    ]
    assert read[0]["high"] == "0.3"


def test_clip_benchmark_can_build_its_table_from_our_records(tmp_path: Any) -> None:
    rows = [
        row("pets", 0.25),
        row("pets", 0.3, metric="mean_per_class"),
        row("pets", 0.7, task="linear-probe"),
        row("coco", 0.1, metric="text_to_image_r5", task="retrieval"),
        row("coco", None, metric="image_to_text_r5", task="retrieval"),
        row("pets", 0.9, metric="cka", task="agreement"),
    ]
    records = clip_benchmark_records(rows)
    assert list(records) == ["tiny_pets_zero-shot.json", "tiny_pets_linear-probe.json", "tiny_coco_retrieval.json"]
    assert records["tiny_pets_zero-shot.json"] == {
        "dataset": "pets",
        "model": "tiny",
        "pretrained": "0123456789ab",
        "task": "zeroshot_classification",
        "metrics": {"acc1": 0.25, "mean_per_class_recall": 0.3},
        "language": "en",
    }
    assert records["tiny_pets_linear-probe.json"]["metrics"] == {"lp_acc1": 0.7}
    assert records["tiny_coco_retrieval.json"]["metrics"] == {"image_retrieval_recall@5": 0.1}
    assert json.loads(json.dumps(records)) == records


def test_models_whose_names_make_one_file_name_have_a_record_each() -> None:
    records = clip_benchmark_records([row("pets", 0.25, model="a/b"), row("pets", 0.5, model="a_b")])
    assert {name: (r["model"], r["metrics"]["acc1"]) for name, r in records.items()} == {
        "a_b_pets_zero-shot.json": ("a/b", 0.25),
        "a_b_pets_zero-shot_1.json": ("a_b", 0.5),
    }


@pytest.mark.parametrize("task", ["retrieval", "agreement"])
def test_recalls_and_agreements_are_not_averaged(task: str) -> None:
    (table,) = build_tables([row("a", 0.2, task=task), row("b", 0.4, task=task)])
    assert table.columns == ["model", "a", "b"]


def test_published_rows_follow_as_printed_and_change_nothing_of_ones_own() -> None:
    scores = [row(name, 0.5, low=0.4, high=0.6) for name in ("imagenet", "imagenet-v2")]
    (own,) = build_tables(scores)
    (table,) = build_tables(scores, published_rows(["clip-kd-terms"]))
    assert table.rows[: len(own.rows)] == own.rows
    assert table.columns == own.columns == ["model", "imagenet", "imagenet-v2"]
    assert ["ViT-T/16 + FD, taught by ViT-B/16 (published)", "34.23", "-"] in table.rows
    assert len(table.rows) == len(own.rows) + 8
    assert [note for note in table.notes if note not in own.notes] == [
        "(published): copied from CLIP-KD (Yang et al., CVPR 2024; README of github.com/winycg/CLIP-KD), Distillation "
        "with different strategies; not measured here, and in no mean, interval or comparison."
    ]


def test_a_published_mean_stands_only_where_all_its_sets_do() -> None:
    rows = published_rows(["clip-cid-vit-b-32"])
    (whole,) = build_tables([row(name, 0.5) for name in GROUPS["paper"]], rows)
    place = whole.columns.index("CLIP-CID ViT-B/32, LAION225M (published)")
    assert whole.rows[0][0] == "mean of 14 papers' sets"
    assert [line[place] for line in whole.rows[:2]] == ["69.4", "79.7"]
    (part,) = build_tables([row(name, 0.5) for name in GROUPS["paper"][:2]], rows)
    assert part.rows[-1] == ["CLIP-CID ViT-B/32, LAION225M (published)", "-", "79.7", "92.6"]


def test_rows_without_a_number_for_any_set_stay_out() -> None:
    scores = [row("mine", 0.5), row("coco", 0.5, task="retrieval", metric="image_to_text_r1", details=CAPTIONS)]
    assert build_tables(scores, published_rows(["clip-kd", "clip-cid"])) == build_tables(scores)
