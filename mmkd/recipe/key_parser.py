"""The keys of a recipe and the flags after it as typed values; a value that cannot be is said in one line."""

import argparse
import contextlib
import difflib
import functools
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from types import NoneType, UnionType
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

from trl.scripts.utils import TrlParser

from mmkd.errors import UserError
from mmkd.training.method import METHODS
from mmkd.yaml_files import AsWritten

from .arguments import RunArguments, StudentArguments
from .cache_arguments import CacheArguments

# By the names of what reads them: trl wraps int where none is allowed too.
_KINDS = {
    "int": "no whole number (int)",
    "float": "no number (float)",
    "string_to_bool": "neither true nor false",
}
_TRUTH = ("true", "false", "yes", "no", "t", "f", "y", "n", "1", "0")
# More choices than these are not listed in an error.
_SHOWN = 10
_POSITIVE = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
_NOTHING = ("none", "null")
_JSON = {"{": '{"name": 1}', "[": '["name"]'}
_OURS = {field.name for part in (RunArguments, CacheArguments) for field in fields(part)}
# Keys with text for values of which true or false, yes or no say something of their own.
_TRUE_TOO = {"teachers", "shard", "resume_from_checkpoint"}


@functools.cache
def _hints() -> dict[str, set[Any]]:
    """Key -> the types that some method gives its value, those of a list's items among them."""
    kinds = (RunArguments, StudentArguments, CacheArguments, *(method.config for method in METHODS.values()))
    types: dict[str, set[Any]] = {}
    for kind in kinds:
        hints = get_type_hints(kind)
        for name, hint in ((field.name, hints[field.name]) for field in fields(kind)):
            members = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
            items = [item for member in members if get_origin(member) is list for item in get_args(member)]
            types.setdefault(name, set()).update(members, items)
    return types


def _is_text(name: str) -> bool:
    """Whether a key's value, or each item of its list, is text, and no number or truth value."""
    kinds = _hints().get(name, set())
    takes_text = not kinds.isdisjoint({str, list[str]})
    return takes_text and kinds.isdisjoint({bool, int, float, Literal[False]}) and name not in _TRUE_TOO


def _takes(name: str, kind: type) -> bool:
    """Whether a list or a mapping may be the value of a key."""
    return any(kind in (hint, get_origin(hint)) for hint in _hints().get(name, set()))


def with_text(keys: Mapping[Any, Any], written: Mapping[str, Any]) -> dict[Any, Any]:
    """A recipe's keys; of those that take text, what YAML 1.1 reads as something else is as it was written.

    `written` are the same keys as `read_yaml` gives them as written.
    """
    return {key: _text(value, written.get(key)) if _is_text(key) else value for key, value in keys.items()}


def _text(value: Any, written: Any) -> Any:
    if isinstance(value, list) and isinstance(written, list):
        return [_text(one, spelled) for one, spelled in zip(value, written, strict=True)]
    return str(written) if isinstance(written, AsWritten) else value


