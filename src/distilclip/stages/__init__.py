"""One file per stage: Config and main(config).

From Python a stage is called by its options, every one by its own name:

    result = dc.stages.balance(store="store", out="groups", metric="cosine", threshold=0.07)
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any

from distilclip.errors import did_you_mean
from distilclip.stage_calls import make_callable


class _Stages(ModuleType):
    """Imports a stage when it is asked for, and makes its module a function."""

    def __dir__(self) -> list[str]:
        names = [module.name for module in pkgutil.iter_modules(self.__path__)]
        return [name for name in names if not name.startswith("_")]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name not in dir(self):
            raise AttributeError(f"There is no stage {name!r}. {did_you_mean(name, dir(self))}")
        return importlib.import_module(f"{__name__}.{name}")

    def __setattr__(self, name: str, value: Any) -> None:
        # The import system sets each stage's module here once it is complete.
        if isinstance(value, ModuleType) and not name.startswith("_"):
            make_callable(value)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Stages

if TYPE_CHECKING:

    def __getattr__(name: str) -> Callable[..., dict[str, Any]]: ...
