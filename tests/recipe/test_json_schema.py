"""The JSON Schemas: current, valid, true of every shipped file, and never more lenient than mmkd's own readers."""

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from mmkd.commands.main import main
from mmkd.data.classification import ClassificationRecipe
from mmkd.data.data_recipe import DataRecipe
from mmkd.errors import UserError
from mmkd.recipe.key_parser import parser_of
from mmkd.recipe.key_reference import keys_of
from mmkd.recipe.recipe import Recipe
from mmkd.schema_lines import SCHEMAS, schema_line, without_schema_line
from mmkd.shipped import copy_recipe, recipe_root
from mmkd.training.method import METHODS
from mmkd.yaml_files import read_yaml
from scripts.make_schemas import schemas

ROOT = Path(__file__).parents[2]
KD = {"method": "kd", "student": "s", "teacher": "t", "data": "d", "output_dir": "run"}
SHIPPED = [
    *(("recipe", path) for path in sorted(recipe_root("trainers").rglob("*.yaml"))),
    *(("data_recipe", path) for path in sorted(recipe_root("data_recipes").glob("*.yaml"))),
    *(("class_data_recipe", path) for path in sorted(recipe_root("data_recipes").glob("*/*.yaml"))),
]
VALUES = [None, True, 3, -1, 0.5, 1.5, "text", ["text"], [-1], {"a": 1}]


@functools.cache
def validator(kind: str) -> Draft202012Validator:
    schema = json.loads((SCHEMAS / f"{kind}.schema.json").read_text())
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


def allows(kind: str, keys: Any) -> bool:
    return validator(kind).is_valid(keys)


def test_the_schemas_are_those_of_the_fields() -> None:
    """After a change of a key: python -m scripts.make_schemas."""
    assert {path.name for path in SCHEMAS.iterdir()} == {*schemas()}
    for name, text in schemas().items():
        assert (SCHEMAS / name).read_text() == text, f"{name} is old: run python -m scripts.make_schemas"


@pytest.mark.parametrize("kind, path", SHIPPED, ids=lambda value: getattr(value, "stem", value))
def test_every_shipped_file_fits_the_schema_that_it_names(kind: str, path: Path) -> None:
    first = path.read_text().splitlines()[0]
    named = first.removeprefix("# yaml-language-server: $schema=")
    assert (path.parent / named).resolve() == SCHEMAS / f"{kind}.schema.json"
    problems = [f"{error.json_path}: {error.message}" for error in validator(kind).iter_errors(read_yaml(path))]
    assert not problems


@pytest.mark.parametrize("method", METHODS)
def test_a_schema_takes_no_value_that_mmkd_refuses(method: str) -> None:
    """And refuses none that mmkd takes, but for texts in the place of others and numbers in the place of texts."""
    parser = parser_of(method)
    # What methods share is tried with the first.
    keys = [key for key in keys_of(method) if key.field is not None and (key.method or method == "kd")]
    for key in keys:
        if key.name in ("method", "teachers", "features", "fsdp", "fsdp_config"):
            continue
        for value in VALUES:
            try:
                parser.read_value(key.name, value)
                mine = True
            except UserError:
                mine = False
            schema = allows("recipe", {"method": method, "data": "d", key.name: value})
            number_as_text = mine and isinstance(value, int | float | list) and "text" not in str(value)
            assert schema == mine or number_as_text, (key.name, value)


