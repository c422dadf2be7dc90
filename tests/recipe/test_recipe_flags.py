"""Flags are keys: every spelling of them is one recipe, to every command and in all that is made of the recipe."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from mmkd.commands.main import main
from mmkd.errors import UserError
from mmkd.eval.baselines import make_baseline
from mmkd.methods.comd.round_recipes import write_round
from mmkd.recipe.flags import recipe_of
from mmkd.recipe.recipe import Recipe
from mmkd.recipe.stages import plan, train_stages
from tests.helpers import environment

PLAIN = {"method": "kd", "student": "s", "teacher": "t", "data": "d", "output_dir": "run"}
PLAIN |= {"student_init": "prune", "student_layers": 2}
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
    for key, value, ways in chosen:
        plain += [f"--{key}", *ways[0]]
        words = draw(st.sampled_from(ways))
        name = draw(st.sampled_from([key, key.replace("_", "-")]))
        if draw(st.booleans()):
            # Said before in another way: the last one wins.
            _, _, others = draw(st.sampled_from([value for value in VALUES if value[0] == key]))
            spelled += [f"--{draw(st.sampled_from([key, key.replace('_', '-')]))}", *others[-1]]
        if value is False and draw(st.booleans()):
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


@settings(derandomize=True, deadline=None, max_examples=30, database=None)
@given(said=spellings())
def test_every_spelling_is_the_recipe_with_these_keys(said: Any, folder: Path) -> None:
    keys, plain, spelled = said
    recipe = recipe_of(folder / "plain.yaml", spelled)
    assert recipe.overrides == keys
    assert recipe == recipe_of(folder / "plain.yaml", plain)
    # What processes are launched with, and what a comparison is kept under.
    assert recipe_of(recipe.name, recipe.command_line()[1:]) == recipe
    assert recipe_of(recipe.name, recipe.flags()).keys == {**PLAIN, **keys}
    written = recipe.write(folder / "written.yaml")
    assert Recipe.read(folder / "written.yaml").keys == written.keys == recipe.keys


@settings(derandomize=True, deadline=None, max_examples=6, database=None)
@given(said=spellings())
def test_every_spelling_gives_the_same_to_all_that_is_made_of_a_recipe(said: Any, folder: Path) -> None:
    _, plain, spelled = said
    for name, make in (("plain", of_comparison), ("staged", of_stages), ("rounds", of_rounds)):
        path = folder / f"{name}.yaml"
        assert make(recipe_of(path, spelled), folder) == make(recipe_of(path, plain), folder)


def of_comparison(recipe: Recipe, folder: Path) -> Any:
    baseline = make_baseline(recipe, folder / "baseline.yaml", folder)
    assert {**recipe.overrides, **baseline.overrides} == recipe.overrides
    return baseline


def of_stages(recipe: Recipe, folder: Path) -> Any:
    return [(stage.recipe, stage.identity) for stage in plan(recipe)]


def of_rounds(recipe: Recipe, folder: Path) -> Any:
    return write_round(recipe.parse(), folder / "round", {"student": "s"}, 1).keys


COMMANDS = {
    ("train", "RECIPE"): "mmkd.commands.train.train",
    ("train", "RECIPE", "--help-keys"): "mmkd.recipe.key_help.print_keys_of",
    ("train", "RECIPE", "--with-baseline"): "mmkd.commands.compare_command.with_baseline",
    ("cache", "build", "RECIPE"): "mmkd.commands.cache_actions.build_cache",
    ("doctor", "RECIPE"): "mmkd.preflight.doctor.doctor",
    ("plan", "RECIPE", "--memory", "8"): "mmkd.preflight.plan.plan",
    ("compare", "RECIPE", "--seeds", "0"): "mmkd.eval.compare.compare",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_reads_the_same_recipe(
    command: tuple[str, ...], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flags of launching too, and those of the command itself in either spelling."""
    seen: list[Any] = []

    def stop(recipe: Any, *args: Any, **options: Any) -> int:
        seen.append(recipe[0] if isinstance(recipe, list) else recipe)
        raise UserError("seen")

    monkeypatch.setattr(COMMANDS[command], stop)
    path = str(folder / "plain.yaml")
    words = [path if word == "RECIPE" else word for word in command]
    first = [
        "--learning-rate",
        "0.123",
        "--accelerate-config",
        "ddp",
        "--num-processes=2",
        "--student-layers",
        "0",
        "3",
    ]
    second = ["--student_layers=[0, 3]", "--num_processes", "2", "--learning_rate=.123", "--accelerate_config=ddp"]
    assert [main([*words, *first]), main([*words, *second])] == [2, 2]
    assert seen[0] == seen[1] == recipe_of(path, first)
    assert seen[0].overrides == {"learning_rate": 0.123, "student_layers": [0, 3]}
    assert seen[0].launch == {"accelerate_config": "ddp", "num_processes": "2"}


def test_the_baseline_of_a_comparison_learns_at_the_rate_of_its_student(folder: Path) -> None:
    """In 0.1 it lost flags with dashes, so that the student had been trained in another way."""
    recipe = recipe_of(folder / "plain.yaml", ["--learning-rate", "0.123", "--ce-weight", "0.5"])
    baseline = make_baseline(recipe, folder / "baseline.yaml", folder)
    assert baseline.method == "sft"
    assert baseline.parse().training.learning_rate == 0.123
    assert "ce_weight" not in baseline.keys


