"""Recipes drawn at random: each is refused, or every key of it is read as it was written."""

import json
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from mmkd.data.classification import ClassificationRecipe
from mmkd.data.data_recipe import DataRecipe
from mmkd.preflight.doctor import doctor
from mmkd.recipe.first_look import first_look
from mmkd.recipe.flags import recipe_of
from mmkd.recipe.key_parser import parser_of
from mmkd.recipe.launch_keys import launch_keys_of
from mmkd.recipe.recipe import STAGE_KEYS, Recipe
from mmkd.recipe.run import check_surroundings
from mmkd.schema import Field
from mmkd.shipped import recipe_root
from mmkd.yaml_files import read_yaml
from scripts.make_tiny_models import sentences
from tests.endurance.damage import Tally
from tests.endurance.random_recipes import alike, misread, mistaken

RUNS = sorted(path for path in recipe_root("trainers").glob("*/*.yaml"))
DATA = sorted(recipe_root("data_recipes").glob("*.yaml"))
CLASSES = sorted(recipe_root("data_recipes").glob("classification/*.yaml"))
SHORT = [pytest.param(150, id="short"), pytest.param(2000, id="long", marks=pytest.mark.slow)]


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty folder; variables that a recipe sets go with the test."""
    monkeypatch.chdir(tmp_path)
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def fields_of_method(content: dict[Any, Any]) -> dict[str, Field | None]:
    """The keys of a recipe's method, and what they take."""
    parser = parser_of(content.get("method", "kd"))
    return {name: parser.field(name) for name in parser.names}


def tried(
    name: str, paths: list[Path], names: Callable[[Any], dict[str, Any]], read: Callable[[], Any], count: int
) -> None:
    tally = Tally(f"{name}, seeds 0 to {count - 1}")
    for seed in range(count):
        chance = random.Random(seed)
        content = yaml.safe_load(chance.choice(paths).read_text(encoding="utf-8"))
        text = mistaken(content, names(content), chance)
        Path("recipe.yaml").write_text(text, encoding="utf-8")
        tally.try_(seed, text[:1500], read, lambda wrong: not wrong)
    tally.end()


def read_run() -> list[str]:
    """What of a recipe is read as something else than it says, in words."""
    first_look("./recipe.yaml", [])
    recipe = Recipe.read("./recipe.yaml")
    wrong = []
    for part in [recipe.stage(stage) for stage in recipe.stages] if recipe.in_stages else [recipe]:
        run = part.parse()
        check_surroundings(run)
        launch = launch_keys_of(parser_of(part.method).names) if part.accelerate_config is not None else ()
        beside = {*STAGE_KEYS, "env", "accelerate_config", *launch}
        wrong += misread(run, beside.__contains__)
    return wrong


@pytest.mark.parametrize("count", SHORT)
def test_a_random_recipe_is_refused_or_read_as_written(count: int) -> None:
    tried("random recipes", RUNS, fields_of_method, read_run, count)


PLAIN = ("config", "revision", "license", "homepage", "description", "image_folder", "image_urls", "eval_rows")
PLAIN += ("eval_fraction", "max_rows", "shuffle_seed", "splits", "rows", "label", "image", "text", "split_seed")


def read_data(kind: Any) -> list[str]:
    """What of a data recipe is read as something else than it says, in words."""
    recipe, keys = kind.load("./recipe.yaml"), read_yaml(Path("recipe.yaml"), as_written=True)
    unknown = [f"{key} is not read" for key in keys if key not in kind.__dataclass_fields__]
    held = {key: keys[key] for key in PLAIN if key in keys and key in kind.__dataclass_fields__}
    differ = {key: (given, getattr(recipe, key)) for key, given in held.items()}
    return unknown + [f"{key}: {pair}" for key, pair in differ.items() if not alike(*pair)]


@pytest.mark.parametrize("count", SHORT)
@pytest.mark.parametrize(("paths", "kind"), [(DATA, DataRecipe), (CLASSES, ClassificationRecipe)])
def test_a_random_data_recipe_is_refused_or_read_as_written(count: int, paths: list[Path], kind: Any) -> None:
    names = [name for name in kind.__dataclass_fields__ if name not in ("folder", "notes")]
    tried(f"random {kind.__name__}s", paths, lambda content: dict.fromkeys(names), lambda: read_data(kind), count)


def local_recipes(tiny: dict[str, Path]) -> list[Path]:
    """Recipes of several methods on models and rows that are here."""
    rows = [{"prompt": text, "completion": f" {text}"} for text in sentences(24)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common: dict[str, Any] = {"student": str(tiny["student"]), "data": "rows.jsonl", "output_dir": "run"}
    common |= {"max_length": 64, "max_steps": 4, "bf16": False, "report_to": "none", "learning_rate": 0.01}
    paths = []
    for method in ("kd", "sft", "taid", "alm"):
        path = Path(f"{method}.yaml")
        own = {"method": method, **common, **({} if method == "sft" else {"teacher": str(tiny["teacher"])})}
        path.write_text(yaml.safe_dump(own))
        paths.append(path)
    return paths


@pytest.mark.parametrize("count", [pytest.param(40, id="short"), pytest.param(500, id="long", marks=pytest.mark.slow)])
def test_a_random_recipe_goes_through_doctor(count: int, tiny: dict[str, Path]) -> None:
    """All checks before training, with models and rows: what cannot be is a finding or a UserError."""

    def examined() -> list[str]:
        first_look("./recipe.yaml", [])
        with open(os.devnull, "w") as sink:
            doctor(recipe_of("./recipe.yaml"), Console(file=sink))
        return []

    tried("random recipes in doctor", local_recipes(tiny), fields_of_method, examined, count)