@pytest.mark.parametrize(
    "change, fits",
    [
        ({}, True),
        ({"temperature": 2, "divergence": "jsd", "learning_rate": 1e-4}, True),
        ({"features": "tower"}, True),
        ({"features": ["every_nth", {"student": "norm", "teacher": {"a": "norm"}, "kind": "mse", "weight": 2}]}, True),
        ({"features": {"teacher": "norm"}}, False),
        ({"features": [{"student": "norm", "kind": "l2"}]}, False),
        ({"features": [{"student": "norm", "on": "answer"}]}, False),
        ({"features": [["norm"]]}, False),
        ({"student_init": "prune", "student_layers": 4, "resume_from_checkpoint": True}, True),
        ({"student_init": "prune", "student_layers": [0, 3]}, True),
        ({"tempratur": 2}, False),
        ({"temperature": 0}, False),
        ({"temperature": "hot"}, False),
        ({"divergence": "kl"}, False),
        ({"ce_weight": 1.5}, False),
        ({"per_device_train_batch_size": 0}, False),
        # A key of another method.
        ({"t_start": 0.4}, False),
        ({"method": "taid", "t_start": 0.4}, True),
        ({"method": "taid", "t_start": -0.4}, False),
        ({"method": "kdd"}, False),
        ({"env": {"HF_HUB_OFFLINE": "1"}}, True),
        ({"env": ["HF_HUB_OFFLINE"]}, False),
        ({"num_processes": 2}, False),
        ({"num_processes": 2, "accelerate_config": "ddp"}, True),
        ({"fsdp": "full_shard"}, False),
        ({"teacher": None, "teachers": {"A": {"teacher": "a"}, "B": {"teacher_cache": "b", "weight": 2}}}, True),
        ({"teacher": None, "teachers": {"A": {"teacher": "a"}, "B": {"teacher": "b", "wieght": 2}}}, False),
        ({"teacher": None, "teachers": {"A": {"teacher": "a"}}}, False),
        ({"max_steps": None}, False),
        ({"max_length": None}, True),
    ],
    ids=str,
)
def test_schema_and_parser_agree_on_recipes(change: dict[str, Any], fits: bool) -> None:
    keys = {**KD, **change}
    assert allows("recipe", keys) is fits
    try:
        Recipe.of(keys, "recipe.yaml").parse()
        parsed = True
    except UserError:
        parsed = False
    assert parsed is fits


@pytest.mark.parametrize("missing", ["method", "data"])
def test_what_must_be_set_is_required(missing: str) -> None:
    assert not allows("recipe", {key: value for key, value in KD.items() if key != missing})


@pytest.mark.parametrize(
    "stages, fits",
    [
        ({"A": {"method": "sft", "max_steps": 2}, "B": {"temperature": 2, "t_start": 0.2}}, True),
        ({"A": {"method": "sft", "trainable": None}}, True),
        ({"A": {"method": "sft", "temperature": 2}}, False),
        ({"A": {"method": "sft", "max_stps": 2}}, False),
        ({"A": {"max_steps": "many"}}, False),
        ({"A": ["sft"]}, False),
        ({}, False),
    ],
    ids=str,
)
def test_stages_are_checked_by_their_methods(stages: dict[str, Any], fits: bool) -> None:
    shared = {key: value for key, value in KD.items() if key not in ("method", "data")}
    assert allows("recipe", {**shared, "stages": stages}) is fits


ROWS = {"source": "json", "data_files": {"train": "rows.jsonl"}}


@pytest.mark.parametrize(
    "keys, fits",
    [
        (ROWS, True),
        ({**ROWS, "eval_rows": 100, "shuffle_seed": 3, "columns": {"prompt": "{q}", "completion": "a"}}, True),
        (
            {**ROWS, "columns": {"messages": {"column": "c", "role_key": "from", "role_map": {"gpt": "assistant"}}}},
            True,
        ),
        ({**ROWS, "columns": {"messages": {"user": "{q}", "assistant": "{a}"}}}, True),
        ({**ROWS, "columns": {"messages": {"column": "c", "role_map": {"gpt": "model"}}}}, False),
        ({**ROWS, "filters": {"min_chars": 5, "dedupe": True}}, True),
        ({**ROWS, "filters": {"min_chars": -5}}, False),
        ({**ROWS, "filters": {"minchars": 5}}, False),
        ({**ROWS, "eval_row": 100}, False),
        ({**ROWS, "eval_rows": 0}, False),
        ({**ROWS, "eval_rows": "many"}, False),
        ({**ROWS, "columns": {"promt": "q"}}, False),
        ({**ROWS, "splits": {"train": "train", "dev": "test"}}, False),
        ({**ROWS, "description": 3}, False),
        ({"description": "Rows of nowhere."}, False),
        ({"mixture": [{"data": "gsm8k", "weight": 1}, {"data": "python_docs", "rows": 50}]}, None),
        ({"mixture": [{"data": "gsm8k", "wieght": 1}]}, False),
        ({"mixture": []}, False),
    ],
    ids=str,
)
def test_schema_and_reader_agree_on_data_recipes(keys: dict[str, Any], fits: bool | None, tmp_path: Path) -> None:
    path = tmp_path / "rows.yaml"
    path.write_text(yaml.safe_dump(keys))
    assert allows("data_recipe", keys) is (fits is not False)
    try:
        DataRecipe.load(path)
        read = True
    except UserError:
        read = False
    # What mixes columns that do not go together is a matter of the recipes and not of this file.
    assert fits is None or read is fits


