"""Makes transformers know mmkd's models in any process that imports mmkd, without importing transformers for it."""

import importlib
import importlib.abc
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_AUTO_CLASSES = "transformers.models.auto.modeling_auto"
_MODELS = "mmkd.models.dual_head"


def register_models() -> None:
    """Registers the dual-head models with the auto classes: now if those are loaded, else when they will be."""
    if _AUTO_CLASSES in sys.modules:
        importlib.import_module(_MODELS)
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the module of the auto classes as it is, and sees to it that ours is imported right after it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _AUTO_CLASSES:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            execute = loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                importlib.import_module(_MODELS)

            loader.exec_module = exec_module
        return spec
