"""Dependencies point one way: who may import whom in mmkd, read from the source without running any of it."""

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# The parts of mmkd from the ground up: each imports only parts before it.
ORDER = (
    "errors",
    "schema",
    "field_docs",
    "files",
    "units",
    "yaml_files",
    "schema_lines",
    "nested_keys",
    "shipped",
    "losses",
)
ORDER += ("alignment", "seams", "precision", "results", "data", "models", "cache", "teachers", "generation")
ORDER += (
    "preparation",
    "training",
    "recipe",
    "capture",
    "preflight",
    "methods",
    "export",
    "eval",
    "publish",
    "prepare",
)
ORDER += ("scaffold", "ui", "commands")

# Of the parts at the ground, more is asked: maths, paths and YAML know nothing of the rest.
NARROW = {"losses": {"errors"}, "alignment": {"errors"}, "yaml_files": {"errors"}, "schema_lines": set()}
NARROW |= {"shipped": {"errors", "schema_lines"}}

# Slow to import, or not installed with mmkd at all: a user of something else must not pay for them.
HEAVY = {"bitsandbytes", "flash_attn", "gguf", "liger_kernel", "lm_eval", "lmms_eval", "matplotlib", "ray", "scipy"}
HEAVY |= {"sklearn", "compressed_tensors", "llama_cpp", "llmcompressor", "onnx", "onnxruntime"}

# Absent on Windows, where one can train all the same.
POSIX = {"fcntl", "grp", "pwd", "resource", "termios"}


@dataclass(frozen=True)
class Import:
    """`source` imports `target`, a dotted name; `deferred` if that happens in a function or for type checkers only."""

    source: str
    target: str
    line: int
    deferred: bool

    def __str__(self) -> str:
        return f"{self.source}:{self.line} imports {self.target}"

    @property
    def package(self) -> str:
        return self.target.split(".")[0]


def imports_of(root: Path) -> list[Import]:
    """The imports of the mmkd in a folder, relative ones resolved; `from a import b` imports `a.b` for a module b."""
    paths = sorted(root.glob("mmkd/**/*.py"))
    modules = {module_name(path, root): path for path in paths}
    found = []
    for source, path in modules.items():
        parents = source.split(".") if path.name == "__init__.py" else source.split(".")[:-1]
        for node, deferred in import_nodes(ast.parse(path.read_text()), deferred=False):
            if isinstance(node, ast.Import):
                targets = [alias.name for alias in node.names]
            else:
                above = parents[: len(parents) - node.level + 1] if node.level else []
                base = ".".join([*above, *([node.module] if node.module else [])])
                names = [f"{base}.{alias.name}" for alias in node.names]
                # A name that is no module of ours counts as its module, but for those of mmkd itself, which tell apart
                # the version (anyone's) from what mmkd gathers from all its parts.
                targets = [name if name in modules or base == "mmkd" else base for name in names]
            found += [Import(source, target, node.lineno, deferred) for target in targets]
    return found


def module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def import_nodes(node: ast.AST, deferred: bool) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, deferred
        elif isinstance(child, ast.If) and ast.unparse(child.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}:
            yield from import_nodes(ast.Module(child.body, []), True)
            yield from import_nodes(ast.Module(child.orelse, []), deferred)
        else:
            in_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from import_nodes(child, deferred or in_function)


def part_of(module: str) -> str:
    """The part of mmkd that a module belongs to: `models` for `mmkd.models.heads`, nothing for `mmkd` itself."""
    return module.split(".")[1] if "." in module else ""


def wrong_directions(imports: list[Import]) -> list[str]:
    """Imports of one part of mmkd by another that may not."""
    return [
        str(item)
        for item in imports
        if item.package == "mmkd" and item.target != "mmkd.__version__"
        for part, other in [(part_of(item.source), part_of(item.target))]
        if part and other != part and not may_import(part, other)
    ]


