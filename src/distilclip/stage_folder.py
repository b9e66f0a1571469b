"""Write and read the folder of a stage: config.json and env.json first, then its parts, and result.json last.

A folder with `result.json` is finished. The same config finds it done; another config is an error that says what
differs. Nothing is overwritten silently.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distilclip import files, folder_lock
from distilclip.errors import InputError
from distilclip.options import option_fields, option_values


@dataclass(frozen=True)
class Folder:
    """The output folder of one stage, open for writing."""

    path: str
    stage: str

    def child(self, *names: str) -> str:
        """Return the path of a file in this folder."""
        return files.join(self.path, *names)

    @property
    def finished(self) -> bool:
        """Whether the stage has written its result."""
        return files.exists(self.child("result.json"))

    def remove_temporaries(self) -> None:
        """Remove the unfinished files of killed processes, but for those of stages that lie in folders below."""
        files.remove_temporaries(self.path, keep="env.json", shared=folder_lock.NAME)

    def result(self) -> dict[str, Any]:
        """Read the stage's result, as `finish` wrote it."""
        return read_json(self.child("result.json"))

    def finish(self, result: dict[str, Any]) -> dict[str, Any]:
        """Write result.json, the last act of a stage, and give the folder back. No times: they vary from run to run.

        Before it, what killed workers of the stage left of files that they were writing is removed.
        """
        self.remove_temporaries()
        write_json(self.child("result.json"), {"stage": self.stage, **result})
        folder_lock.release(self.path)
        return self.result()


@dataclass(frozen=True, kw_only=True)
class StageRecord:
    """What the files of a stage's folder say. `result` is empty while the stage is unfinished."""

    path: str
    stage: str
    config: dict[str, Any]
    environment: dict[str, Any]
    result: dict[str, Any]


def read_record(path: str) -> StageRecord | None:
    """Read a stage's folder, finished or not; None where no stage has written (a model's config.json is another)."""
    config, environment, result = (_read_object(files.join(path, f"{n}.json")) for n in ("config", "env", "result"))
    stage = (result or config).get("stage")
    if not isinstance(stage, str):
        return None
    config = {name: value for name, value in config.items() if name != "stage"}
    return StageRecord(path=path, stage=stage, config=config, environment=environment, result=result)


STANDS_FOR = {"select": "balance", "import": "embed"}
"""Stages whose folders hold what others' do, so that they can stand in their place."""


def read_finished(path: str, *, stage: str | None = None) -> StageRecord | None:
    """Read a finished stage's folder; None where there is none, or where none wrote it that can stand for `stage`."""
    record = read_record(path)
    return record if record is not None and record.result and (stage is None or _is_of(record, stage)) else None


def _is_of(record: StageRecord, stage: str) -> bool:
    """Whether a stage wrote a folder, or one whose folders stand for its."""
    return stage in (record.stage, STANDS_FOR.get(record.stage))


def require(path: str, *, stage: str, store: str | None = None) -> dict[str, Any]:
    """Return the result of a finished stage folder; `InputError` names the stage that is missing or unfinished.

    With `store`, the folder must also have been made from that store, wherever it lies now.
    """
    record = read_record(str(path))
    if record is None:
        raise InputError(f"{path} is no {stage} folder: run `distilclip {stage} --out {path}` first.")
    if not _is_of(record, stage):
        raise InputError(f"{path} was written by `distilclip {record.stage}`; a {stage} folder is needed here.")
    if not record.result:
        again = f"--out {path}` with the right values" if _holds_nothing(path) else f"{path}/config.json` to finish it"
        raise InputError(f"{path} is unfinished (no result.json): run `distilclip {stage} {again}.")
    if store is not None:
        made_from = files.join(path, "inputs.json")
        if not files.exists(made_from):
            raise InputError(
                f"{path} has no inputs.json to say which store it was made from: make it again, elsewhere."
            )
        before = read_json(made_from).get("embed")
        if before != result_digest(store):
            _check_growth(path, record.stage, store, before)
            raise InputError(f"{path} was made from another store than {store}. Run `distilclip {stage}` on this one.")
    return record.result