CLASSES = {"source": "ORG/NAME", "image": "image"}


@pytest.mark.parametrize(
    "keys, fits",
    [
        (CLASSES, True),
        ({**CLASSES, "class_names": ["cat", "dog"], "validation_per_class": 4}, True),
        ({**CLASSES, "text": "text"}, False),
        ({"source": "ORG/NAME"}, False),
        ({"image": "image"}, False),
        ({**CLASSES, "prompts": ["a photo"]}, False),
        ({**CLASSES, "validation_per_class": 0}, False),
        ({**CLASSES, "splits": {"train": "train", "dev": "test"}}, False),
        ({**CLASSES, "lable": "y"}, False),
    ],
    ids=str,
)
def test_schema_and_reader_agree_on_recipes_of_classes(keys: dict[str, Any], fits: bool, tmp_path: Path) -> None:
    path = tmp_path / "classes.yaml"
    path.write_text(yaml.safe_dump(keys))
    assert allows("class_data_recipe", keys) is fits
    try:
        ClassificationRecipe.load(path)
        read = True
    except UserError:
        read = False
    assert read is fits


def test_a_copy_names_the_schema_of_the_installed_mmkd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, kind, schema in (
        ("kd/quickstart", "trainers", "recipe"),
        ("gsm8k", "data_recipes", "data_recipe"),
        ("classification/dtd", "data_recipes", "class_data_recipe"),
    ):
        copy = copy_recipe(name, tmp_path / "mine" / f"{schema}.yaml", kind)
        lines = copy.read_text().splitlines()
        assert lines[0] == f"# yaml-language-server: $schema={SCHEMAS / schema}.schema.json"
        assert sum("yaml-language-server" in line for line in lines) == 1


def test_a_schema_beside_the_file_is_named_by_a_relative_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(SCHEMAS.parents[1])
    named = "# yaml-language-server: $schema=../../mmkd/_schemas/recipe.schema.json\n"
    assert schema_line("recipe", "runs/kd/recipe.yaml") == named


def test_a_path_with_a_space_is_written_as_a_uri(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmkd.schema_lines.SCHEMAS", tmp_path / "my env")
    assert schema_line("recipe", "/elsewhere/recipe.yaml").endswith("/my%20env/recipe.schema.json\n")


def test_the_line_says_nothing_of_the_run(tmp_path: Path) -> None:
    """Comparisons are found by a recipe's text, stages by its keys."""
    path = tmp_path / "recipe.yaml"
    written = Recipe.of(KD, path).write(path, "Mine.")
    assert path.read_text() == schema_line("recipe", path) + written.text
    again = Recipe.read(path)
    assert (again.text, again.keys) == (written.text, written.keys)
    assert "yaml-language-server" not in again.text
    assert without_schema_line(again.text) == again.text


def test_the_command_prints_what_is_installed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "schema", "data_recipe"]) == 0
    assert capsys.readouterr().out == schemas()["data_recipe.schema.json"]
