"""Recipes drawn at random: keys that there are with values of every kind, keys that there are not, and broken YAML."""

import enum
import json
import math
import random
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

import yaml

from mmkd.recipe.recipe import Run
from mmkd.schema import Field

NUMBERS = [0, -1, 1, 2, 3, 7, 0.5, 2.5, -0.0, 1e-9, 1e30, -1e30, 10**30, -(10**30), 2**63, 2**31, 1e308, 5e-324]
NUMBERS += [math.inf, -math.inf, math.nan]
TEXTS = ["", " ", "auto", "no", "yes", "on", "off", "none", "null", "~", "true", "False", "1e-3", "1_000", "0x10"]
TEXTS += ["010", "12:30", "2024-02-30", "1.5.2", "Teacher", "lehrer-ü", "教師", "\u202eabc", "a\nb", "a\tb", "\x85"]
TEXTS += ["{a", "[1", "{}", "[]", '{"a": 1}', "[1, 2]", "x" * 3000, "../..", "/", "~/x", "file:///x", "http://", "%s"]
TEXTS += ["python:os:system", "steps", "epoch", "bf16", "float8", "cuda:99", "self", "kd", "${HOME}", "{{ 7 * 7 }}"]
NESTED: list[Any] = [None, True, False, [], [1], [None], ["a"], [["a"]], [[]], {}, {"a": 1}, {1: 2}, {None: 1}]
NESTED += [{"": ""}, {"a": {"b": [1]}}, [{"a": 1}], [1, "a", None], {"weight": 1}]
NESTED += [{"a": {"teacher": "x", "weight": math.nan}}]
MISSPELT = ["ß", "lerning_rate", "", 3, None, "a b", "Method", "methode", "teacher.name", "--seed", "stages ", True]
LINES = ["\t- x", "a: [", "? x", "<<: *nobody", "&a b: *a", "!!python/object/apply:os.system ['true']: 1"]
LINES += [
    "a: !!set {}",
    "seed: !!int x",
    "'",
    "%YAML 9.9",
    "---",
    "...",
    "a: b: c",
    "data: |\n  x\n y",
    "x: !!binary x",
]
LINES += ["x: !!timestamp 2024-02-30", "[" * 2000, "a: &x [*x, *x]", "seed: 0o17", "- " * 500 + "x"]


def odd(chance: random.Random, depth: int = 0) -> Any:
    """A value of any kind."""
    kind = chance.random()
    if kind < 0.35:
        return chance.choice(NUMBERS)
    if kind < 0.7:
        return chance.choice(TEXTS)
    if kind < 0.9 or depth > 3:
        return chance.choice(NESTED)
    if kind < 0.95:
        return [odd(chance, depth + 1) for _ in range(chance.randrange(4))]
    return {str(odd(chance, 9)): odd(chance, depth + 1) for _ in range(chance.randrange(3))}


def fitting(field: Field, chance: random.Random) -> Any:
    """A value of the kind that a key takes, in one of the ways in which it may be written."""
    kind = chance.choice([kind for kind in field.kinds if kind in (bool, int, float, str, list, dict)] or [str])
    if field.choices and chance.random() < 0.8:
        return str(getattr(own := chance.choice(list(field.choices)), "value", own))
    if kind is bool:
        return chance.choice((True, False, "true", "no", 0, 1))
    if kind is str:
        return chance.choice(("a", "1", "x/y", "rows.jsonl", chance.choice(TEXTS)))
    if kind is list:
        return chance.choice(([], ["a"], [1], "a", [0.5, 0.5], "[1, 2]"))
    if kind is dict:
        return chance.choice(({}, {"a": 1}, '{"a": 0.5}', {"a": "b"}))
    number = chance.choice((0, 1, 2, 8, 64)) if kind is int else chance.choice((0.0, 0.1, 0.5, 1.0, 2.0, 1e-4))
    return number if chance.random() < 0.7 else str(number)


