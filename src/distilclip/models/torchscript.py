"""Reads the tensors of a TorchScript archive without loading it as a program.

`torch.jit.load` runs code of the archive: a class in it may have a `__setstate__`, and that can overwrite files.
OpenAI published its models in this form. The archive is a zip with one pickle, in which modules are objects of unknown
classes and tensors point to raw storages. Here the modules become inert records, and any other name is refused.
"""

from __future__ import annotations

import pickle
import zipfile
from pathlib import PurePath
from typing import Any, BinaryIO

import torch
from torch import Tensor

STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_NO_STATE = ("attn_mask", "training")  # attributes that are no weights: the first is a tensor


def is_archive(file: BinaryIO) -> bool:
    """Return whether an open file is a TorchScript archive: a zip that also holds the constants of its code."""
    if not zipfile.is_zipfile(file):
        return False
    with zipfile.ZipFile(file) as archive:
        return any(PurePath(name).name == "constants.pkl" for name in archive.namelist())


def read_state(file: BinaryIO) -> dict[str, Tensor]:
    """Return the parameters and buffers of an open TorchScript archive by their dotted names, on the CPU.

    Raises:
        pickle.UnpicklingError: the archive is damaged, or its pickle names anything but modules and tensors.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            records = [name for name in archive.namelist() if PurePath(name).name == "data.pkl"]
            if len(records) != 1:
                raise pickle.UnpicklingError(f"{len(records)} records data.pkl in the archive instead of one")
            with archive.open(records[0]) as record:
                root = _ModulesAndTensors(record, archive, records[0].removesuffix("data.pkl")).load()
    except (zipfile.BadZipFile, KeyError, EOFError, IndexError, TypeError, ValueError, RuntimeError) as error:
        raise pickle.UnpicklingError(f"the archive is damaged ({error})") from error
    if not isinstance(root, _Module):
        raise pickle.UnpicklingError("the archive holds no module")
    state: dict[str, Tensor] = {}
    _collect(root, "", state, above=())
    return state


class _Module:
    """An object of the archive: its attributes, and nothing that runs."""

    def __init__(self) -> None:
        self.attributes: dict[Any, Any] = {}

    def __setstate__(self, state: Any) -> None:
        self.attributes = state if isinstance(state, dict) else {}


class _ModulesAndTensors(pickle.Unpickler):
    """Unpickles modules as records and tensors from the archive's storages; refuses every other name."""

    def __init__(self, record: Any, archive: zipfile.ZipFile, folder: str) -> None:
        super().__init__(record)
        self.archive = archive
        self.folder = folder
        self.storages: dict[str, Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] == "__torch__":
            return _Module
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        allowed = {
            ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
            ("collections", "OrderedDict"): dict,
            ("torch.jit._pickle", "restore_type_tag"): _first,
            **{("torch.jit._pickle", f"build_{kind}list"): _first for kind in ("int", "double", "bool", "tensor")},
        }
        if (module, name) not in allowed:
            raise pickle.UnpicklingError(f"its pickle names {module}.{name}, which is neither a module nor a tensor")
        return allowed[module, name]

    def persistent_load(self, pid: Any) -> Tensor:
        kind, dtype, key, _, count = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype) or "/" in key:
            raise pickle.UnpicklingError(f"its pickle points to {pid!r}, which is no storage")
        if key not in self.storages:
            content = self.archive.read(f"{self.folder}data/{key}")
            if len(content) != count * dtype.itemsize:
                raise pickle.UnpicklingError(f"storage {key} has {len(content)} bytes instead of {count} values")
            self.storages[key] = torch.frombuffer(bytearray(content), dtype=dtype) if count else torch.empty(0)
        return self.storages[key]


def _first(value: Any, *_: Any) -> Any:
    return value


def _rebuild_tensor(storage: Tensor, offset: int, size: Any, stride: Any, *_: Any) -> Tensor:
    """Return the tensor that a storage, an offset and a shape describe; torch refuses what lies outside the storage."""
    return torch.as_strided(storage, tuple(size), tuple(stride), offset).clone()


def _collect(module: _Module, prefix: str, state: dict[str, Tensor], *, above: tuple[_Module, ...]) -> None:
    """Add a module's tensors, and those of the modules in it, to `state`."""
    if any(module is outer for outer in above):
        raise pickle.UnpicklingError(f"module {prefix or 'root'!r} holds itself")
    for name, value in module.attributes.items():
        if isinstance(value, Tensor) and name not in _NO_STATE:
            state[f"{prefix}{name}"] = value
        elif isinstance(value, _Module):
            _collect(value, f"{prefix}{name}.", state, above=(*above, module))
