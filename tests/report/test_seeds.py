"""Seeds of one recipe stand together: mean and spread, and a headline that says how many there were."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distilclip.report.comparison import Table, compare
from distilclip.report.headline import story
from distilclip.report.load import load
from distilclip.report.roles import models
from distilclip.sets.score import Score
from tests.report.made_run import digest, write_stage, write_train

METHODS: dict[str, dict[str, float]] = {"clip": {"task": 1.0}, "clip-kd": {"task": 1.0, "relational": 1.0}}
LEVELS = {("clip", 0): 0.40, ("clip", 1): 0.46, ("clip-kd", 0): 0.52, ("clip-kd", 1): 0.50}


def write_seeds(folder: Path, seeds: int, *, hits: bool = False, threshold_of: dict[int, float] | None = None) -> None:
    """Two recipes in several seeds, each seed with a store and groups of its own, and their scores on two sets."""
    rows: list[dict[str, Any]] = []
    for seed in range(seeds):
        run = folder / f"seed{seed}"
        write_stage(run / "embed", "embed", None, data=["pairs.tar"], seed=seed)
        threshold = (threshold_of or {}).get(seed, 0.1)
        write_stage(run / "balance", "balance", None, store=str(run / "embed"), threshold=threshold)
        for name, weights in METHODS.items():
            train = run / "train" / f"{name}-{seed}"
            write_train(train, weights, store=str(run / "embed"), height=3.0)
            config = json.loads((train / "config.json").read_text())
            config |= {"seed": seed, "groups": str(run / "balance"), "objective": name}
            (train / "config.json").write_text(json.dumps(config))
            for place, dataset in enumerate(("shape", "sketch")):
                rows.append(row(f"{name}-{seed}", dataset, LEVELS[name, seed] - 0.1 * place, hits=hits))
    write_stage(folder / "evaluate", "evaluate", {"rows": rows, "models": []})


def row(model: str, dataset: str, value: float, *, hits: bool) -> dict[str, Any]:
    score = Score(
        model=model,
        model_digest=digest(model),
        set=dataset,
        task="zero-shot",
        metric="top1",
        value=value,
        headline=True,
        low=value - 0.04,
        high=value + 0.04,
        num_test=500,
    )
    return (score.with_hits(np.arange(500) < 500 * value) if hits else score).row()


def table_of(folder: Path) -> tuple[Table, str]:
    results = load([str(folder)])
    table = compare(results.scores, models(results))
    return table, " ".join(story(table, results))


def test_one_seed_is_said_and_compared_on_the_same_pictures(tmp_path: Path) -> None:
    write_seeds(tmp_path, 1, hits=True)
    table, text = table_of(tmp_path)
    assert [(r.model.name, r.model.role, r.num_seeds) for r in table.rows] == [
        ("clip-0", "baseline", 1),
        ("clip-kd-0", "student", 1),
    ]
    assert (
        "clip-kd-0 scores highest of 2 students: 47.0 % mean zero-shot of 2 sets (95 % interval 44.2 to 49.8)." in text
    )
    assert "That is +12.0 points against clip-0, which had no teacher (+9.9 to +14.0 on the same 1,000 test" in text
    assert "pictures; paired test: p < 0.001): more than the choice of test pictures explains." in text
    assert text.endswith("Each student was trained with one seed only: another seed can change the order.")


def test_a_difference_within_chance_is_called_so(tmp_path: Path) -> None:
    write_seeds(tmp_path, 1)
    result = json.loads((tmp_path / "evaluate" / "result.json").read_text())
    for entry in result["rows"]:
        if entry["model"] == "clip-kd-0":
            entry.update({name: entry[name] - 0.1 for name in ("value", "low", "high")})
    (tmp_path / "evaluate" / "result.json").write_text(json.dumps(result))
    assert (
        "from the intervals of the two scores): no more than the choice of test pictures can explain."
        in table_of(tmp_path)[1]
    )


def test_seeds_of_a_recipe_are_one_row_with_mean_and_spread(tmp_path: Path) -> None:
    write_seeds(tmp_path, 2)
    table, text = table_of(tmp_path)
    assert [(r.model.name, r.model.role, r.num_seeds) for r in table.rows] == [
        ("clip", "baseline", 2),
        ("clip-kd", "student", 2),
    ]
    cell = table.rows[1].cells[0]
    assert cell.value == pytest.approx((0.47 + 0.45) / 2)
    assert cell.spread == pytest.approx(statistics.stdev([0.47, 0.45]))
    assert cell.low is None
    assert cell.gain == pytest.approx(0.46 - 0.38)
    assert "clip-kd scores highest of 2 students: 46.0 % mean zero-shot of 2 sets (mean of 2 seeds, standard" in text
    assert "over the seeds; test: p = " in text
    assert "one seed" not in text


def test_a_recipe_with_another_threshold_is_no_seed_of_it(tmp_path: Path) -> None:
    write_seeds(tmp_path, 2, threshold_of={1: 0.2})
    table, text = table_of(tmp_path)
    assert [r.model.name for r in table.rows] == ["clip-0", "clip-kd-0", "clip-1", "clip-kd-1"]
    assert [r.num_seeds for r in table.rows] == [1, 1, 1, 1]
    assert [r.model.role for r in table.rows] == ["baseline", "student", "student", "student"]
    assert "one seed only" in text


def test_seeds_share_a_colour(tmp_path: Path) -> None:
    write_seeds(tmp_path, 2)
    found = {model.name: model.series for model in models(load([str(tmp_path)]))}
    assert found == {"clip-0": 1, "clip-1": 1, "clip-kd-0": 2, "clip-kd-1": 2}
