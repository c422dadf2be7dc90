"""What `import mmkd` offers, as Python and an editor see it."""

import ast
import dataclasses
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import Trainer
from trl.trainer.sft_trainer import SFTTrainer

import mmkd
from mmkd.training.method import METHODS

ROOT = Path(__file__).parents[2]


def imported_for_type_checkers() -> dict[str, str]:
    """Name -> module of the imports that only type checkers read."""
    (block,) = (
        node
        for node in ast.parse(Path(mmkd.__file__).read_text()).body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    )
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    assert all(alias.name == alias.asname for node in imports for alias in node.names), "not re-exported"
    return {alias.name: str(node.module) for node in imports for alias in node.names}


def test_type_checkers_see_the_names_that_python_gives() -> None:
    assert imported_for_type_checkers() == mmkd._MODULES
    assert sorted([*mmkd._MODULES, "__version__"]) == sorted(mmkd.__all__) == dir(mmkd)
    assert all(getattr(mmkd, name) is not None for name in mmkd.__all__)


def test_dir_and_completion_import_nothing_heavy() -> None:
    program = "import mmkd, sys, rlcompleter, json; sys.stdout.write(json.dumps([dir(mmkd), " + (
        "sorted({'torch', 'transformers', 'trl'} & set(sys.modules))]))"
    )
    names, heavy = json.loads(subprocess.run([sys.executable, "-c", program], capture_output=True, check=True).stdout)
    assert {"KDTrainer", "KDConfig", "SeveralTeachers", "UserError"} <= set(names)
    assert heavy == []


def parameters(function: type) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(function).parameters)


@pytest.mark.parametrize("method", list(METHODS))
def test_a_constructor_names_its_parameters_and_documents_each(method: str) -> None:
    trainer = METHODS[method].trainer
    for name, parameter in parameters(trainer).items():
        assert parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD), name
        assert parameter.annotation is not parameter.empty, name
    owner = next(base for base in trainer.__mro__ if "__init__" in vars(base))
    documented = [line.strip().partition(":")[0] for line in inspect.getdoc(owner).splitlines()]  # pyright: ignore
    assert [name for name in parameters(trainer) if name not in documented] == []


def test_constructors_take_what_trls_takes() -> None:
    """A parameter that is new upstream is taken too, or named here."""
    ours, theirs = parameters(mmkd.KDTrainer), parameters(SFTTrainer)
    # It would replace the loss, which is what a method is.
    assert theirs.keys() - ours.keys() == {"compute_loss_func"}
    assert ours.keys() - theirs.keys() == {"teacher", "teacher_processing_class"}
    assert all(ours[name].default == theirs[name].default for name in ours.keys() & theirs.keys())


def test_the_one_of_classes_takes_what_transformers_takes() -> None:
    ours, theirs = parameters(mmkd.DHOTrainer), parameters(Trainer)
    # It is DHO that says what a batch, the loss and the metrics are, and the model is made before.
    own = {"data_collator", "compute_loss_func", "compute_metrics", "preprocess_logits_for_metrics", "model_init"}
    assert theirs.keys() - ours.keys() == own
    assert ours.keys() - theirs.keys() == {"teacher", "test_dataset", "unseen"}


@pytest.mark.parametrize("method", list(METHODS))
def test_the_docstring_of_a_config_lists_its_fields(method: str) -> None:
    config = METHODS[method].config
    text = inspect.getdoc(config) or ""
    upstream = next(base for base in config.__mro__ if base.__module__.startswith(("trl.", "transformers.")))
    own = [field for field in dataclasses.fields(config) if field.init and field not in dataclasses.fields(upstream)]
    assert len(own) > 10
    for field in own:
        assert f"    {field.name} (`" in text, field.name
    assert upstream.__name__ in text.splitlines()[-1]


def test_a_field_that_a_method_declares_anew_is_documented_once() -> None:
    text = inspect.getdoc(mmkd.SFTBaselineConfig) or ""
    assert text.count("    ce_weight (`float`, from 0 to 1, defaults to `1.0`):\n        Always 1") == 1
    assert text.count("ce_weight (") == 1


def test_the_loss_cannot_be_replaced_from_outside(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="compute_loss_func"):
        mmkd.KDTrainer("student", "teacher", compute_loss_func=print)  # pyright: ignore[reportCallIssue]


@pytest.mark.slow
def test_a_script_of_a_user_type_checks_strictly() -> None:
    """pyright's run over the whole repository reads it too; here its mistakes are counted."""
    command = [sys.executable, "-m", "pyright", "--outputjson", "tests/api/user_script.py"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert json.loads(result.stdout)["generalDiagnostics"] == []
