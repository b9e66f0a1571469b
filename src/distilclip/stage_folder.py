"""The folder contract of every stage: config.json, env.json, parts, metrics.jsonl, and result.json last.

A folder with `result.json` is finished: the same config finds it done, another config is an error that says what
differs. Nothing is ever overwritten silently.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from distilclip import files
from distilclip.errors import InputError
from distilclip.options import option_fields, option_values


@dataclass(frozen=True)
class Folder:
    """The output folder of one stage."""

    path: str
    stage: str

    def child(self, *names: str) -> str:
        """The path of a file in this folder."""
        return files.join(self.path, *names)

    @property
    def finished(self) -> bool:
        """Whether the stage has written its result."""
        return files.exists(self.child("result.json"))

    def result(self) -> dict[str, Any]:
        """The stage's result, as `finish` wrote it."""
        return read_json(self.child("result.json"))

    def finish(self, result: dict[str, Any]) -> dict[str, Any]:
        """Write result.json, the last act of a stage. It holds nothing that varies from run to run (no times)."""
        write_json(self.child("result.json"), {"stage": self.stage, **result})
        return self.result()


def execution(default: Any) -> Any:
    """A config field that says how to compute, not what: it may differ between a run and its resumption."""
    return dataclasses.field(default=default, metadata={"execution": True})


def open_folder(path: str, *, stage: str, config: Any, inputs: Sequence[tuple[str, str]] = ()) -> Folder:
    """Create a stage's folder, or open it again to resume it or to find it finished.

    `inputs` are the (folder, stage) that this one reads: each must be finished, and its digest is written down.

    Raises `InputError` when the folder was begun by another stage, with another config, or from inputs that have
    changed since, naming what differs.
    """
    folder = Folder(str(path), stage)
    digests: dict[str, str] = {}
    for input_path, input_stage in inputs:
        require(input_path, stage=input_stage)
        name = input_stage if input_stage not in digests else f"{input_stage} {len(digests) + 1}"
        digests[name] = result_digest(input_path)
    config_path = folder.child("config.json")
    values = config_values(config)
    if files.exists(config_path):
        differences = _differences(read_json(config_path), {"stage": stage, **values}, config)
        if differences:
            raise InputError(
                f"{path} was made with another configuration: {'; '.join(differences)}. "
                "Choose another --out, or remove that folder."
            )
        if files.exists(folder.child("inputs.json")) and (before := read_json(folder.child("inputs.json"))) != digests:
            changed = sorted(name for name in {*before, *digests} if before.get(name) != digests.get(name))
            raise InputError(
                f"{path} was made from other results than those there now ({', '.join(changed)} changed). "
                f"Choose another --out, or remove {path} and what was made from it."
            )
        _remove_leftovers(folder.path)
        return folder
    if not files.is_url(folder.path) and os.path.isdir(folder.path) and _foreign_files(folder.path):
        raise InputError(f"{path} is not empty and is no {stage} folder (no config.json). Choose another --out.")
    write_json(folder.child("env.json"), environment())
    if digests:
        write_json(folder.child("inputs.json"), digests)
    write_json(config_path, {"stage": stage, **values})
    return folder


def folders_of(stage: str, paths: Sequence[str]) -> list[tuple[str, str]]:
    """Those of the paths that are folders of a stage, as inputs of another; a model may also be a name or a file."""
    found = []
    for path in paths:
        config = files.join(path, "config.json")
        if files.exists(config) and read_json(config).get("stage") == stage:
            found.append((path, stage))
    return found


def result_digest(path: str) -> str:
    """SHA-256 of a finished folder's result.json, and of a store's manifest: equal results, equal digest."""
    digest = hashlib.sha256(files.read_bytes(files.join(path, "result.json")))
    manifest = files.join(path, "manifest.parquet")
    if files.exists(manifest):
        digest.update(files.read_bytes(manifest))
    return digest.hexdigest()


