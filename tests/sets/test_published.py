from __future__ import annotations

import statistics
from typing import get_args

import pytest

from distilclip.sets.catalogue import CATALOGUE, GROUPS
from distilclip.sets.published import Published, published_notes, published_rows
from distilclip.sets.score import TASKS

# Read from the papers by hand, one or more of each table: row, task, set, number as printed.
READ = [
    ("CLIP ViT-B/32, WIT400M, CLIP paper", "zero-shot", "sun397", "63.2"),
    ("CLIP ViT-B/32, WIT400M, measured again", "zero-shot", "eurosat", "43.9"),
    ("OpenCLIP ViT-B/32, LAION400M, measured again", "zero-shot", "cars", "78.1"),
    ("OpenCLIP ViT-B/16, LAION225M", "zero-shot", "aircraft", "16.3"),
    ("CLIP-CID ViT-B/32, LAION225M", "zero-shot", "imagenet", "62.7"),
    ("CLIP-CID ViT-B/16, LAION225M", "zero-shot", "imagenet", "65.8"),
    ("CLIP-CID ViT-B/32, LAION225M", "linear-probe", "aircraft", "65.1"),
    ("CLIP ViT-B/16, WIT400M, measured again", "linear-probe", "flowers102", "96.5"),
    ("CLIP-CID ViT-B/16, LAION225M", "linear-probe", "birdsnap", "77.2"),
    ("CLIP-CID ViT-B/32, LAION225M", "zero-shot", "imagenet-sketch", "47.1"),
    ("CLIP ViT-B/16, WIT400M, measured again", "zero-shot", "imagenet-a", "49.6"),
    ("OpenCLIP ViT-B/16, LAION225M", "zero-shot", "objectnet", "55.7"),
    ("ViT-T/16 + FD, taught by ViT-B/16", "zero-shot", "imagenet", "34.23"),
    ("ViT-T/16, CLIP-KD by ViT-B/16", "zero-shot", "imagenet", "34.90"),
    ("ResNet-101 alone", "zero-shot", "imagenet", "36.76"),
    ("Swin-T, CLIP-KD by ResNet-101", "zero-shot", "imagenet", "39.51"),
    ("ViT-L/14, LAION-400M", "zero-shot", "imagenet", "72.8"),
    ("ViT-B/16, CLIP-KD by ViT-L/14 of LAION-400M", "zero-shot", "imagenet", "57.5"),
    ("ResNet-50, CLIP-KD by ViT-B/16 of LAION-400M", "zero-shot", "imagenet", "55.4"),
]
EVERYTHING = published_rows(["clip-cid", "clip-kd"])


@pytest.mark.parametrize(("model", "task", "name", "number"), READ)
def test_numbers_are_the_papers(model: str, task: str, name: str, number: str) -> None:
    (row,) = (row for row in EVERYTHING if row.name == f"{model} (published)")
    assert row.text(task, name) == number


def test_every_printed_mean_is_that_of_the_copied_numbers() -> None:
    """A slip in one of fourteen digits would move it; the papers round from more digits than they print."""
    checked = 0
    for row in EVERYTHING:
        for (task, sets), mean in row.means.items():
            assert abs(statistics.fmean(float(row.text(task, name)) for name in sets) - float(mean)) < 0.1
            checked += 1
    assert checked == 10 + 10 + 8  # rows of Tab. 1, 2 and 3


def test_rows_are_of_known_sets_and_tasks_and_marked() -> None:
    assert EVERYTHING
    for row in EVERYTHING:
        assert row.name.endswith(" (published)")
        assert {task for task, _ in row.percent} <= set(TASKS)
        assert {name for _, name in row.percent} <= set(CATALOGUE)
        assert {sets for _, sets in row.means} <= {frozenset(GROUPS["paper"]), frozenset(GROUPS["robustness"])}


@pytest.mark.parametrize("group", get_args(Published))
def test_every_group_has_rows_and_a_paper_is_all_of_its_groups(group: str) -> None:
    names = [row.name for row in published_rows([group])]
    assert len(names) == len(set(names)) >= 5
    parts = [name for name in get_args(Published) if name.startswith(f"{group}-")]
    if parts:
        assert {row.name for row in published_rows(parts)} == set(names)


def test_a_row_of_two_tables_is_one_and_a_mean_is_over_just_the_papers_sets() -> None:
    (row,) = (row for row in published_rows(["clip-cid-vit-b-32"]) if row.name.startswith("CLIP-CID"))
    assert row.text("zero-shot", "", GROUPS["paper"]) == "69.4"
    assert row.text("zero-shot", "", GROUPS["robustness"]) == "49.8"
    assert row.text("zero-shot", "", GROUPS["paper"][:13]) == ""
    assert row.text("zero-shot", "coco") == row.text("retrieval", "coco") == ""


def test_a_note_names_the_paper_and_the_table_of_what_is_shown() -> None:
    rows = published_rows(["clip-cid-vit-b-32"])
    (note,) = published_notes(rows, "zero-shot", ["objectnet", "mine"])
    assert note.startswith(
        "(published): copied from CLIP-CID (Yang et al., arXiv 2408.09441), Tab. 3; not measured here"
    )
    assert published_notes(rows, "retrieval", ["coco"]) == []
