"""Private names of other packages are used in mmkd/seams alone, and packages with such uses are capped."""

import ast
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from transformers import Trainer
from trl.trainer.sft_trainer import SFTTrainer

ROOT = Path(__file__).resolve().parents[2]
# Of transformers' there are four.
SEAMS = {path.stem.removesuffix("_seam") for path in (ROOT / "mmkd/seams").glob("*_seam.py")}
SEAMS -= {"trainer", "decoding", "processor"}

# Public all the same: those of NamedTuple, what transformers' documentation has models override, and the type of what
# `add_subparsers` gives, which has no other name.
PUBLIC = {"_replace", "_asdict", "_fields", "_init_weights", "_SubParsersAction"}

# Modules without documentation, or whose documentation is about other names than ours.
UNDOCUMENTED = (
    "accelerate.commands",
    "accelerate.utils.fsdp_utils",
    "accelerate.utils.memory",
    "datasets.builder",
    "datasets.utils.file_utils",
    "deepspeed.runtime",
    "deepspeed.utils",
    "lm_eval.api",
    "peft.tuners",
    "peft.utils",
    "torch._subclasses",
    "transformers.conversion_mapping",
    "transformers.convert_slow_tokenizer",
    "transformers.integrations",
    "transformers.models.",
    "transformers.utils.chat_template_utils",
)


def private_uses(source: str, own: set[str]) -> list[str]:
    """Private names of other objects, and imports of modules that are not documented, with their lines."""
    uses = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            of_itself = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            if not of_itself and node.attr not in own | PUBLIC:
                uses.append(f"{node.lineno}: {ast.unparse(node)}")
        modules = [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
        modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        uses += [f"{node.lineno}: {name}" for name in modules if name.startswith(UNDOCUMENTED)]  # pyright: ignore
    return uses


def names_defined(source: str) -> set[str]:
    """Private names that the classes and functions of a module define themselves."""
    tree = ast.parse(source)
    functions = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    stored = {
        node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
    }
    fields = {ast.unparse(node.target) for node in ast.walk(tree) if isinstance(node, ast.AnnAssign)}
    return functions | stored | fields


def overridden(source: str) -> list[str]:
    """Private methods of transformers' and TRL's trainers that a trainer of ours overrides."""
    theirs = {name for name in (*vars(Trainer), *vars(SFTTrainer)) if name.startswith("_") and name[1] != "_"}
    trainers = [
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ClassDef) and any(ast.unparse(base).endswith("Trainer") for base in node.bases)
    ]
    methods = [member for node in trainers for member in node.body if isinstance(member, ast.FunctionDef)]
    return [f"{method.lineno}: {method.name}" for method in methods if method.name in theirs]


def test_private_names_of_others_stand_in_the_seams() -> None:
    paths = [path for path in sorted(ROOT.glob("mmkd/**/*.py")) if path.parent.name != "seams"]
    sources = {path: path.read_text() for path in paths}
    found = {
        str(path.relative_to(ROOT)): uses
        for path, source in sources.items()
        if (uses := [*private_uses(source, names_defined(source)), *overridden(source)])
    }
    assert found == {}


@pytest.mark.parametrize(
    ("line", "count"),
    [
        ("rows = dataset._indices", 1),
        ("class A(Trainer):\n    def f(self):\n        return super()._wrap_model()", 1),
        ("from accelerate.commands.launch import launch_command", 1),
        ("import deepspeed.runtime.zero", 1),
        ("pair = pair._replace(a=1)", 0),
        ("class A:\n    def f(self, other):\n        return self._x + other._y\n    def _y(self): ...", 0),
        ("from transformers import Trainer", 0),
    ],
)
def test_private_uses_are_found(line: str, count: int) -> None:
    assert len(private_uses(line, names_defined(line))) == count


def test_overridden_private_methods_are_found() -> None:
    assert overridden("class A(B, SFTTrainer):\n    def _wrap_model(self): ...") == ["2: _wrap_model"]
    assert overridden("class A(B):\n    def _wrap_model(self): ...") == []


def test_packages_with_private_uses_are_capped_where_they_were_tested() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    lines = [*project["dependencies"], *extras["deepspeed"], *extras["export"], *extras["quant"]]
    asked = {requirement.name.replace("-", "_"): requirement for requirement in map(Requirement, lines)}
    for package in SEAMS | {"trl", "transformers"}:
        bounds = asked[package].specifier
        assert any(bound.operator == "<" for bound in bounds), f"{package} has no upper bound"
        assert package == "deepspeed" or version(package).split("+")[0] in bounds