def require(path: str, *, stage: str, store: str | None = None) -> dict[str, Any]:
    """The result of a finished stage folder; `InputError` names the stage that is missing or unfinished.

    With `store`, the folder must also have been made from that store, wherever it lies now.
    """
    folder = Folder(str(path), stage)
    if not files.exists(folder.child("config.json")):
        raise InputError(f"{path} is no {stage} folder: run `distilclip {stage} --out {path}` first.")
    config = read_json(folder.child("config.json"))
    if config.get("stage") != stage:
        raise InputError(f"{path} was written by `distilclip {config.get('stage')}`; a {stage} folder is needed here.")
    if not folder.finished:
        raise InputError(
            f"{path} is unfinished (no result.json): run `distilclip {stage} {path}/config.json` to finish it."
        )
    if store is not None:
        if not files.exists(folder.child("inputs.json")):
            raise InputError(
                f"{path} has no inputs.json to say which store it was made from: make it again, elsewhere."
            )
        if read_json(folder.child("inputs.json")).get("embed") != result_digest(store):
            raise InputError(f"{path} was made from another store than {store}. Run `distilclip {stage}` on this one.")
    return folder.result()


def config_values(config: Any) -> dict[str, Any]:
    """A config as plain JSON values."""
    return json.loads(json.dumps(option_values(config)))


def environment() -> dict[str, Any]:
    """Where and with what this runs: versions, git commit, device, command, time."""
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
        "command": sys.argv,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _git_commit() -> str | None:
    """The commit of the checkout that this package runs from; None where it is installed, or git is not."""
    package = os.path.dirname(os.path.abspath(__file__))
    if not os.path.exists(os.path.join(package, "..", "..", ".git")) or shutil.which("git") is None:
        return None
    found = subprocess.run(["git", "-C", package, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return found.stdout.strip() or None


def _foreign_files(path: str) -> list[str]:
    """What lies in a folder that no stage has begun; a kill before config.json leaves env.json and temporary files."""
    return [name for name in os.listdir(path) if name not in ("env.json", "inputs.json") and not name.endswith(".tmp")]


def _remove_leftovers(path: str) -> None:
    """Remove temporary files of a killed run, except from folders of other stages below."""
    if files.is_url(path):
        return
    for parent, folders, names in os.walk(path):
        folders[:] = [f for f in folders if not os.path.exists(os.path.join(parent, f, "config.json"))]
        for name in names:
            if name.endswith(".tmp"):
                os.remove(os.path.join(parent, name))


def _gpu_names() -> list[str]:
    torch = sys.modules.get("torch")  # a stage that needs no torch must not load it for a line in env.json
    if torch is None or not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def read_json(path: str) -> dict[str, Any]:
    """A JSON object; `InputError` names the file that does not parse."""
    try:
        return json.loads(files.read_bytes(path))
    except json.JSONDecodeError as error:
        raise InputError(f"{path} is not valid JSON ({error}). Remove its folder and run the stage again.") from error


def write_json(path: str, value: Any) -> None:
    """Write JSON atomically; NaN is refused, since other readers cannot parse it."""
    files.write_bytes(path, (json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n").encode())


class Metrics:
    """metrics.jsonl: one JSON object a line, appended; on resume, lines from `step` on are dropped first."""

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
    """The lines of a metrics.jsonl; a last line cut by a kill is left out."""
    for line in files.read_bytes(path).decode().splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            return


def _differences(old: dict[str, Any], new: dict[str, Any], config: Any) -> list[str]:
    fields = option_fields(type(config))
    ignored = {f.name for f in fields if f.metadata.get("execution")} | {"out"}
    for field in fields:  # a field that an older version lacked has its default
        if field.name not in old and field.default is not dataclasses.MISSING:
            old[field.name] = json.loads(json.dumps(field.default))
    names = [*new, *(n for n in old if n not in new)]
    return [
        f"{n} was {old.get(n)!r}, now {new.get(n)!r}" for n in names if n not in ignored and old.get(n) != new.get(n)
    ]
