"""Say in one line what went wrong, and give the exit code: for errors of the system, of files and of packages.

Errors of packages that may be missing are known by the names of their classes. What is not known here is a defect of
distilclip, and keeps its traceback.
"""

from __future__ import annotations

import errno
import json
import os
import re
import tempfile
from dataclasses import dataclass

from distilclip.errors import InputError
from distilclip.launch import ProcessError

FAULTS_FOUND, BAD_INPUT, SYSTEM, INTERRUPTED = 1, 2, 3, 130
"""Exit codes: `verify` found faults and leaves them; what was asked for must change; the machine must, then the same
command goes on; Ctrl-C."""

AGAIN = "then run the same command again: it goes on from what is whole."
TRAIN_PACKAGES = {"torch", "torchvision", "open_clip", "timm", "safetensors", "numba", "scipy", "simplejpeg"}
EXTRA_OF_PACKAGE = {
    **dict.fromkeys(TRAIN_PACKAGES, "train"),
    **{"s3fs": "s3", "gcsfs": "gcs", "ray": "ray", "onnx": "onnx", "onnxscript": "onnx"},
    **{"transformers": "huggingface", "tensorboard": "tensorboard", "wandb": "wandb"},
}
_REASONS = {
    errno.ENOSPC: (SYSTEM, f"the disk is full. Free some space, {AGAIN}"),
    errno.EDQUOT: (SYSTEM, f"the disk quota is used up. Free some space, {AGAIN}"),
    errno.EROFS: (SYSTEM, "the file system is read-only. Choose another --out."),
    errno.EACCES: (SYSTEM, "this user has no right to it. Change its permissions, or choose another place."),
    errno.EPERM: (SYSTEM, "this user has no right to it. Change its permissions, or choose another place."),
    errno.EIO: (SYSTEM, f"the device cannot read or write it. Check the disk or the network storage, {AGAIN}"),
    errno.ESTALE: (SYSTEM, f"the network storage lost it. Check that it is mounted, {AGAIN}"),
    errno.EMFILE: (SYSTEM, f"too many files are open. Raise the limit (`ulimit -n 65536`), {AGAIN}"),
    errno.ENFILE: (SYSTEM, f"too many files are open on this machine. End other programs, {AGAIN}"),
    errno.ENOMEM: (SYSTEM, f"the memory is full. Lower --batch-size or --num-workers, or end other programs, {AGAIN}"),
    errno.ENOENT: (BAD_INPUT, "there is no such file or folder. Check the path."),
    errno.EEXIST: (BAD_INPUT, "it is a file, and a folder is needed here. Choose another path."),
    errno.ENOTDIR: (BAD_INPUT, "a part of this path is a file, and a folder is needed there. Choose another path."),
    errno.EISDIR: (BAD_INPUT, "it is a folder, and a file is needed here. Choose another path."),
    errno.ELOOP: (BAD_INPUT, "its symbolic links lead in a circle. Give the real path."),
    errno.ENAMETOOLONG: (BAD_INPUT, "the name is too long for this file system. Choose a shorter path."),
}
_MACHINE = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE}


@dataclass(frozen=True)
class Failure:
    """An exit code, and the line to print."""

    code: int
    text: str


def explain(error: BaseException) -> Failure | None:
    """Return what an error means for the user; None for a defect of distilclip, whose traceback is needed."""
    if isinstance(error, InputError):
        if (refusal := _find_refusal(error)) is not None:
            return _explain_system(refusal, str(refusal))
        return Failure(BAD_INPUT, " ".join(line.strip() for line in str(error).splitlines()))
    if isinstance(error, ProcessError):
        return Failure(error.code, str(error))
    modules = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
    names = {kind.__name__ for kind in type(error).__mro__}
    said = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__).rstrip(".")
    if isinstance(error, ModuleNotFoundError):
        return _explain_missing_package(error)
    if "huggingface_hub" in modules:
        return Failure(
            SYSTEM,
            f"The Hugging Face hub gave no answer that can be used: {said}. Check the name, `hf auth login` for a "
            "private one, and the network; without a network, give a folder on disk.",
        )
    if "OutOfMemoryError" in names:
        return Failure(SYSTEM, f"The GPU's memory is full: {said}. Lower --micro-batch or --batch-size, {AGAIN}")
    if names & {"DistBackendError", "DistNetworkError"} or (isinstance(error, RuntimeError) and "gloo" in str(error)):
        return Failure(SYSTEM, f"Another process of this training has ended ({said}). See what it said, {AGAIN}")
    if isinstance(error, MemoryError):
        return Failure(
            SYSTEM, f"The memory is full. Lower --batch-size or --num-workers, or end other programs, {AGAIN}"
        )
    if "SafetensorError" in names:
        code = re.search(r"os error (\d+)", said)
        if code:
            return _explain_number(int(code.group(1)), "a file of tensors", said)
        return Failure(BAD_INPUT, f"A file of tensors (.safetensors) is damaged: {said}. {_place(error)}{_RENEW}")
    if isinstance(error, json.JSONDecodeError):
        return Failure(BAD_INPUT, f"A JSON file is damaged: {said}. {_place(error)}{_RENEW}")
    if "ArrowInvalid" in names:
        return Failure(BAD_INPUT, f"A Parquet file cannot be read: {said}. {_place(error)}{_RENEW}")
    if isinstance(error, OSError):
        return _explain_system(error, said)
    return None


_RENEW = "Restore it, or remove its folder and make it again. --log-level debug shows where."


def _find_refusal(error: BaseException) -> OSError | None:
    """Return what the machine refused, where a reader took it for damage of its input."""
    cause = error.__cause__ or error.__context__
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in _MACHINE:
            return cause
        cause = cause.__cause__ or cause.__context__
    return None


def _place(error: BaseException) -> str:
    """Return the notes that whoever read the file left on the error."""
    notes = getattr(error, "__notes__", [])
    return "".join(f"{note}. " for note in notes)


def _explain_missing_package(error: ModuleNotFoundError) -> Failure | None:
    package = (error.name or "").partition(".")[0]
    if not package or package == "distilclip":
        return None
    extra = EXTRA_OF_PACKAGE.get(package)
    install = f"pip install 'distilclip[{extra}]'" if extra else f"pip install {package}"
    return Failure(SYSTEM, f"The package {package} is not installed: {install}.")


def _explain_system(error: OSError, said: str) -> Failure:
    path = " and ".join(
        os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, str | bytes)
    )
    number = error.errno
    if number is None:  # from a storage that is no disk
        numbers = {FileNotFoundError: errno.ENOENT, PermissionError: errno.EACCES, FileExistsError: errno.EEXIST}
        number = next((number for kind, number in numbers.items() if isinstance(error, kind)), None)
        path = said
    if isinstance(error, ConnectionError | TimeoutError) or number is None:
        return Failure(SYSTEM, f"{type(error).__name__}: {said}. Check the network and the storage, {AGAIN}")
    return _explain_number(number, path or f"A file, here or in {tempfile.gettempdir()}", said)


def _explain_number(number: int, path: str, said: str) -> Failure:
    code, reason = _REASONS.get(number, (SYSTEM, f"{said}. Remedy its cause, {AGAIN}"))
    return Failure(code, f"{path}: {reason}")
