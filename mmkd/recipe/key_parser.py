"""The keys of a recipe and the flags after it as typed values; a value that cannot be is said in one line."""

import argparse
import difflib
import functools
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from types import NoneType
from typing import Any, Literal, NoReturn, get_args, get_type_hints

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
_OURS = {field.name for part in (RunArguments, CacheArguments) for field in fields(part)}
# Keys with text for values of which true or false, yes or no say something of their own.
_TRUE_TOO = {"teachers", "shard", "resume_from_checkpoint"}


@functools.cache
def _hints() -> dict[str, set[Any]]:
    """Key -> the types that some method gives its value, those of a list's items among them."""
    kinds = (RunArguments, StudentArguments, CacheArguments, *(method.config for method in METHODS.values()))
    found: dict[str, set[Any]] = {}
    for kind in kinds:
        hints = get_type_hints(kind)
        for name in (field.name for field in fields(kind)):
            found.setdefault(name, set()).update(get_args(hints[name]) or {hints[name]})
    return found


def _is_text(name: str) -> bool:
    """Whether a key's value, or each item of its list, is text, and no number or truth value."""
    kinds = _hints().get(name, set())
    takes_text = not kinds.isdisjoint({str, list[str]})
    return takes_text and kinds.isdisjoint({bool, int, float, Literal[False]}) and name not in _TRUE_TOO


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

    def read(self, keys: Mapping[str, Any], flags: Sequence[str]) -> tuple[list[Any], list[str]]:
        """An instance of each of `types`, and the flags that none of them knows; flags win over keys.

        Raises UserError for values that cannot be.
        """
        _refuse_fsdp({**dict.fromkeys(_flag_names(flags)), **keys})
        actions = self._by_dest()
        values = {name: self._checked(actions[name], value) for name, value in keys.items() if name in actions}
        flags, unset = self._without_nothing(flags, actions)
        self.set_defaults_with_config(**{**values, **dict.fromkeys(unset)})
        try:
            *found, unknown = self.parse_args_into_dataclasses(args=list(flags), return_remaining_strings=True)
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
        return found, unknown

    def _by_dest(self) -> dict[str, argparse.Action]:
        """Flags such as --no_bf16 come after the key they negate."""
        found: dict[str, argparse.Action] = {}
        for action in self._actions:
            if action.dest != "help":
                found.setdefault(action.dest, action)
        return found

    def _without_nothing(
        self, flags: Sequence[str], actions: Mapping[str, argparse.Action]
    ) -> tuple[list[str], set[str]]:
        """The flags without those whose only value is none or null, and the keys that these leave unset."""
        kept: list[str] = []
        unset: set[str] = set()
        for words in _with_values(flags):
            name, _, value = words[0].removeprefix("--").partition("=")
            name, values = name.replace("-", "_"), [value] if value else words[1:]
            action = actions.get(name)
            if len(values) == 1 and action is not None and self._means_nothing(action, values[0]):
                unset.add(name)
            else:
                # The last one wins, as with every flag.
                unset.discard(name)
                kept += words
        return kept, unset

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
    if "expected" in complaint and "argument" in complaint:
        return f"--{name} stands there without a value: write --{name} VALUE."
    value = re.search(r"(?:value: |choice: |got )'?(.*?)'?(?: \(choose from| but expected|$)", complaint, re.DOTALL)
    if action is None or value is None:
        return f"{name}: {complaint}"
    if action.choices is not None and "choice" in complaint:
        return _no_choice(name, value[1], action.choices)
    return f"{name} is {value[1]!r}, which is {_KINDS.get(_kind(action), f'not what it takes ({complaint})')}."


def _refuse_fsdp(keys: Mapping[str, Any]) -> None:
    """Raises UserError for the Trainer's own keys of FSDP, which start no processes and know no teacher."""
    for key in ("fsdp", "fsdp_config"):
        if key in keys and keys[key] != "":
            raise UserError(
                f"{key} does not shard a run here. Remove it and set accelerate_config: fsdp2 (or the path of an "
                "accelerate configuration of your own), which starts the processes and shards student and teacher."
            )


def _with_values(flags: Sequence[str]) -> list[list[str]]:
    """Each flag with the words after it."""
    found: list[list[str]] = []
    for word in flags:
        if word.startswith("--") or not found:
            found.append([word])
        else:
            found[-1].append(word)
    return found


def _flag_names(flags: Sequence[str]) -> list[str]:
    return [flag[2:].partition("=")[0].replace("-", "_") for flag in flags if flag.startswith("--")]


def set_environment(keys: Mapping[str, Any]) -> None:
    """Sets the variables under a recipe's key `env`. Raises UserError when they are no mapping."""
    variables = keys.get("env") or {}
    if not isinstance(variables, dict):
        raise UserError(f"env is {variables!r}; write a mapping of variables to values under it.")
    os.environ.update({str(name): str(value) for name, value in variables.items()})