def mistaken(content: Mapping[Any, Any], names: Mapping[str, Field | None], chance: random.Random) -> str:
    """The YAML of a recipe with one to five changes."""
    content = {**content}
    for _ in range(chance.choice((1, 1, 1, 2, 2, 3, 5))):
        key = chance.choice([*content, *chance.sample(list(names), min(4, len(names)))])
        match chance.randrange(10):
            case 0:
                content.pop(key, None)
            case 1:
                content[str(key).upper() if chance.random() < 0.5 else f"{key}s"] = content.get(key)
            case 2:
                content[chance.choice(MISSPELT)] = odd(chance)
            case 3 if isinstance(content.get(key), dict) and content[key]:
                inner = chance.choice(list(content[key]))
                content[key] = {**content[key], inner: odd(chance)}
            case 4 if isinstance(content.get(key), list) and content[key]:
                content[key] = [*content[key], odd(chance)]
            case 5:
                content[key] = [content.get(key)]
            case 6:
                content[key] = {"a": content.get(key)}
            case 7 if isinstance(content.get(key), int | float):
                content[key] = str(content[key]) if chance.random() < 0.5 else -content[key]
            case _:
                field = names.get(key)
                content[key] = odd(chance) if field is None or chance.random() < 0.5 else fitting(field, chance)
    text = yaml.safe_dump(content, allow_unicode=True, sort_keys=chance.random() < 0.5)
    if chance.random() < 0.15:
        lines = text.splitlines(keepends=True)
        lines.insert(chance.randrange(len(lines) + 1), chance.choice([*LINES, chance.choice(lines)]) + "\n")
        text = "".join(lines)
    return text


def misread(run: Run, beside: Callable[[str], bool]) -> list[str]:
    """The keys of a recipe that its run does not hold as they were written; `beside` says which others read."""
    holders = (run.arguments, run.training, run.student, run.cache)
    held = {field.name: getattr(holder, field.name) for holder in holders for field in fields(holder)}
    return [
        f"{key}: {given!r:.80} is read as {held.get(key, 'nothing')!r:.80}"
        for key, given in run.recipe.keys.items()
        # `teacher: self` is the student by its own name; where there is no GPU, use_cpu is true.
        if not beside(key) and not (key == "teacher" and run.itself) and key != "use_cpu"
        if key not in held or not alike(given, held[key])
    ]


def alike(given: Any, read: Any) -> bool:
    """Whether a value says what was written, in the type of its key."""
    read = read.value if isinstance(read, enum.Enum) else read
    if isinstance(given, float) and isinstance(read, int | float) and math.isnan(given):
        return math.isnan(read)
    if given == read and isinstance(given, bool) == isinstance(read, bool):
        return True
    if given in ("none", ["none"]) and read == []:
        # Of report_to.
        return True
    if read == "no" and given in (False, "false"):
        # Of include_num_input_tokens_seen, which takes words too.
        return True
    if isinstance(read, dict) and read and not isinstance(given, dict) and not str(given).startswith("{"):
        # One value for all names of a mapping.
        return all(alike(given, own) for own in read.values())
    if isinstance(read, list | tuple):
        values = given if isinstance(given, list | tuple) else [given]
        return len(values) == len(read) and all(map(alike, values, read))
    if isinstance(read, dict) and isinstance(given, dict):
        return given.keys() == read.keys() and all(alike(given[key], read[key]) for key in given)
    if isinstance(given, str):
        return _said_by(given, read)
    if isinstance(given, list) and len(given) == 1:
        return alike(given[0], read)
    if isinstance(given, bool) or isinstance(read, bool):
        return given in (0, 1) and given == read
    return isinstance(read, str) and str(given) == read


def _said_by(text: str, read: Any) -> bool:
    """Whether text says a value that is none."""
    if read is None:
        return text.lower() in ("none", "null", "")
    if isinstance(read, bool):
        return text.lower() in (("true", "yes", "on", "1") if read else ("false", "no", "off", "0"))
    if isinstance(read, int | float):
        try:
            return float(text) == float(read) or (math.isnan(float(text)) and math.isnan(read))
        except ValueError:
            return False
    if isinstance(read, dict | list):
        try:
            return json.loads(text) == read
        except ValueError:
            return False
    return text == read
