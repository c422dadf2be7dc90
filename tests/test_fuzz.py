"""Recipes with random mistakes: each is read, or refused with a UserError, and none ends in a traceback."""

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from mmkd.data.classification import ClassificationRecipe
from mmkd.data.data_recipe import DataRecipe
from mmkd.errors import UserError
from mmkd.recipe.key_parser import KeyParser
from mmkd.recipe.recipe import Recipe
from mmkd.recipe.run import check_surroundings
from mmkd.shipped import recipe_root
from mmkd.training.method import METHODS

ODD = [None, True, False, 0, -1, 1, 2.5, 1e30, 10**30, -(10**30), float("inf"), float("nan"), "", " ", "auto", "no"]
ODD += ["none", "null", "1e-3", "12:30", "Teacher", "lehrer-ü", "教師", "a\nb", "{a", "[1", "{}", "x" * 3000, [], [1]]
ODD += [[None], ["a"], [["a"]], [[]], {}, {"a": 1}, {1: 2}, {"a": {"b": [1]}}, {None: 1}, [{"a": 1}], "../..", "\0"]
RUNS = sorted(path for path in recipe_root("trainers").glob("*/*.yaml"))
DATA = sorted(recipe_root("data_recipes").glob("*.yaml"))
CLASSES = sorted(recipe_root("data_recipes").glob("classification/*.yaml"))
SHORT = [pytest.param(60, id="short"), pytest.param(2000, id="long", marks=pytest.mark.slow)]


def mistaken(content: dict[Any, Any], names: list[str], chance: random.Random) -> str:
    """The YAML of a recipe with one to three mistakes."""
    content = {**content}
    for _ in range(chance.randint(1, 3)):
        key = chance.choice([*content, *chance.sample(names, 3)])
        match chance.randrange(7):
            case 0:
                content.pop(key, None)
            case 1:
                content[key.upper()] = content.get(key)
            case 2:
                content[chance.choice(["ß", "lerning_rate", "", 3, None, "a b"])] = chance.choice(ODD)
            case 3 if isinstance(content.get(key), dict) and content[key]:
                inner = chance.choice(list(content[key]))
                content[key] = {**content[key], inner: chance.choice(ODD)}
            case 4 if isinstance(content.get(key), list) and content[key]:
                content[key] = [*content[key], chance.choice(ODD)]
            case 5:
                content[key] = [content.get(key)]
            case _:
                content[key] = chance.choice(ODD)
    text = yaml.safe_dump(content, allow_unicode=True, sort_keys=False)
    if chance.random() < 0.1:
        lines = text.splitlines(keepends=True)
        text += chance.choice(lines)
    return text


def tracebacks(paths: list[Path], names: Callable[[dict[str, Any]], list[str]], read: Any, count: int) -> list[str]:
    """The errors that reading has ended in, other than UserError, with the YAML."""
    ended = []
    for seed in range(count):
        chance = random.Random(seed)
        content = yaml.safe_load(chance.choice(paths).read_text(encoding="utf-8"))
        text = mistaken(content, names(content), chance)
        Path("recipe.yaml").write_text(text, encoding="utf-8")
        try:
            read("./recipe.yaml")
        except UserError:
            continue
        except Exception as error:
            ended.append(f"{seed}: {type(error).__name__}: {str(error)[:200]}\n{text[:800]}")
    return ended


def read_run(name: str) -> None:
    recipe = Recipe.read(name)
    stages = recipe.stages if recipe.in_stages else {}
    for part in [recipe.stage(stage) for stage in stages] or [recipe]:
        check_surroundings(part.parse())


@pytest.mark.parametrize("count", SHORT)
def test_no_mistake_in_a_recipe_is_a_traceback(count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    before = dict(os.environ)
    parsers = {name: KeyParser(name).names for name in METHODS}
    try:
        ended = tracebacks(RUNS, lambda content: parsers[content.get("method", "kd")], read_run, count)
    finally:
        os.environ.clear()
        os.environ.update(before)
    assert not ended, "\n\n".join(ended)


@pytest.mark.parametrize("count", SHORT)
@pytest.mark.parametrize(("paths", "kind"), [(DATA, DataRecipe), (CLASSES, ClassificationRecipe)])
def test_no_mistake_in_a_data_recipe_is_a_traceback(
    count: int, paths: list[Path], kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = [name for name in kind.__dataclass_fields__ if name != "folder"]
    ended = tracebacks(paths, lambda content: names, kind.load, count)
    assert not ended, "\n\n".join(ended)