def _check_growth(path: str, stage: str, store: str, before: str | None) -> None:
    """Raise `InputError` where a folder was made from a store that has grown since, and say how to go on."""
    if growth(store, before) is None:
        return
    if stage == "balance":
        remedy = (
            f"Run `distilclip balance --extend {path}` on the store, with another --out: it compares the new rows only"
        )
    else:
        remedy = f"Run `distilclip {stage}` on the store as it is now, with another --out"
    raise InputError(f"{path} was made from {store} before that grew (embed --append). {remedy}.")


def _check_inputs_grown(inputs: Sequence[tuple[str, str]]) -> None:
    """Raise `InputError` where an input was made from another input, a store, before that grew."""
    for store in [given for given, stage in inputs if stage == "embed" and former_values(given)]:
        for given, stage in inputs:
            made_from = files.join(given, "inputs.json")
            if stage not in ("embed", NO_STAGE) and files.exists(made_from):
                _check_growth(given, stage_of(given), store, read_json(made_from).get("embed"))


def open_folder(path: str, *, stage: str, config: Any, inputs: Sequence[tuple[str, str]] = ()) -> Folder:
    """Create a stage's folder, or open it again to resume it or to find it finished.

    An unfinished folder belongs to this process from here to `finish`; a finished one belongs to nobody. `inputs` are
    the (folder, stage) that this one reads: each must be finished, and its digest is written down; what no stage wrote
    has `NO_STAGE`. A folder in which the stage has made nothing yet is begun anew, so that a wrong value can be
    corrected.

    Raises `InputError` when another process holds the folder, and when it was begun by another stage, with another
    config, or from inputs that have changed since, naming what differs.
    """
    folder = Folder(str(path), stage)
    for input_path, input_stage in inputs:
        if input_stage != NO_STAGE:
            require(input_path, stage=input_stage)
        elif not files.exists(input_path):
            raise InputError(f"{input_path} does not exist. Check the path.")
    _check_inputs_grown(inputs)
    digests, values = _input_digests(inputs), {"stage": stage, **config_values(config)}
    if "embed" in _changed_inputs(folder.path, digests) and not _holds_nothing(folder.path):
        store = next((given for given, input_stage in inputs if input_stage == "embed"), None)
        if store is not None:
            _check_growth(folder.path, stage, store, read_json(folder.child("inputs.json")).get("embed"))
    if folder.finished and files.exists(folder.child("config.json")):
        before = _check_same(folder, values, config, digests)
        if before is not None and not _grown(before, values, config):
            folder_lock.remove_stale(folder.path)
            return folder
    elif not (files.is_url(folder.path) or files.exists(folder.child("config.json")) or _may_begin(folder)):
        raise InputError(f"{path} is not empty and is no {stage} folder (no config.json). Choose another --out.")
    folder_lock.hold(folder.path)
    try:
        _begin(folder, values, config, digests)
    except BaseException:
        folder_lock.release(folder.path)
        raise
    return folder


def _begin(folder: Folder, values: dict[str, Any], config: Any, digests: Mapping[str, str]) -> None:
    """Write the first files of a folder that this process holds, or find them as they must be."""
    config_path, inputs_path = folder.child("config.json"), folder.child("inputs.json")
    is_new = not files.exists(config_path)
    before = None if is_new else _check_same(folder, values, config, digests)
    folder.remove_temporaries()
    if before is not None:
        if _grown(before, values, config):
            _extend(folder, before, values, config)
        return
    write_json(folder.child("env.json"), environment())
    if digests or files.exists(inputs_path):
        write_json(inputs_path, digests)
    if not is_new:
        write_json(config_path, values)
    elif not files.create_bytes(config_path, _json_bytes(values)):
        raise InputError(f"{folder.path} was begun by another process just now. Run the same command again.")


