"""List the models that are compared, and say who is teacher, baseline and student."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from distilclip.report.load import Results, TrainRun
from distilclip.report.seeds import recipe_digests

Role = Literal["teacher", "baseline", "student", "other"]


@dataclass(frozen=True, kw_only=True)
class Model:
    """One compared model. `series` is its place in the palette, the same in every table and figure.

    Models of one `recipe` differ in their seeds only, and share a place in the palette.
    """

    name: str
    role: Role
    series: int
    num_parameters: int | None = None
    training: TrainRun | None = None
    recipe: str = ""


def models(results: Results) -> list[Model]:
    """Return every model that was scored or trained: the teacher first, then baseline, students and others.

    Scores and trainings are joined by the digest of the weights. A teacher is a model that an embed, train or evaluate
    folder names as its teacher. The baseline is the first student that was trained with the task term alone, in all
    its seeds. Any other model without a train folder is `other`.
    """
    teachers, recipes = _teachers(results), recipe_digests(results.folders)
    by_digest = {training.digest: training for training in reversed(results.trainings)}
    digests = {score.model: score.model_digest for score in results.scores}
    named = {name: by_digest.get(digest) for name, digest in digests.items()}
    for unscored in results.trainings:
        if unscored.digest not in digests.values():
            name = unscored.path if unscored.name in named else unscored.name
            named[name], digests[name] = unscored, unscored.digest

    roles: dict[str, Role] = {}
    recipe = {n: f"{recipes[t.path]} {t.weights}" if t is not None else "" for n, t in named.items()}
    for name, training in named.items():
        path = training.path.rstrip("/") if training is not None else None
        if {name, digests[name]} & teachers or (path and any(f"{t}/".startswith(f"{path}/") for t in teachers)):
            roles[name] = "teacher"
        elif training is None:
            roles[name] = "other"
        elif not training.distilled and {recipe[n] for n, role in roles.items() if role == "baseline"} <= {
            recipe[name]
        }:
            roles[name] = "baseline"
        else:
            roles[name] = "student"
    order: list[Role] = ["teacher", "baseline", "student", "other"]
    ordered = sorted(named, key=lambda name: order.index(roles[name]))
    num_teachers = sum(role == "teacher" for role in roles.values())
    places = {key: place for place, key in enumerate(dict.fromkeys(recipe[n] or n for n in ordered[num_teachers:]))}
    return [
        Model(
            name=name,
            role=roles[name],
            series=0 if roles[name] == "teacher" else 1 + places[recipe[name] or name],
            num_parameters=results.num_parameters.get(digests[name]),
            training=named[name],
            recipe=recipe[name],
        )
        for name in ordered
    ]


def _teachers(results: Results) -> set[str]:
    """Return every name, path and digest by which a stage names its teacher."""
    found = [folder.config.get("teacher") for folder in results.finished("train")]
    for folder in results.finished("evaluate"):
        found += (folder.config.get("teacher") or "").split("=", 1)  # MODEL, or NAME=MODEL
    for folder in (*results.finished("embed"), *results.finished("import")):
        teacher = folder.result["teacher"]
        found += [folder.config.get("model"), teacher["name"], teacher["digest"]]
    return {value.rstrip("/") for value in found if value}
