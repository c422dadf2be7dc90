"""Makes transformers know mmkd's models in any process that imports mmkd, without importing transformers for it.

Models register where `mmkd.models.dual_head` is imported. That takes torch and transformers, seconds that
`mmkd --help` need not wait for, and a published model's card says `import mmkd` and nothing else. Hence a finder of
modules, by which Python lets packages take part in imports: ours follow the auto classes, whoever imports those.
"""

import importlib
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType

_AUTO_CLASSES = "transformers.models.auto.modeling_auto"
_MODELS = "mmkd.models.dual_head"


def register_models() -> None:
    """Registers the dual-head models with the auto classes: now if those are loaded, else when they will be."""
    if _AUTO_CLASSES in sys.modules:
        importlib.import_module(_MODELS)
    elif _AutoClasses not in sys.meta_path:
        sys.meta_path.insert(0, _AutoClasses)


class _AutoClasses:
    """Finds the module of the auto classes in its file, once."""

    @classmethod
    def find_spec(
        cls, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _AUTO_CLASSES:
            return None
        sys.meta_path.remove(cls)
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _ThenOurs(spec.loader.name, spec.loader.path)
        return spec


class _ThenOurs(SourceFileLoader):
    """Loads the module as Python would, and ours after it."""

    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        importlib.import_module(_MODELS)
