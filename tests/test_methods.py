"""A method is complete: module, card, recipe, test, public names."""

import ast
import dataclasses
import io
import warnings
from pathlib import Path

import pytest
from rich.console import Console
from transformers import Trainer, TrainingArguments
from trl.trainer.sft_config import SFTConfig

import mmkd
from mmkd.methods.kd import KDConfig
from mmkd.recipe.arguments import StudentArguments
from mmkd.recipe.flags import recipe_of
from mmkd.recipe.key_help import ALL, print_keys
from mmkd.recipe.key_parser import KeyParser
from mmkd.training.base import DistillationTrainer
from mmkd.training.config import DistillationConfig
from mmkd.training.method import METHODS

ROOT = Path(__file__).parents[1]
CLASSES = {"dho", "tower_kd", "clip_kd", "trans_encoder"}
"""Methods that predict something else than tokens."""
OWN_WEIGHTS = {"features": "patch_cosine_weight", "embeddings": "clip_weight"}
"""A key of the weight of a term, by what a method predicts; ce_weight for the others."""


def test_one_name_of_a_module_is_no_pattern() -> None:
    """trl makes text of a list of one, in which PEFT then finds no module."""
    for given, found in ((["q_proj"], ["q_proj"]), (["all-linear"], "all-linear"), ([".*q_proj"], ".*q_proj")):
        assert StudentArguments(lora_target_modules=given).lora_target_modules == found


def branches_on_a_method(source: str) -> list[str]:
    """The comparisons of something called a method with the name of one."""
    compared = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Compare)]
    return [
        ast.unparse(node)
        for node in compared
        if "method" in ast.unparse(node)
        and any(isinstance(part, ast.Constant) and part.value in METHODS for part in ast.walk(node))
    ]


def test_nothing_branches_on_the_name_of_a_method_outside_of_its_package() -> None:
    assert branches_on_a_method('if run.arguments.method == "dho":\n    pass')
    assert branches_on_a_method('baseline = list(student.methods) == ["sft"]')
    paths = [path for path in ROOT.glob("mmkd/**/*.py") if "methods" not in path.relative_to(ROOT).parts]
    assert len(paths) > 100
    assert {str(path): branches for path in paths if (branches := branches_on_a_method(path.read_text()))} == {}


@pytest.mark.parametrize("method", list(METHODS))
def test_a_method_has_all_its_parts(method: str) -> None:
    assert any((ROOT / "mmkd" / "methods" / name).exists() for name in (method, f"{method}.py"))
    assert (ROOT / "tests" / "trainers" / f"test_{method}.py").is_file()
    assert (ROOT / "trainers" / method / "README.md").is_file()
    assert list((ROOT / "trainers" / method).glob("*.yaml"))


@pytest.mark.parametrize("method", list(METHODS))
def test_trainer_and_config_are_public(method: str) -> None:
    trainer, config = METHODS[method].trainer, METHODS[method].config
    assert getattr(mmkd, trainer.__name__) is trainer
    assert getattr(mmkd, config.__name__) is config
    # A method that predicts no tokens is a Trainer of transformers.
    assert issubclass(trainer, Trainer if method in CLASSES else DistillationTrainer)
    assert issubclass(config, TrainingArguments if method in CLASSES else DistillationConfig)


@pytest.mark.parametrize(
    "path", sorted((ROOT / "trainers").glob("*/*.yaml")), ids=lambda path: "/".join(path.parts[-2:])
)
def test_every_shipped_recipe_parses(path: Path) -> None:
    run = recipe_of(str(path), []).parse()
    assert run.arguments.method == path.parent.name


@pytest.mark.parametrize("method", list(METHODS))
def test_every_field_says_what_it_does(method: str) -> None:
    inherited = {field.name for field in dataclasses.fields(SFTConfig)}
    inherited |= {field.name for field in dataclasses.fields(TrainingArguments)}
    for field in dataclasses.fields(METHODS[method].config):
        assert field.name in inherited or len(field.metadata.get("help", "")) > 20, field.name


@pytest.mark.parametrize("method", list(METHODS))
def test_help_lists_every_key(method: str) -> None:
    page = io.StringIO()
    print_keys(Console(file=page, width=80), method, [ALL])
    text = page.getvalue()
    assert all(f"--{name}  " in text for name in KeyParser(method).names)
    weight = OWN_WEIGHTS.get(METHODS[method].predicts, "ce_weight") if method != "trans_encoder" else "cycles"
    assert all(f"--{name}" in text for name in ("student_layers", weight, "use_peft", "learning_rate"))


@pytest.mark.parametrize("given", [{}, {"gradient_checkpointing": False}, {"activation_checkpointing": False}])
def test_a_sound_config_warns_of_nothing(given: dict[str, bool], tmp_path: Path) -> None:
    """trl sets its default of activation checkpointing by a name that transformers warns of."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = KDConfig(output_dir=str(tmp_path), **given)  # pyright: ignore[reportArgumentType]
    assert config.activation_checkpointing is config.gradient_checkpointing is (not given)