class KeyParser(TrlParser):
    """The parser of every key that a recipe of a method may set, as a key or as a flag."""

    def __init__(self, method: str):
        self.types: list[Any] = [RunArguments, METHODS[method].config, StudentArguments, CacheArguments]
        # Before the parser reduces `int | None` to int.
        self.optional = {
            name for kind in self.types for name, hint in get_type_hints(kind).items() if NoneType in get_args(hint)
        }
        super().__init__(self.types, prog=f"mmkd-train ({method})", allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Raises UserError: a recipe of this method has some 200 flags, whose list would hide the error."""
        raise UserError(_in_one_line(message, self._by_dest()))

    @property
    def names(self) -> list[str]:
        """All keys."""
        return [action.dest for action in self._actions if action.dest != "help"]

    @property
    def options(self) -> dict[str, str]:
        """Name of a flag -> its key; no_KEY of every key that is true or false."""
        actions = self._by_dest()
        negated = {f"no_{name}": name for name, action in actions.items() if _kind(action) == "string_to_bool"}
        return {**negated, **{name: name for name in actions}}

    def arity(self, option: str) -> tuple[int, int | None]:
        """How many words stand after a flag: at least, and at most (None: any number)."""
        action = self._by_dest()[self.options[option]]
        if _kind(action) == "string_to_bool":
            return 0, 0 if option != action.dest else 1
        return 1, None if action.nargs == "+" or _takes(action.dest, list) else 1

    def value(self, option: str, words: Sequence[str]) -> Any:
        """What the words after a flag say, as a recipe's YAML would: of none, true or, after no_, false."""
        action = self._by_dest()[self.options[option]]
        if not words:
            return option == action.dest
        values = [self._value(action, word) for word in words]
        return values[0] if len(values) == 1 else values

    def _value(self, action: argparse.Action, word: str) -> Any:
        """YAML 1.1 itself would read 1e-3 as text and no as false."""
        name = action.dest
        if self._means_nothing(action, word):
            return None
        if (word.startswith("{") and _takes(name, dict)) or (word.startswith("[") and _takes(name, list)):
            try:
                return json.loads(word)
            except json.JSONDecodeError as error:
                raise UserError(f"--{name} is no JSON ({error}): write --{name} '{_JSON[word[0]]}'.") from error
        kinds = _hints()[name]
        if _is_text(name):
            return word
        if word.lower() in (_TRUTH if _kind(action) == "string_to_bool" else ("true", "false")):
            return word.lower() in _TRUTH[::2]
        for kind in (kind for kind in (int, float) if not kinds.isdisjoint({int, float})):
            with contextlib.suppress(ValueError):
                return kind(word)
        return word

    def read(self, keys: Mapping[str, Any]) -> list[Any]:
        """An instance of each of `types`. Raises UserError for values that cannot be."""
        _refuse_fsdp(keys)
        actions = self._by_dest()
        values = {name: self._checked(actions[name], value) for name, value in keys.items() if name in actions}
        self.set_defaults_with_config(**values)
        try:
            found = list(self.parse_args_into_dataclasses(args=[]))
        except (ValueError, TypeError) as error:
            if isinstance(error, UserError):
                raise
            if isinstance(error, json.JSONDecodeError):
                raise UserError(f"{error.doc!r} is no JSON ({error.msg}): write it as '{{\"name\": 1}}'.") from error
            # transformers and trl say so of a combination of keys; the values of each have been looked at above.
            raise UserError(f"These settings cannot be: {' '.join(str(error).split())}") from error
        for name in _POSITIVE:
            if getattr(found[1], name) < 1:
                raise UserError(f"{name} is {getattr(found[1], name)}; give 1 or more.")
        return found

    def _by_dest(self) -> dict[str, argparse.Action]:
        """Flags such as --no_bf16 come after the key they negate."""
        found: dict[str, argparse.Action] = {}
        for action in self._actions:
            if action.dest != "help":
                found.setdefault(action.dest, action)
        return found

    def _means_nothing(self, action: argparse.Action, value: Any) -> bool:
        if not isinstance(value, str) or value.lower() not in _NOTHING or action.dest not in self.optional:
            return False
        # What others read as text may give the word a meaning, as report_to does.
        return action.dest in _OURS or _kind(action) in _KINDS or value.lower() == "null"

    def _checked(self, action: argparse.Action, value: Any) -> Any:
        """A recipe's value for a key, one value of a list as a list. Raises UserError for one that cannot be."""
        name = action.dest
        if value is None and name not in self.optional and action.default is not None:
            raise UserError(f"{name} is null, and it needs a value. Leave it out for its default, {action.default!r}.")
        if value is None or self._means_nothing(action, value):
            return None
        if action.nargs == "+":
            items = value if isinstance(value, list) else [value]
            return [_checked_item(action, item) for item in items]
        return _checked_item(action, value)


def _kind(action: argparse.Action) -> str:
    return getattr(action.type, "__name__", "")


def _checked_item(action: argparse.Action, value: Any) -> Any:
    name, kind = action.dest, _kind(action)
    if kind in _KINDS:
        if not _is_of(kind, value):
            raise UserError(f"{name} is {value!r}, which is {_KINDS[kind]}.")
        return value
    if action.choices is not None and value not in action.choices:
        if isinstance(value, bool):
            raise UserError(
                f'{name} is {value}: YAML reads no, off, yes and on as truth values. Put the word in quotes: "no".'
            )
        raise UserError(_no_choice(name, value, action.choices))
    if action.type is str and name in _OURS - _TRUE_TOO and not isinstance(value, str):
        raise UserError(f"{name} is {value!r}, which is no text. Put it in quotes if it is a name.")
    # Where a mapping or nothing can be given too, false may say nothing.
    if isinstance(value, bool) and _is_text(name) and _hints()[name] <= {str, NoneType, list[str]}:
        raise UserError(f"{name} is {value}, which is no text. Put it in quotes if it is a name.")
    return str(value) if _is_text(name) and isinstance(value, int | float) else value


def _is_of(kind: str, value: Any) -> bool:
    """Whether a value of YAML is of a kind, or text that is read as one."""
    if kind == "string_to_bool":
        return isinstance(value, bool) or str(value).lower() in _TRUTH
    # True is a whole number to Python.
    if isinstance(value, bool):
        return False
    if isinstance(value, str):
        try:
            int(value) if kind == "int" else float(value)
        except ValueError:
            return False
        return True
    return isinstance(value, int) or (kind == "float" and isinstance(value, float))


def _no_choice(name: str, value: Any, choices: Iterable[Any]) -> str:
    known = [str(choice) for choice in choices]
    near = difflib.get_close_matches(str(value), known, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    if len(known) <= _SHOWN:
        return f"{name} is {value!r}; choose one of {', '.join(known)}.{hint}"
    return f"{name} is {value!r}, which is not one of its {len(known)} choices (--help_keys lists them).{hint}"


def _in_one_line(message: str, actions: Mapping[str, argparse.Action]) -> str:
    """What argparse complains about, in the words that a recipe's keys are complained about."""
    found = re.match(r"argument --([\w-]+)(?:/--[\w-]+)*: (.*)", message, re.DOTALL)
    if found is None:
        missing = re.search(r"required: (.*)", message)
        if missing is None:
            return message
        names = re.findall(r"--(\w+)", missing[1])
        return f"The recipe does not set {' and '.join(dict.fromkeys(names))}, and no run is possible without."
    name, complaint = found[1].replace("-", "_"), found[2]
    action = actions.get(name)
    value = re.search(r"(?:value: |got )'?(.*?)'?(?: but expected|$)", complaint, re.DOTALL)
    if action is None or value is None:
        return f"{name}: {complaint}"
    return f"{name} is {value[1]!r}, which is {_KINDS.get(_kind(action), f'not what it takes ({complaint})')}."


def _refuse_fsdp(keys: Mapping[str, Any]) -> None:
    """Raises UserError for the Trainer's own keys of FSDP, which start no processes and know no teacher."""
    for key in ("fsdp", "fsdp_config"):
        if key in keys and keys[key] != "":
            raise UserError(
                f"{key} does not shard a run here. Remove it and set accelerate_config: fsdp2 (or the path of an "
                "accelerate configuration of your own), which starts the processes and shards student and teacher."
            )


def set_environment(keys: Mapping[str, Any]) -> None:
    """Sets the variables under a recipe's key `env`. Raises UserError when they are no mapping."""
    variables = keys.get("env") or {}
    if not isinstance(variables, dict):
        raise UserError(f"env is {variables!r}; write a mapping of variables to values under it.")
    os.environ.update({str(name): str(value) for name, value in variables.items()})