def _check_same(
    folder: Folder, values: dict[str, Any], config: Any, digests: Mapping[str, str]
) -> dict[str, Any] | None:
    """Return the values that a folder was begun with, if it can go on with these; None where it is to begin anew.

    Raises `InputError` where the stage has already made something from others.
    """
    before = read_json(folder.child("config.json"))
    differences, changed = _differences(before, values, config), _changed_inputs(folder.path, digests)
    if not differences and not changed:
        return before
    if before.get("stage") == folder.stage and _holds_nothing(folder.path):
        return None
    if not differences:
        check_made_from(folder.path, read_json(folder.child("inputs.json")), digests)
    raise InputError(
        f"{folder.path} was made with another configuration: {'; '.join(differences)}. "
        "Choose another --out, or remove that folder."
    )


def find_changes(path: str, *, stage: str, config: Any, inputs: Sequence[tuple[str, str]] = ()) -> list[str]:
    """Say why a begun folder cannot go on with this config and these inputs; empty where it can, or is not begun.

    Takes what `open_folder` takes, and writes nothing.
    """
    if not files.exists(files.join(path, "config.json")) or _holds_nothing(path):
        return []
    before = read_json(files.join(path, "config.json"))
    if before.get("stage") != stage:
        return [f"it was written by `distilclip {before.get('stage')}`"]
    changes = _differences(before, {"stage": stage, **config_values(config)}, config)
    unfinished = [given for given, input_stage in inputs if not _is_there(given, input_stage)]
    if unfinished:
        return changes + [f"{given} is not finished" for given in unfinished]
    changed = _changed_inputs(path, _input_digests(inputs))
    return changes + ([f"{', '.join(changed)} changed since it was made"] if changed else [])


def _is_there(path: str, stage: str) -> bool:
    """Whether an input is finished, or exists where no stage wrote it."""
    return files.exists(path) if stage == NO_STAGE else read_finished(path, stage=stage) is not None


def is_outgrown(path: str, config: Any) -> bool:
    """Whether a finished folder was made with a smaller value of an option that may grow."""
    if not files.exists(files.join(path, "result.json")):
        return False
    return bool(_grown(read_json(files.join(path, "config.json")), config_values(config), config))


def _input_digests(inputs: Sequence[tuple[str, str]]) -> dict[str, str]:
    digests: dict[str, str] = {}
    for path, stage in inputs:
        name = stage if stage not in digests else f"{stage} {len(digests) + 1}"
        digests[name] = content_digest(path) if stage == NO_STAGE else result_digest(path)
    return digests


def _changed_inputs(path: str, now: Mapping[str, str]) -> list[str]:
    """Return the names of inputs that came, went or changed since inputs.json was written, if it was."""
    before_path = files.join(path, "inputs.json")
    return _changed_names(read_json(before_path), now) if files.exists(before_path) else []