def may_import(part: str, other: str) -> bool:
    # What mmkd itself gathers from all parts is on top of them.
    if part not in ORDER or other not in ORDER:
        return False
    return ORDER.index(other) < ORDER.index(part) and (part not in NARROW or other in NARROW[part])


def circles(imports: list[Import]) -> list[list[str]]:
    """Parts of mmkd that import each other, over however many others in between; deferred imports count too."""
    below: dict[str, set[str]] = {}
    for item in imports:
        part, other = part_of(item.source), part_of(item.target)
        if item.package == "mmkd" and part and other and part != other:
            below.setdefault(part, set()).add(other)
    sorter = TopologicalSorter(below)
    try:
        sorter.prepare()
    except CycleError as error:
        return [error.args[1]]
    return []


def foreign_packages(imports: list[Import]) -> list[str]:
    """Imports of packages ruled out for losses, alignment (no transformers) and shipped (yaml only).

    Losses are torch only, and scipy for the assignment of visual tokens, which torch has not.
    """
    light = {"losses": {"torch", "jaxtyping", "scipy"}, "shipped": {"yaml"}}
    return [
        str(item)
        for item in imports
        if item.package != "mmkd" and item.package not in sys.stdlib_module_names
        for part in [part_of(item.source)]
        if (part in light and item.package not in light[part])
        or (part == "alignment" and item.package == "transformers")
    ]


def method_crossings(imports: list[Import], methods: set[str]) -> list[str]:
    """Imports of a method's modules by those of another method."""

    def method_of(module: str) -> str | None:
        name = module.removeprefix("mmkd.methods.").split(".")[0]
        return next((method for method in methods if name == method or name.startswith(f"{method}_")), None)

    return [
        str(item)
        for item in imports
        if item.source.startswith("mmkd.methods.") and item.target.startswith("mmkd.methods.")
        for target in [method_of(item.target)]
        if target is not None and method_of(item.source) != target
    ]


def eager_or_forbidden(imports: list[Import]) -> list[str]:
    """Imports of vllm anywhere, and of heavy packages and POSIX where importing the module would import them."""
    late = HEAVY | POSIX
    return [str(item) for item in imports if item.package == "vllm" or (item.package in late and not item.deferred)]


@pytest.fixture(scope="module")
def imports() -> list[Import]:
    found = imports_of(ROOT)
    assert any(item.source == "mmkd.losses.fused" and item.package == "torch" for item in found), "nothing was read"
    return found


def test_parts_import_only_the_parts_below_them(imports):
    assert wrong_directions(imports) == []


def test_parts_import_each_other_in_no_circle(imports):
    assert circles(imports) == []


def test_a_circle_over_three_parts_is_found():
    chain = [("run", "eval"), ("eval", "report"), ("report", "run")]
    (found,) = circles([Import(f"mmkd.{a}.x", f"mmkd.{b}", 1, True) for a, b in chain])
    assert {*found} == {"run", "eval", "report"}


def test_losses_alignment_and_shipped_keep_to_light_packages(imports):
    assert foreign_packages(imports) == []


def test_methods_never_import_each_other(imports):
    # A method is what has a folder of recipes; that every method has one is another test's business.
    methods = {path.name for path in (ROOT / "trainers").iterdir() if path.is_dir()}
    assert method_crossings(imports, methods) == []


def test_vllm_is_never_imported_and_heavy_packages_only_when_needed(imports):
    assert eager_or_forbidden(imports) == []


@pytest.mark.parametrize(
    ("module", "statement"),
    [
        ("losses/fused.py", "from mmkd.models.heads import LMHead"),
        ("losses/fused.py", "from ..models import heads"),
        ("alignment/spans.py", "import mmkd.losses.divergences"),
        ("models/load.py", "def load():\n    from mmkd.teachers import base"),
        ("models/load.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from mmkd.training import base"),
        ("teachers/local.py", "from mmkd import training"),
        ("teachers/local.py", "from mmkd import DistillationTrainer"),
        ("data/__init__.py", "from ..models.heads import LMHead"),
        ("training/base.py", "from mmkd.commands import main"),
        ("publish/report.py", "from ..commands import main"),
        ("shipped.py", "from mmkd.data import rows"),
        ("nowhere/new.py", "from mmkd.losses import fused"),
    ],
)
def test_an_import_against_the_direction_is_found(tmp_path, module, statement):
    assert len(wrong_directions(read(tmp_path, module, statement))) == 1


