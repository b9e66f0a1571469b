"""CONTRIBUTING's recipe for a new loss, followed to the letter: it is trained on, logged, reported, on any number of
processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from distilclip.errors import InputError
from distilclip.losses.features import Features, RankRows
from distilclip.losses.terms import COMPUTE, TeacherInputs, computes
from distilclip.methods import TERMS, add_term
from distilclip.stages import report, train
from tests.ranks import run_ranks
from tests.stages.made_training import Prepared, config, prepare, steady_metrics

WORDS = "toy: distance of each picture to the teacher's farthest caption"


def farthest(student: Features, teacher: Features, *, scale: Tensor, rows: RankRows | None = None) -> Tensor:
    """Step 1, the loss: local rows as queries, the rows of all ranks as keys, a mean over the rows of all ranks."""
    rows = rows or RankRows.alone(len(student))
    return (scale * student.image @ rows.all(teacher.text).T).amin(dim=1).neg().mean() * rows.weight


def register_it() -> None:
    """Steps 2 and 3: its name, as it would stand in methods.py, and its term, as in losses/terms.py."""
    add_term("farthest", WORDS, needs=("teacher", "scale"))

    @computes("farthest")
    def _farthest(given: TeacherInputs) -> Tensor:
        return farthest(given.projected, given.teacher, scale=given.heads.scale("farthest"), rows=given.rows)


def train_with_it(settings: dict[str, Any]) -> dict[str, Any]:
    """A training in a process that knows the term."""
    if "farthest" not in TERMS:
        register_it()
    return train.main(config(**settings))


@pytest.fixture
def prepared(pair_tars: Callable[..., list[str]], tiny_clip_folder: str, tmp_path: Path) -> Prepared:
    return prepare(pair_tars, tiny_clip_folder, tmp_path)


@pytest.fixture
def registered() -> Iterator[None]:
    register_it()
    yield
    del TERMS["farthest"], COMPUTE["farthest"]


def test_an_unregistered_loss_is_refused(prepared: Prepared, tiny_clip_json: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no term or constant 'farthest'"):
        config(tmp_path / "out", tiny_clip_json, store=prepared.store, terms={"farthest": 5.0})


@pytest.mark.slow
@pytest.mark.usefixtures("registered")
def test_a_registered_loss_is_trained_on_logged_reported_and_the_same_on_two_ranks(
    prepared: Prepared, tiny_clip_json: str, tmp_path: Path
) -> None:
    common: dict[str, Any] = {"architecture": tiny_clip_json, "store": prepared.store, "objective": "clip-kd"}
    outs = {name: tmp_path / "run" / name for name in ("without", "one", "two")}
    train_with_it({**common, "out": outs["without"]})
    with_it = {**common, "terms": {"farthest": 5.0}}
    result = train_with_it({**with_it, "out": outs["one"]})
    run_ranks(2, train_with_it, {**with_it, "out": outs["two"]})

    without, one, two = (steady_metrics(out) for out in outs.values())
    assert "farthest" not in without[0]
    terms = {"task": 1.0, "relational": 1.0, "feature": 2000.0, "interactive": 1.0, "farthest": 5.0}
    for line in one:
        assert line["loss"] == pytest.approx(sum(weight * line[name] for name, weight in terms.items()), rel=1e-5)
        assert line["gradient_norm_farthest"] > 0
    assert one[0]["loss"] != pytest.approx(without[0]["loss"], rel=1e-3)
    for line, other in zip(one, two, strict=True):
        assert line == pytest.approx(other, rel=1e-3, abs=1e-5)
    assert (result["objective"]["farthest"], result["terms"]["farthest"]) == (5.0, WORDS)

    page = tmp_path / "page"
    report.main(report.Config(folders=(str(tmp_path / "run"),), out=str(page)))
    assert WORDS.replace("'", "&#39;") in (page / "index.html").read_text()
    assert (page / "figures" / "training-farthest.svg").exists()


def test_the_loss_by_hand_and_in_parts() -> None:
    rows = torch.eye(4)
    features = Features(rows, rows, torch.tensor(1.0))
    assert farthest(features, Features(rows, -rows, torch.tensor(1.0)), scale=torch.tensor(3.0)).item() == 3.0
    parts = [
        farthest(
            Features(rows[here], rows[here], features.scale),
            Features(rows[here], -rows[here], features.scale),
            scale=torch.tensor(3.0),
            rows=RankRows(here=here, count=4, gather=lambda _: -rows),
        )
        for here in (slice(0, 1), slice(1, 4))
    ]
    assert torch.stack(parts).sum().item() == pytest.approx(3.0)