def _changed_names(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    return sorted(name for name in {*before, *now} if before.get(name) != now.get(name))


def _grown(before: dict[str, Any], values: dict[str, Any], config: Any) -> dict[str, Any]:
    """Return the former values of options that may grow and have grown."""
    names = [field.name for field in option_fields(type(config)) if field.metadata.get("extendable")]
    return {name: before[name] for name in names if name in before and before[name] != values[name]}


def _extend(folder: Folder, before: dict[str, Any], values: dict[str, Any], config: Any) -> None:
    """Let a folder go on to larger values: extended.json lists the former ones, and result.json goes until the end."""
    former = [*former_values(folder.path), _grown(before, values, config)]
    write_json(folder.child("extended.json"), {"former": former})
    if folder.finished:
        files.remove(folder.child("result.json"))
    write_json(folder.child("config.json"), values)


def extend_folder(folder: Folder, config: Any, **counts: int) -> None:
    """Let a finished folder that now holds more have a new result: the former one goes, until `finish`.

    extended.json says with which values and counts it was made before and the digest of its result, by which `growth`
    knows what was made from it. After a kill the same call does what is left to do.
    """
    before, values = read_json(folder.child("config.json")), {"stage": folder.stage, **config_values(config)}
    if folder.finished and growth(folder.path, now := result_digest(folder.path)) is None:
        changed = {name: before[name] for name in values if name in before and before[name] != values[name]}
        former = [*former_values(folder.path), {**changed, **counts, "result": now}]
        write_json(folder.child("extended.json"), {"former": former})
    write_json(folder.child("config.json"), values)
    if folder.finished:
        files.remove(folder.child("result.json"))


def growth(path: str, digest: str | None) -> dict[str, Any] | None:
    """Return what extended.json says of a folder when its `result_digest` was `digest`; None where it never was."""
    return next((entry for entry in former_values(path) if digest and entry.get("result") == digest), None)


def former_values(path: str) -> list[dict[str, Any]]:
    """Return the smaller values with which a folder was made before it went on to its own, the first ones first."""
    record = files.join(path, "extended.json")
    return read_json(record)["former"] if files.exists(record) else []


def folders_of(stage: str, paths: Sequence[str]) -> list[tuple[str, str]]:
    """Return those of the paths that are folders of a stage, as inputs of another; a model may also be a name."""
    records = ((path, read_record(path)) for path in paths)
    return [(path, stage) for path, record in records if record is not None and _is_of(record, stage)]


NO_STAGE = "side files"
"""What stands in place of a stage for inputs that are files of the user's own."""


def stage_of(path: str) -> str:
    """Return the stage that wrote a folder; `NO_STAGE` for other files and folders, and where there is nothing."""
    record = read_record(path) if files.is_folder(path) else None
    return NO_STAGE if record is None else record.stage


def content_digest(path: str) -> str:
    """Return the SHA-256 of a file, or of the names and files of a folder."""
    if not files.is_folder(path):
        return files.sha256(path)
    digest = hashlib.sha256()
    for at, names in files.walk(path):
        for name in names:
            place = files.join(at, name)
            digest.update(f"{place.removeprefix(path)} {files.sha256(place)}\n".encode())
    return digest.hexdigest()


def result_digest(path: str) -> str:
    """Return the SHA-256 of a finished folder's result.json and of a store's manifest: equal results, equal digest."""
    digest = hashlib.sha256(files.read_bytes(files.join(path, "result.json")))
    manifest = files.join(path, "manifest.parquet")
    if files.exists(manifest):
        digest.update(files.read_bytes(manifest))
    return digest.hexdigest()


def check_made_from(place: str, before: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Raise `InputError` where `place` was made from other inputs than there are now, naming those that changed.

    `before` and `now` are digests by what each input is called.
    """
    if changed := _changed_names(before, now):
        raise InputError(
            f"{place} was made from other inputs than those there now: since then, {', '.join(changed)} came, went or "
            "changed. Choose another --out, or remove that folder and what was made from it."
        )


def write_made_from(path: str, place: str, now: Mapping[str, str]) -> None:
    """Write digests of inputs to the JSON file `path` the first time, and check them every time after that.

    Raises `InputError` as `check_made_from` does.
    """
    if files.exists(path):
        check_made_from(place, read_json(path), now)
    else:
        write_json(path, dict(now))


def config_values(config: Any) -> dict[str, Any]:
    """Return a config as plain JSON values."""
    return json.loads(json.dumps(option_values(config)))


def environment() -> dict[str, Any]:
    """Describe where and with what this runs: versions, git commit, device, command, time."""
    from importlib import metadata  # here, since `distilclip run` looks at finished folders in no time

    versions = {}
    for name in ("distilclip", "torch", "torchvision", "open_clip_torch", "timm", "numpy", "numba", "pyarrow"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "python": platform.python_version(),
        "versions": versions,
        "git_commit": _git_commit(),
        "platform": platform.platform(),
        "num_cpus": os.cpu_count(),
        "gpus": _gpu_names(),
        "command": [_without_places(word) for word in sys.argv],
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _without_places(word: str) -> str:
    """Return a word of a command without what is private: the folders of its paths, and the credentials of its URLs.

    config.json has the paths, since the stage needs them again; env.json is what people show each other.
    """
    home = os.path.expanduser("~")
    word = word if home in ("~", "/") else word.replace(home, "~")
    word = re.sub(r"://[^/@\s]+@", "://", word)
    word = re.sub(r"(://[^\s?]*)\?\S*", r"\1", word)
    return re.sub(r"(?<![\w.~/-])(?:~[\w.-]*)?/(?!/)(?:[^/\s'\",=]*/)*", ".../", word)


def _git_commit() -> str | None:
    """Return the commit of the checkout that this package runs from; None where there is none, or no git."""
    package = os.path.dirname(os.path.abspath(__file__))
    if not os.path.exists(os.path.join(package, "..", "..", ".git")) or shutil.which("git") is None:
        return None
    found = subprocess.run(["git", "-C", package, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return found.stdout.strip() or None


_BEGINNING = ("config.json", "env.json", "inputs.json", folder_lock.NAME)  # `open_folder`'s, before the stage's own


def _may_begin(folder: Folder) -> bool:
    """Whether a local folder is empty; that of a run may hold folders of its steps, which were run one by one."""
    if folder.stage != "run":
        return _holds_nothing(folder.path)
    for parent, folders, names in os.walk(folder.path):
        folders[:] = [f for f in folders if not os.path.exists(os.path.join(parent, f, "config.json"))]
        if not all(name in _BEGINNING or files.is_temporary(name) for name in names):
            return False
    return True


def _holds_nothing(path: str) -> bool:
    """Whether a folder holds no file but those of its beginning, and temporary ones of a killed run."""
    if files.is_url(path):
        fs, inner = files.filesystem(path)
        places = [place.removeprefix(inner.rstrip("/") + "/") for place in fs.find(inner)]
    else:
        walk = os.walk(path)
        places = [os.path.relpath(os.path.join(parent, name), path) for parent, _, names in walk for name in names]
    return all(place in _BEGINNING or files.is_temporary(place) for place in places)


def _gpu_names() -> list[str]:
    torch = sys.modules.get("torch")  # a stage that needs no torch must not load it for a line in env.json
    if torch is None or not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def _read_object(path: str) -> dict[str, Any]:
    """Read a JSON object, empty where there is no such file."""
    value = read_json(path) if files.exists(path) else {}
    return value if isinstance(value, dict) else {}


def read_json(path: str) -> dict[str, Any]:
    """Read a JSON object; `InputError` names a file that is not valid JSON, or no object."""
    try:
        value = json.loads(files.read_bytes(path))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON ({error}). Remove its folder and run the stage again.") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} holds no JSON object. Remove its folder and run the stage again.")
    return value


def write_json(path: str, value: Any) -> None:
    """Write JSON atomically; NaN is refused, since other readers cannot parse it."""
    files.write_bytes(path, _json_bytes(value))


def _json_bytes(value: Any) -> bytes:
    return (json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n").encode()


class Metrics:
    """Appends to metrics.jsonl, one JSON object a line. On resume, lines from step `resume_at` on are dropped first."""

    def __init__(self, path: str, *, resume_at: int = 0) -> None:
        self.path = path
        kept = [line for line in read_metrics(path) if line["step"] < resume_at] if files.exists(path) else []
        files.write_bytes(path, "".join(json.dumps(line) + "\n" for line in kept).encode())

    def write(self, *, step: int, **values: Any) -> None:
        """Append one line."""
        line = (json.dumps({"step": step, **values}) + "\n").encode()
        if files.is_url(self.path):  # object stores cannot append
            files.write_bytes(self.path, files.read_bytes(self.path) + line)
            return
        with open(self.path, "ab") as file:
            file.write(line)


def read_metrics(path: str) -> Iterator[dict[str, Any]]:
    """Yield the lines of a metrics.jsonl; a last line that a kill cut short is left out."""
    for line in files.read_bytes(path).decode().splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            return


def _differences(old: dict[str, Any], new: dict[str, Any], config: Any) -> list[str]:
    fields = option_fields(type(config))
    ignored = {f.name for f in fields if f.metadata.get("changeable")} | {"out"}
    for field in fields:  # a field that an older version lacked has its default
        if field.name not in old and field.default is not dataclasses.MISSING:
            old[field.name] = json.loads(json.dumps(field.default))
    names = [*new, *(n for n in old if n not in new)]
    extendable = [f.name for f in fields if f.metadata.get("extendable")]
    grows = {name for name in extendable if None not in (old.get(name), new[name]) and old[name] < new[name]}
    return [
        f"{n} was {old.get(n)!r}, now {new.get(n)!r}"
        for n in names
        if n not in ignored | grows and old.get(n) != new.get(n)
    ]
