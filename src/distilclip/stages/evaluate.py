"""Evaluate models on sets: zero-shot classification, linear probe, retrieval, and agreement with a teacher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable

from distilclip import files, stage_folder
from distilclip.configs.evaluate import LEARNED, Config
from distilclip.data.bad_samples import ErrorPolicy
from distilclip.devices import PRECISIONS, resolve_device
from distilclip.evaluate.cache import FeatureCache
from distilclip.evaluate.embedders import Embedder, open_embedder
from distilclip.evaluate.encode import Encoding
from distilclip.evaluate.model_specs import split_model, weights_by_name
from distilclip.evaluate.near_copies import TrainingImages, embed_set, open_store_teacher
from distilclip.evaluate.own_prompts import OwnPrompts, templates_path, word_own_sets
from distilclip.evaluate.protocol import Protocol, View
from distilclip.evaluate.provenance import part_digests, set_digest
from distilclip.evaluate.records import clip_benchmark_records, write_csv
from distilclip.evaluate.tables import TaskTable, build_tables, table_near_copies
from distilclip.evaluate.wording_notes import list_wording_warnings
from distilclip.messages import warn
from distilclip.sets.caption_sample import captions_digest
from distilclip.sets.classes import read_templates
from distilclip.sets.dataset import EvaluationSet, MissingSet
from distilclip.sets.locate import describe_catalogue
from distilclip.sets.open import load_set
from distilclip.sets.prompts import prompts_of
from distilclip.sets.published import published_rows
from distilclip.sets.score import Score
from distilclip.sets.specs import expand_groups


def main(config: Config) -> dict[str, Any]:
    """Measure what is not measured yet, a file for each model and set, write the tables and return the result."""
    if config.list:
        print(describe_catalogue(config.data_root))
        return {}
    models, sets = dict(map(split_model, config.models)), expand_groups(config.sets)
    digests = _digests(config, models, sets)
    folder = stage_folder.open_folder(config.out, stage="evaluate", config=config, inputs=config.inputs())
    parts = {
        (model, spec): folder.child("parts", f"{i:02}-{j:02}.json")
        for i, model in enumerate(models)
        for j, spec in enumerate(sets)
    }
    missing = [key for key, path in parts.items() if not files.exists(path)]
    for key, path in parts.items():
        if key not in missing:
            _check_part(path, digests[key])
    if folder.finished:
        if config.published:
            _print(_tables([Score.from_row(row) for row in folder.result()["rows"]], config))
        return folder.result()
    datasets = {
        spec: load_set(spec, data_root=config.data_root, prompts=config.words.prompts)
        for spec in _unique([spec for _, spec in missing])
    }
    own = _word_own_sets(config, datasets, folder)
    opener = _Opener(config, folder.child("cache"))
    for model in _unique([model for model, _ in missing]):
        embedder = opener.model(model)
        for spec in (spec for name, spec in missing if name == model):
            dataset = own[spec].dataset if spec in own else datasets[spec]
            scores = opener.protocol.measure(embedder, dataset, teacher=opener.teacher_view(embedder, dataset))
            described = opener.protocol.describe(dataset)
            if spec in own:
                scores = own[spec].judge(scores, embedder, opener.protocol)
                described |= own[spec].record
            part = {
                "made_from": digests[model, spec],
                "model": {"name": model, "digest": embedder.digest, **embedder.description},
                "set": {"name": dataset.name, **described},
                "rows": [score.row() for score in scores],
            }
            stage_folder.write_json(parts[model, spec], part)
    near = _count_near_copies(config, sets, opener, folder)
    return _finish(folder, [stage_folder.read_json(path) for path in parts.values()], near, config)


def _count_near_copies(
    config: Config, sets: Sequence[str], opener: _Opener, folder: stage_folder.Folder
) -> dict[str, dict[str, Any]]:
    """Return for each set, by name, which share of its test images the training data has a near copy of."""
    path, threshold = config.training_data.training_store, config.training_data.near_copy
    if path is None or threshold is None:
        return {}
    trained_on = TrainingImages.open(path)
    found: dict[str, dict[str, Any]] = {}
    for number, spec in enumerate(sets):
        part = folder.child("parts", f"near-{number:02}.json")
        digests = {
            "set": set_digest(spec, data_root=config.data_root),
            "training store": stage_folder.result_digest(path),
        }
        if files.exists(part):
            stage_folder.check_made_from(part, stage_folder.read_json(part)["made_from"], digests)
        else:
            counted = opener.count_copies(trained_on, spec, threshold)
            stage_folder.write_json(part, {"made_from": digests, **counted})
        values = stage_folder.read_json(part)
        found[values["set"]] = values["near_copies"]
    return found


def _check_part(path: str, digests: dict[str, str]) -> None:
    """Raise `InputError` for scores that were made from other files than those there now."""
    part = stage_folder.read_json(path)
    place = f"{path} ({part['model']['name']} on {part['set']['name']})"
    stage_folder.check_made_from(place, part.get("made_from", digests), digests)  # early versions kept no digests


def _word_own_sets(
    config: Config, datasets: dict[str, EvaluationSet], folder: stage_folder.Folder
) -> dict[str, OwnPrompts]:
    return word_own_sets(
        datasets,
        captions_of=config.words.training_captions,
        use="learned" if config.words.templates == LEARNED else "own",
        folder=folder.path,
    )


def _digests(config: Config, models: dict[str, str], sets: Sequence[str]) -> dict[tuple[str, str], dict[str, str]]:
    weights = weights_by_name(config.weights, list(models))
    templates = config.words.templates if config.words.templates != LEARNED else None
    texts = {"prompts": config.words.prompts, "templates": (templates or "").partition("#")[0]}
    teacher = None
    if config.teacher:
        spec = models.get(config.teacher, split_model(config.teacher)[1])
        teacher = spec, config.teacher_weights or weights.get(config.teacher)
    digests = part_digests(models, sets, weights=weights, teacher=teacher, texts=texts, data_root=config.data_root)
    if config.words.training_captions:
        captions = {"training captions": captions_digest(config.words.training_captions)}
        return {key: {**found, **captions} for key, found in digests.items()}
    return digests


def _tables(scores: Sequence[Score], config: Config) -> list[TaskTable]:
    """Build the tables; say so where none of the published rows that were asked for has a place in them."""
    rows = published_rows(config.published)
    if rows and not any(row.has(score.task, {score.set}) for row in rows for score in scores):
        warn(f"evaluate: {', '.join(config.published)}: no published number is for these sets and tasks.")
    return build_tables(scores, rows)


def _finish(
    folder: stage_folder.Folder, parts: Sequence[dict[str, Any]], near: Mapping[str, dict[str, Any]], config: Config
) -> dict[str, Any]:
    """Write and print the tables of all parts, and the result."""
    rows = [row for part in parts for row in part["rows"]]
    scores = [Score.from_row(row) for row in rows]
    tables = _tables(scores, config)
    if near:
        tables = [*tables, table_near_copies(near)]
    warnings = list_wording_warnings(scores, templates_files=_templates_files(folder, [part["set"] for part in parts]))
    files.write_bytes(folder.child("table.md"), "\n".join(table.markdown() for table in tables).encode())
    files.write_bytes(folder.child("table.csv"), write_csv(scores).encode())
    for name, record in clip_benchmark_records(scores).items():
        stage_folder.write_json(folder.child("clip_benchmark", name), record)
    _print(tables)
    for warning in warnings:
        warn(f"evaluate: {warning}")
    by_name = {kind: {part[kind]["name"]: part[kind] for part in parts} for kind in ("model", "set")}
    for name, copies in near.items():
        by_name["set"][name]["near_copies"] = copies
    return folder.finish(
        {
            "rows": rows,
            "models": list(by_name["model"].values()),
            "sets": list(by_name["set"].values()),
            "warnings": warnings,
        }
    )


def _templates_files(folder: stage_folder.Folder, sets: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Return where the learned templates of each set lie that has some."""
    return {found["name"]: templates_path(folder.path, found["name"]) for found in sets if "learned_templates" in found}