def test_stages_are_where_a_flag_says_and_read_from_there(folder: Path) -> None:
    trained: list[Recipe] = []

    def train(recipe: Recipe) -> int:
        trained.append(recipe)
        return 0

    there = folder / "there"
    recipe = recipe_of(folder / "staged.yaml", ["--output-dir", str(there)])
    assert train_stages(recipe, train, lambda stages: None) == 0
    assert [stage.keys["output_dir"] for stage in trained] == [str(there / "1-A"), str(there / "2-B")]
    assert trained[1].keys["student"] == str(there / "1-A")
    assert Recipe.read(there / "2-B" / "recipe.yaml").keys == trained[1].keys


def test_a_round_has_a_folder_of_its_own(folder: Path) -> None:
    flags = ["--output-dir", "elsewhere", "--learning-rate", "0.123", "--rounds", "2"]
    recipe = recipe_of(folder / "rounds.yaml", flags)
    made = write_round(recipe.parse(), folder / "round", {"student": "s"}, 1)
    assert made.keys["output_dir"] == str(folder / "round" / "student")
    assert made.parse().training.learning_rate == 0.123


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--learning-rate"], "--learning-rate stands there without a value"),
        (["--max_steps", "1", "2"], "2 is no flag of method kd; write --key value"),
        (["--max_steps=1", "2"], "2 is no flag of method kd; write --key value"),
        (["--no_bf16", "true"], "true is no flag of method kd"),
        (["--num_processes", "2"], "--num_processes is no flag of method kd"),
        (["--stages", "A"], "has no stages"),
        (["--lr_scheduler_kwargs", "{a: 1}"], "--lr_scheduler_kwargs is no JSON"),
    ],
)
def test_words_that_say_nothing_are_refused(flags: list[str], said: str, folder: Path) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        recipe_of(folder / "plain.yaml", flags)


def test_a_recipe_is_not_changed_by_what_is_made_of_it(folder: Path) -> None:
    recipe = recipe_of(folder / "staged.yaml", ["--seed", "1"])
    before = (dict(recipe.written), dict(recipe.overrides))
    other = recipe.with_(seed=2).without("teacher")
    assert (other.keys["seed"], "teacher" in other.keys) == (2, False)
    recipe.keys["seed"] = 3
    assert recipe.stage("A").keys == {**PLAIN, "method": "sft", "learning_rate": 1e-3, "seed": 1}
    assert (recipe.written, recipe.overrides) == before


BEFORE: list[tuple[str, ...]] = [
    ("train", "--max_steps", "2", "RECIPE"),
    ("train", "--max-steps", "2", "RECIPE"),
    ("train", "--max_steps", "2", "--seed", "1", "RECIPE"),
    ("train", "--accelerate_config", "ddp", "--max_steps", "2", "RECIPE"),
    ("train", "--run_name=a b", "RECIPE"),
    # Which of the two is the recipe cannot be seen.
    ("train", "--output_dir", "RECIPE", "RECIPE"),
    ("cache", "build", "--max_steps", "2", "RECIPE"),
    ("cache", "verify", "--max_steps", "2", "RECIPE"),
    ("cache", "push", "--max_steps", "2", "RECIPE", "me/cache"),
    ("doctor", "--max_steps", "2", "RECIPE"),
    ("plan", "--gpu", "L4", "--max_steps", "2", "RECIPE"),
    ("compare", "--max_steps", "2", "RECIPE", "RECIPE"),
]


@pytest.mark.parametrize("command", BEFORE, ids=" ".join)
def test_a_value_before_the_recipe_is_not_taken_for_the_recipe(
    command: tuple[str, ...], folder: Path, capsys: pytest.CaptureFixture
) -> None:
    path = str(folder / "plain.yaml")
    assert main([path if word == "RECIPE" else word for word in command]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search("mmkd: --(max_steps|run_name|output_dir) stands before the recipe", line)
    assert "Put the recipe first" in line


@pytest.mark.parametrize(
    "words",
    [
        ["train", "--dry_run", "--max_steps=2", "RECIPE"],
        ["train", "--max_steps=2", "--dry-run", "RECIPE"],
        ["train", "--max_steps=2", "RECIPE", "--dry_run"],
        ["train", "--accelerate_config", "ddp", "RECIPE", "--dry_run", "--max_steps", "2"],
    ],
    ids=" ".join,
)
def test_what_can_only_be_read_in_one_way_may_stand_before_the_recipe(
    words: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Recipe] = []
    monkeypatch.setattr("mmkd.commands.train.train", lambda recipe: seen.append(recipe) or 0)
    assert main([str(folder / "plain.yaml") if word == "RECIPE" else word for word in words]) == 0
    (recipe,) = seen
    assert recipe.overrides == {"dry_run": True, "max_steps": 2}


def test_help_and_parsing_wait_for_no_heavy_package() -> None:
    """Torch alone takes seconds, which `mmkd --help` and a mistyped command need not cost."""
    script = (
        "import sys\n"
        "from mmkd.commands.main import main\n"
        "for words in (['--help'], ['train', '--help'], ['cache', 'verify', '--help'], ['env', '--nonsense']):\n"
        "    try:\n"
        "        main(words)\n"
        "    except SystemExit:\n"
        "        pass\n"
        "print({'torch', 'trl', 'transformers', 'numpy', 'rich', 'yaml'} & {*sys.modules})\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment(), capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "set()"