@pytest.mark.parametrize(
    ("module", "statement"),
    [
        ("losses/fused.py", "from .divergences import forward_kl"),
        ("losses/__init__.py", "from .fused import fused_loss"),
        ("losses/__init__.py", "from . import fused"),
        ("teachers/store.py", "from mmkd import __version__"),
        ("teachers/local.py", "from mmkd.models.heads import LMHead"),
        ("data/mixture.py", "from mmkd.shipped import find_recipe"),
        ("methods/kd.py", "from mmkd.training.base import DistillationTrainer"),
        ("commands/main.py", "from mmkd import training"),
        ("__init__.py", "from mmkd.methods.kd import KDTrainer"),
    ],
)
def test_an_import_in_the_direction_is_none_of_our_business(tmp_path, module, statement):
    assert wrong_directions(read(tmp_path, module, statement)) == []


@pytest.mark.parametrize(
    ("module", "statement", "complaints"),
    [
        ("losses/fused.py", "import numpy as np", 1),
        ("losses/fused.py", "import math, torch.nn.functional", 0),
        ("alignment/vocab.py", "def f():\n    from transformers import AutoTokenizer", 1),
        ("alignment/vocab.py", "import numpy", 0),
        ("shipped.py", "import yaml", 0),
        ("shipped.py", "import datasets", 1),
        ("models/load.py", "import transformers", 0),
    ],
)
def test_packages_of_the_light_parts(tmp_path, module, statement, complaints):
    assert len(foreign_packages(read(tmp_path, module, statement))) == complaints


@pytest.mark.parametrize(
    ("module", "statement", "complaints"),
    [
        ("methods/taid.py", "from mmkd.methods.kd import KDTrainer", 1),
        ("methods/taid.py", "from . import kd", 1),
        ("methods/taid.py", "def f():\n    import mmkd.methods.kd", 1),
        ("methods/taid/run.py", "from mmkd.methods.kd.loss import kd", 1),
        ("methods/kd_config.py", "from .kd import KDTrainer", 0),
        ("methods/taid.py", "from .shared import pairs", 0),
    ],
)
def test_methods_apart(tmp_path, module, statement, complaints):
    assert len(method_crossings(read(tmp_path, module, statement), {"kd", "taid"})) == complaints


@pytest.mark.parametrize(
    ("statement", "complaints"),
    [
        ("import bitsandbytes", 1),
        ("try:\n    import lm_eval.api\nexcept ImportError:\n    pass", 1),
        ("class Plot:\n    import matplotlib.pyplot as plt", 1),
        ("if TYPE_CHECKING:\n    import ray", 0),
        ("if TYPE_CHECKING:\n    pass\nelse:\n    import ray", 1),
        ("def plot():\n    import matplotlib.pyplot as plt", 0),
        ("def serve():\n    from vllm import LLM", 1),
        ("import raybeam", 0),
        ("import fcntl", 1),
        ("def lock():\n    import fcntl", 0),
    ],
)
def test_heavy_packages_and_vllm(tmp_path, statement, complaints):
    assert len(eager_or_forbidden(read(tmp_path, "eval/suites.py", statement))) == complaints


def read(root: Path, module: str, statement: str) -> list[Import]:
    """The imports of an mmkd in which `module` consists of `statement` and only the method kd exists besides."""
    for name, text in {"methods/kd.py": "", module: statement}.items():
        file = root / "mmkd" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return imports_of(root)
