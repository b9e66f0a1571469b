from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from distilclip.plan.architecture_costs import KNOWN
from distilclip.report.comparison import compare
from distilclip.report.efficiency import cost_charts, model_costs
from distilclip.report.figures import Dot, score_against_cost
from distilclip.report.load import Series, TrainRun, load
from distilclip.report.roles import models
from tests.report.made_run import write_evaluate, write_run, write_train


def training(**logged: Series) -> TrainRun:
    return TrainRun(
        name="a", path="a", weights={}, words={}, num_parameters=1, num_samples_seen=4000, digest="d", logged=logged
    )


def test_the_time_of_a_training_is_that_of_its_lines() -> None:
    # 40 steps of 100 pairs: 10 at 50 pairs a second, 30 at 200.
    speed = Series(step=np.array([10, 40]), value=np.array([50.0, 200.0]))
    assert training(samples_per_second=speed).seconds == pytest.approx(10 * 100 / 50 + 30 * 100 / 200)
    assert training().seconds is None


def test_the_arithmetic_of_a_listed_architecture_by_hand(tmp_path: Path) -> None:
    write_evaluate(tmp_path / "evaluate")
    write_train(tmp_path / "plain", {"task": 1.0}, store=None, height=3.0)
    config = tmp_path / "plain/config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "student": "ViT-B-32"}))
    results = load([str(tmp_path)])
    compared = models(results)
    table = compare(results.scores, compared)
    found = {cost.model.name: cost for cost in model_costs(table, compared)}
    pair = sum(KNOWN["ViT-B-32"][:2])
    assert (found["plain"].flops_of_pair, found["plain"].flops) == (pair, 3 * pair * 153_600)
    assert (found["teacher"].flops_of_pair, found["teacher"].seconds) == (None, None)
    assert found["plain"].cell == table.rows[[row.model.name for row in table.rows].index("plain")].cells[0]
    assert cost_charts(list(found.values()), table) == [], "one model has a time, and all have as many parameters"


def test_scores_are_drawn_against_costs_that_differ(tmp_path: Path) -> None:
    results = load([str(write_run(tmp_path))])
    compared = models(results)
    table = compare(results.scores, compared)
    (chart,) = cost_charts(model_costs(table, compared), table)
    assert chart.name == "score-against-seconds"
    assert "a dot each for teacher, plain, clip-kd, clip-cid" in chart.label
    costs = model_costs(compare([], compared), compared)
    assert [cost.cell for cost in costs] == [None] * 4, "trainings that nothing evaluated have costs, too"


@pytest.mark.parametrize("costs", [(1e6, 1.1e6), (3.0, 3e9), (0.5, 5.0), (1e15, 4e17)])
def test_the_axis_of_costs_has_round_numbers(costs: tuple[float, float]) -> None:
    dots = [Dot(label=str(cost), series=at, cost=cost, score=0.5) for at, cost in enumerate(costs)]
    svg = score_against_cost(dots, measure="top-1", cost="FLOPs")
    assert svg == score_against_cost(dots, measure="top-1", cost="FLOPs")
    assert 2 <= svg.count('<g id="xtick_') <= 6