class _Opener:
    """Open the models that a config names when they are first needed, and keep the teacher's views of the sets."""

    def __init__(self, config: Config, cache: str) -> None:
        self._config = config
        self._cache = FeatureCache(config.reading.cache or cache)
        self._views: dict[str, View] = {}
        self._store_teacher: Embedder | None = None
        self.protocol = _protocol(config)

    def model(self, name: str) -> Embedder:
        """Open one of --models."""
        models = dict(map(split_model, self._config.models))
        weights = weights_by_name(self._config.weights, list(models)).get(name)
        return self._open(models[name], name=name, weights=weights)

    def teacher_view(self, model: Embedder, dataset: EvaluationSet) -> View | None:
        """Return the teacher's view of a set; None without a teacher, or where the model is the teacher itself."""
        config = self._config
        if config.teacher is None or "agreement" not in config.tasks or isinstance(dataset, MissingSet):
            return None
        if self._teacher.identity == model.identity:
            return None
        if dataset.name not in self._views:
            self._views[dataset.name] = self.protocol.view(self._teacher, dataset)
        return self._views[dataset.name]

    @cached_property
    def _teacher(self) -> Embedder:
        config = self._config
        assert config.teacher is not None
        models = dict(map(split_model, config.models))
        if config.teacher in models and config.teacher_weights is None:
            return self.model(config.teacher)
        name, spec = split_model(config.teacher)
        return self._open(models.get(config.teacher, spec), name=name, weights=config.teacher_weights)

    def count_copies(self, trained_on: TrainingImages, spec: str, threshold: float) -> dict[str, Any]:
        """Return the name of a set, and which of its test images have a near copy among the images trained on."""
        config, reading = self._config, self._config.reading
        dataset = load_set(spec, data_root=config.data_root, prompts=config.words.prompts)
        if isinstance(dataset, MissingSet):
            return {"set": dataset.name, "near_copies": {"reason": dataset.reason}}
        if self._store_teacher is None:
            device = resolve_device(config.device)
            self._store_teacher = open_store_teacher(
                trained_on.store, device=device, num_workers=reading.num_workers, cache=self._cache
            )
        policy = ErrorPolicy(reading.on_error, reading.max_bad_ratio)
        pictures = embed_set(self._store_teacher, dataset, policy=policy)
        copies = trained_on.count_copies(pictures, threshold=threshold, device=self._store_teacher.device)
        return {"set": dataset.name, "near_copies": copies}

    def _open(self, spec: str, *, name: str, weights: str | None) -> Embedder:
        config = self._config
        encoding = Encoding(
            batch_size=config.batch_size,
            dtype=PRECISIONS[config.precision],
            max_pixels=config.reading.max_pixels,
            num_workers=config.reading.num_workers,
        )
        device = resolve_device(config.device)
        return open_embedder(spec, name=name, weights=weights, device=device, encoding=encoding, cache=self._cache)


def _unique(names: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(names))


def _protocol(config: Config) -> Protocol:
    return Protocol(
        tasks=config.tasks,
        templates=None if config.words.templates in (None, LEARNED) else _templates(config.words.templates),
        probe_features=config.probe.probe_features,
        probe_l2=config.probe.probe_l2,
        seed=config.probe.seed,
        on_error=config.reading.on_error,
        max_bad_ratio=config.reading.max_bad_ratio,
        captions=config.words.captions,
        caption_prefix=config.words.caption_prefix,
    )


def _templates(source: str) -> tuple[str, ...]:
    path, _, name = source.partition("#")
    return prompts_of(path, name).templates if name else read_templates(path)


def _print(tables: Sequence[TaskTable]) -> None:
    console = Console(highlight=False, markup=False, emoji=False)  # names and paths may hold [...] and :...:
    for table in tables:
        printed = RichTable(table.columns[0], title=table.title, title_justify="left")
        for column in table.columns[1:]:
            printed.add_column(column, justify="right")
        for row in table.rows:
            printed.add_row(*row)
        console.print(printed, *table.notes, sep="\n")
