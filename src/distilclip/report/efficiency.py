"""Say what each model cost and what it scores for that: parameters, time of training, arithmetic where it is known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from distilclip.plan.architecture_costs import KNOWN
from distilclip.report import figures
from distilclip.report.charts import Chart
from distilclip.report.comparison import Cell, Table
from distilclip.report.roles import Model
from distilclip.sets.score import title

PASSES = 3
"""Forward passes that a step of training costs: its own, and twice that for the gradients."""


@dataclass(frozen=True, kw_only=True)
class ModelCost:
    """What a model, or the first seed of a recipe, cost. `cell` is its score in the first column of the comparison.

    `flops_of_pair` is the arithmetic of one forward pass of both towers, `flops` that of the whole training without its
    teacher; None for an architecture that is not listed.
    """

    model: Model
    cell: Cell | None
    num_parameters: int | None
    seconds: float | None
    flops_of_pair: float | None

    @property
    def flops(self) -> float | None:
        """Return the operations of the training."""
        if self.flops_of_pair is None or self.model.training is None:
            return None
        return PASSES * self.flops_of_pair * self.model.training.num_samples_seen


def model_costs(table: Table, models: Sequence[Model]) -> list[ModelCost]:
    """Return the cost of every row of the comparison; where nothing was evaluated, of every trained model."""
    shown: list[tuple[Model, Cell | None]] = [(row.model, row.cells[0]) for row in table.rows if row.cells]
    shown = shown or [(model, None) for model in models if model.training is not None]
    found = []
    for model, cell in shown:
        training = model.training
        known = KNOWN.get(training.architecture) if training is not None else None
        found.append(
            ModelCost(
                model=model,
                cell=cell,
                num_parameters=model.num_parameters or (training.num_parameters if training is not None else None),
                seconds=training.seconds if training is not None else None,
                flops_of_pair=float(known[0] + known[1]) if known is not None else None,
            )
        )
    return found


def cost_charts(costs: Sequence[ModelCost], table: Table) -> list[Chart]:
    """Draw the first column's scores against each cost that two models or more differ in."""
    if not table.columns:
        return []
    column = table.columns[0]
    measure = f"{title(column.task)}, {column.set}"
    against: dict[str, Callable[[ModelCost], float | None]] = {
        "parameters": lambda cost: cost.num_parameters,
        "seconds of training": lambda cost: cost.seconds,
        "FLOPs of the training": lambda cost: cost.flops,
    }
    charts = []
    for name, cost_of in against.items():
        dots = [
            figures.Dot(
                label=cost.model.name,
                series=cost.model.series,
                cost=float(value),
                score=cost.cell.value,
                reach=reach,
            )
            for cost in costs
            if (value := cost_of(cost)) and cost.cell is not None and cost.cell.value is not None
            for reach in [_reach(cost.cell)]
        ]
        if len({dot.cost for dot in dots}) > 1:
            charts.append(
                Chart(
                    name=f"score-against-{name.split()[0].lower()}",
                    svg=figures.score_against_cost(dots, measure=measure, cost=name),
                    label=f"{measure} against {name}, a dot each for {', '.join(dot.label for dot in dots)}",
                )
            )
    return charts


def _reach(cell: Cell) -> tuple[float, float] | None:
    return (cell.low, cell.high) if cell.low is not None and cell.high is not None else None
