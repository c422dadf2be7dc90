"""Flags are keys: every spelling of them is one recipe, to every command and in all that is made of the recipe."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from mmkd.eval.trainings import make_baseline
from mmkd.methods.comd.round_recipes import write_round
from mmkd.recipe.flags import recipe_of
from mmkd.recipe.recipe import Recipe
from mmkd.recipe.stages import plan

PLAIN = {"method": "kd", "student": "s", "teacher": "t", "data": "d", "output_dir": "run"}
STAGED = PLAIN | {"stages": {"A": {"method": "sft", "learning_rate": 1e-3}, "B": {"max_steps": 2}}}
ROUNDS = {**PLAIN, "method": "comd", "round_method": "kd"}

# A key, what YAML would hold, and the ways to say that in words.
VALUES: list[tuple[str, Any, list[list[str]]]] = [
    ("learning_rate", 0.123, [["0.123"], [".123"], ["1.23e-1"]]),
    ("max_steps", 7, [["7"], ["+7"]]),
    ("warmup_steps", 0.5, [["0.5"], ["5e-1"]]),
    ("output_dir", "a b", [["a b"]]),
    ("run_name", "007", [["007"]]),
    ("save_strategy", "no", [["no"]]),
    ("report_to", "none", [["none"]]),
    ("bf16", False, [["false"], ["no"], ["0"]]),
    ("bf16", True, [[], ["true"], ["Yes"]]),
    ("use_cpu", True, [[], ["1"]]),
    ("student_layers", [0, 3], [["0", "3"], ["[0, 3]"]]),
    ("student_vision_layer", -3, [["-3"]]),
    ("lora_target_modules", ["q", "no"], [["q", "no"], ['["q", "no"]']]),
    ("lr_scheduler_kwargs", {"a": 1}, [['{"a": 1}'], ['{ "a" :1}']]),
    ("max_train_rows", None, [["null"], ["None"]]),
    ("resume_from_checkpoint", True, [["true"], ["True"]]),
    ("seed", 3, [["3"]]),
]


@st.composite
def spellings(draw: st.DrawFn) -> tuple[dict[str, Any], list[str], list[str]]:
    """Keys, and two command lines that say them: in the plainest way, and in any."""
    chosen = draw(st.lists(st.sampled_from(VALUES), min_size=1, max_size=5, unique_by=lambda value: value[0]))
    plain: list[str] = []
    spelled: list[str] = []
    for key, _, ways in chosen:
        plain += [f"--{key}", *ways[0]]
        words = draw(st.sampled_from(ways))
        name = draw(st.sampled_from([key, key.replace("_", "-")]))
        if draw(st.booleans()):
            # Said before in another way: the last one wins.
            _, _, others = draw(st.sampled_from([value for value in VALUES if value[0] == key]))
            spelled += [f"--{draw(st.sampled_from([key, key.replace('_', '-')]))}", *others[-1]]
        if words in (["false"], ["no"], ["0"]) and draw(st.booleans()):
            spelled += [draw(st.sampled_from([f"--no_{key}", f"--no-{name}"]))]
        elif len(words) == 1 and draw(st.booleans()):
            spelled += [f"--{name}={words[0]}"]
        else:
            spelled += [f"--{name}", *words]
    return {key: value for key, value, _ in chosen}, plain, spelled


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipes")
    for name, keys in {"plain": PLAIN, "staged": STAGED, "rounds": ROUNDS}.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(keys))
    return folder


@settings(derandomize=True, deadline=None, max_examples=60, database=None)
@given(said=spellings())
def test_every_spelling_is_the_recipe_with_these_keys(said: Any, folder: Path) -> None:
    keys, plain, spelled = said
    recipe = recipe_of(folder / "plain.yaml", spelled)
    assert recipe.given == keys
    assert recipe == recipe_of(folder / "plain.yaml", plain)
    # What processes are launched with, and what a comparison is kept under.
    assert recipe_of(recipe.name, recipe.command_line()[1:]) == recipe
    assert recipe_of(recipe.name, recipe.flags()).keys == {**PLAIN, **keys}
    written = recipe.write(folder / "written.yaml")
    assert Recipe.read(folder / "written.yaml").keys == written.keys == recipe.keys


@settings(derandomize=True, deadline=None, max_examples=8, database=None)
@given(said=spellings())
def test_every_spelling_gives_the_same_to_all_that_is_made_of_a_recipe(said: Any, folder: Path) -> None:
    for name, make in (("plain", of_comparison), ("staged", of_stages), ("rounds", of_rounds)):
        _, plain, spelled = said
        if name != "plain":
            plain, spelled = ([word for word in words] for words in (plain, spelled))
        assert make(recipe_of(folder / f"{name}.yaml", spelled), folder) == make(
            recipe_of(folder / f"{name}.yaml", plain), folder
        )


def of_comparison(recipe: Recipe, folder: Path) -> Any:
    made = make_baseline(recipe, folder)
    return made, vars(made.parse().training)["learning_rate"]


def of_stages(recipe: Recipe, folder: Path) -> Any:
    return [(stage.recipe, stage.identity) for stage in plan(recipe)]


def of_rounds(recipe: Recipe, folder: Path) -> Any:
    return write_round(recipe.parse(), folder / "round", {"student": "s"}, 1).keys
