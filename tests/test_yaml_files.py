"""YAML that users write: text stays as it was written, no key is lost, errors say where."""

from pathlib import Path
from typing import Any

import pytest

from mmkd.data.classification import ClassificationRecipe
from mmkd.data.data_recipe import DataRecipe
from mmkd.errors import UserError
from mmkd.recipe.flags import recipe_of
from mmkd.recipe.recipe import Recipe
from mmkd.recipe.stages import plan
from mmkd.yaml_files import read_yaml

DATA = "source: json\ndata_files: {train: a.jsonl}\n"


def data_recipe(folder: Path, text: str) -> DataRecipe:
    (folder / "data.yaml").write_text(DATA + text)
    return DataRecipe.load(folder / "data.yaml")


WORDS = ["no", "yes", "On", "off", "00501", "0x1F", "1e-3", "2024-01-31", "12:30", "1_000", "2.50", ".inf"]


@pytest.mark.parametrize("word", WORDS)
def test_text_stays_as_it_was_written(tmp_path: Path, word: str) -> None:
    recipe = data_recipe(
        tmp_path, f"name: {word}\ncolumns: {{text: {word}}}\nfilters: {{equals: {{{word}: {word}}}}}\n"
    )
    assert (recipe.name, recipe.columns["text"]) == (word, word)
    assert dict(recipe.filters.equals) == {word: word}


def test_numbers_and_switches_are_read_as_before(tmp_path: Path) -> None:
    text = "columns: {text: t}\nmax_rows: 1_000\neval_fraction: 1e-3\nrows: {train: 2_000}\n"
    recipe = data_recipe(tmp_path, text + "filters: {dedupe: yes, drop_empty: off, equals: {n: 3, ok: true}}\n")
    assert (recipe.max_rows, recipe.eval_fraction, recipe.rows) == (1000, 0.001, {"train": 2000})
    assert (recipe.filters.dedupe, recipe.filters.drop_empty) == (True, False)
    assert recipe.filters.equals == {"n": 3, "ok": True}
    (tmp_path / "mix.yaml").write_text("mixture: [{data: ./data.yaml, weight: 0.50, domain: no}]\n")
    part = DataRecipe.load(tmp_path / "mix.yaml").mixture[0]
    assert (part.weight, part.domain) == (0.5, "no")


def test_merged_mappings_may_repeat_keys(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("base: &base {a: yes, b: 1}\nours:\n  <<: *base\n  b: 2\n")
    assert read_yaml(tmp_path / "a.yaml", as_written=True)["ours"] == {"a": "yes", "b": 2}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("columns: {text: a}\nmax_rows: 3\nmax_rows: 4\n", "key 'max_rows' stands in line 4 and again in line 5"),
        ("columns: {text: a, text: b}\n", "key 'text' stands in line 3 and again in line 3"),
        ("columns: {text: a\nmax_rows: [1\n", r"data.yaml is not valid YAML: line \d, column \d+: "),
        ("columns: {text: a}\nname: 3\n", "name is 3, but must be text; to mean the text, write name: '3'"),
        ("columns: {text: true}\n", "columns.text is True; .* To mean a column of this name, write 'True'"),
    ],
)
def test_recipes_of_data_say_what_is_wrong_and_where(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        data_recipe(tmp_path, text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("method: kd\nseed: 1\nmethod: sft\n", "key 'method' stands in line 1 and again in line 3"),
        ("method: kd\nenv: {A: yes}\n", "env.A is text that YAML reads as True; put it in quotes"),
        ("method: kd\nenv: {A: 00501}\n", "env.A is text that YAML reads as 321"),
    ],
)
def test_recipes_of_runs_say_what_is_wrong_and_where(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        Recipe.read(tmp_path / "run.yaml")


def test_names_of_classes_stay_text(tmp_path: Path) -> None:
    keys = "image: i\nsource: json\ndata_files: {train: a}\nsplits: {train: train}\nsplit_seed: 1_0\n"
    recipe: Any = tmp_path / "data.yaml"
    recipe.write_text(keys + "class_names: [no, yes, 007, 2.50, 3]\n")
    loaded = ClassificationRecipe.load(recipe)
    assert (loaded.class_names, loaded.split_seed) == (("no", "yes", "007", "2.50", "3"), 10)
    recipe.write_text(keys + "class_names: [a, null]\n")
    with pytest.raises(ValueError, match="class_names has None, which YAML does not read as text; put it in quotes"):
        ClassificationRecipe.load(recipe)


RUN = "method: kd\ndata: d\nteacher: t\n"


@pytest.mark.parametrize("word", [*WORDS, "7", "1e3", "-0"])
def test_text_of_runs_stays_as_it_was_written(tmp_path: Path, word: str) -> None:
    keys = f"student: a/{word}\nrun_name: {word}\noutput_dir: {word}\ntrainable: [{word}, x]\n"
    (tmp_path / "run.yaml").write_text(f"{RUN}{keys}optim_target_modules: {word}\nlora_target_modules: [{word}, x]\n")
    run = recipe_of(str(tmp_path / "run.yaml")).parse()
    training: Any = run.training
    assert (training.run_name, training.output_dir, training.optim_target_modules) == (word,) * 3
    assert training.trainable == [word, "x"]
    assert run.student.lora_target_modules == [word, "x"]


@pytest.mark.parametrize("word", ["no", "007", "1e3", "2024-01-31", "12:30"])
def test_text_of_stages_survives_their_recipes(tmp_path: Path, word: str) -> None:
    stages = f"stages:\n  A: {{run_name: {word}, student: {word}, save_strategy: no, max_steps: 1_0}}\n"
    (tmp_path / "run.yaml").write_text(f"{RUN}report_to: none\noutput_dir: {tmp_path}/run\n{stages}")
    (stage,) = plan(Recipe.read(tmp_path / "run.yaml"))
    stage.record(["A"], finished=False)
    for run in (stage.parse({}), recipe_of(stage.recipe.place).parse()):
        assert (run.training.run_name, run.arguments.student) == (word, word)
        assert (run.training.save_strategy, run.training.max_steps) == ("no", 10)


def test_what_is_no_text_is_read_as_before(tmp_path: Path) -> None:
    keys = "student: s\nbf16: no\nmax_steps: 0x10\nlearning_rate: 1e-3\nseed: 1_0\nresume_from_checkpoint: yes\n"
    kwargs = "model_init_kwargs: {a: no, b: 2024-01-31, c: 010}\n"
    plain = f"{RUN}{keys}{kwargs}beta: 1\nmax_length: ~\n"
    (tmp_path / "run.yaml").write_text(plain)
    assert Recipe.read(tmp_path / "run.yaml").keys == read_yaml(tmp_path / "run.yaml")
    training: Any = recipe_of(str(tmp_path / "run.yaml")).parse().training
    assert (training.bf16, training.max_steps, training.learning_rate, training.seed) == (False, 16, 0.001, 10)
    assert (training.resume_from_checkpoint, training.max_length) == (True, None)
    assert training.model_init_kwargs["c"] == 8


@pytest.mark.parametrize("keys", ["run_name: true", "student: 7", "output_dir: false", "teacher_dtype: True"])
def test_truth_is_no_text(tmp_path: Path, keys: str) -> None:
    (tmp_path / "run.yaml").write_text(f"{RUN}{keys}\n")
    with pytest.raises(UserError, match="in quotes"):
        recipe_of(str(tmp_path / "run.yaml")).parse()
