"""Recipes whose student is trained quantised: what doctor, estimate and dry run say, and what is made of them."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from mmkd.commands.main import main
from mmkd.errors import UserError
from mmkd.eval.model import find_model
from mmkd.preflight.doctor import examine
from mmkd.preflight.dry_run import dry_run
from mmkd.preflight.estimate import estimate_memory
from mmkd.publish.run_sides import sides_of
from mmkd.publish.runs import read_run
from mmkd.recipe.recipe import Recipe
from mmkd.recipe.run import build_token_trainer


@pytest.fixture
def keys(keys: dict[str, Any]) -> dict[str, Any]:
    """Of a run whose student is trained quantised."""
    return {**keys, "student_quantization": "int4"}


def findings(keys: dict[str, Any]) -> dict[str, tuple[str, str]]:
    found = examine(Recipe.of(keys, "own.yaml").parse())
    return {finding.severity: (finding.message, finding.advice) for finding in found if finding.name == "quantisation"}


def test_doctor_says_what_is_quantised(keys: dict[str, Any]) -> None:
    (message, _) = findings(keys)["ok"]
    assert message.startswith("The student is trained as int4 weights (groups of 32): 14 linear layers with ")
    adapted = findings({**keys, "use_peft": True})
    assert adapted["warning"][0].startswith("lora_dropout is not applied")
    assert "cannot be cut into groups of 24" in findings({**keys, "student_quantization_group": 24})["problem"][0]
    assert "ok" in findings({**keys, "use_peft": True, "use_dora": True})
    nothing = {key: value for key, value in keys.items() if key != "student_quantization"}
    assert findings(nothing) == {}


def test_what_is_rounded_is_counted_in_memory(keys: dict[str, Any]) -> None:
    def activations(**more: Any) -> float:
        return estimate_memory(Recipe.of({**keys, "bf16": False, **more}, "own.yaml").parse())["activations"]

    assert activations() > activations(student_quantization=None)
    # With autocast each of the two keeps its weights in bf16.
    assert activations(bf16=True) == activations(bf16=True, student_quantization=None)
    # The default; what is rounded is then there for one layer at a time.
    assert activations() < activations(activation_checkpointing=False)


def test_a_dry_run_says_what_is_quantised(keys: dict[str, Any]) -> None:
    console = Console(record=True, width=200)
    dry_run(Recipe.of(keys, "own.yaml").parse(), console)
    assert "int4 weights (groups of 32): 14 linear layers" in console.export_text()


@pytest.mark.parametrize("method", ["dho", "clip_kd", "tower_kd", "trans_encoder"])
def test_methods_whose_students_have_no_such_format_do_not_take_the_key(keys: dict[str, Any], method: str) -> None:
    with pytest.raises(UserError, match=f"method {method} does not know. Methods over tokens have it"):
        Recipe.of({**keys, "method": method}, "own.yaml").without("max_length").parse()


def test_a_student_is_rounded_once(keys: dict[str, Any]) -> None:
    run = Recipe.of({**keys, "use_peft": True, "load_in_4bit": True}, "own.yaml").parse()
    with pytest.raises(UserError, match="round the weights when they are loaded"):
        build_token_trainer(run)


def test_the_command_trains_and_its_student_is_known_by_its_format(
    keys: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "own.yaml"
    recipe.write_text(yaml.safe_dump({**keys, "student_quantization": "fp8", "save_strategy": "no"}))
    assert main(["train", str(recipe)]) == 0
    capsys.readouterr()
    assert find_model(keys["output_dir"]).trained_as == "fp8 weights and activations (a scale per row)"
    # That which chats and writes samples.
    sides = sides_of(read_run(Path(keys["output_dir"])))
    sides["student"].generator()
    assert "computes as it was trained: fp8" in capsys.readouterr().err
    assert main(["push", keys["output_dir"], "--repo", "ORG/NAME", "--dry_run", "--license", "mit"]) == 0
    card = Path(capsys.readouterr().out.strip(), "README.md").read_text()
    assert "| Trained as | fp8 weights and activations (a scale per row) |" in card
    assert "quantise it in the same format" in card
