"""The keys of a recipe and the flags after it as typed values; a value that cannot be is said in one line."""

import contextlib
import functools
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, replace
from typing import Any

from mmkd.errors import UserError
from mmkd.schema import TRUTH, Field, Range, fields_of, missing_fields, shown
from mmkd.training.method import METHODS
from mmkd.yaml_files import AsWritten

from .arguments import RunArguments, StudentArguments
from .cache_arguments import CacheArguments

_NOTHING = ("none", "null")
_JSON = {"{": '{"name": 1}', "[": '["name"]'}
_OURS = {*fields_of(RunArguments), *fields_of(CacheArguments)}
# Keys with text for values of which true or false, yes or no say something of their own.
_TRUE_TOO = {"teachers", "shard", "resume_from_checkpoint"}
_SEEDS = Range(min=0, max=2**32 - 1)
# Of keys of transformers and trl, which declare none.
_BOUNDS = {
    "per_device_train_batch_size": Range(min=1),
    "per_device_eval_batch_size": Range(min=1),
    "gradient_accumulation_steps": Range(min=1),
    "seed": _SEEDS,
    "data_seed": _SEEDS,
    "learning_rate": Range(min=0),
    "num_train_epochs": Range(min=0),
    "warmup_steps": Range(min=0),
    "max_length": Range(min=1),
    "dataloader_num_workers": Range(min=0),
    "lora_r": Range(min=1),
    "lora_dropout": Range(min=0, below=1),
    # Without an end, gradients are measured and not clipped.
    "max_grad_norm": Range(min=0, finite=False),
}


@functools.cache
def _text_keys() -> frozenset[str]:
    """The keys that are text, and no number or truth value, in every method that has them."""
    kinds = (RunArguments, StudentArguments, CacheArguments, *(method.config for method in METHODS.values()))
    every = [field for kind in kinds for field in fields_of(kind).values()]
    others = {field.name for field in every if not field.is_text}
    return frozenset({field.name for field in every} - others - _TRUE_TOO)


def with_text(keys: Mapping[Any, Any], written: Mapping[str, Any]) -> dict[Any, Any]:
    """A recipe's keys; of those that take text, what YAML 1.1 reads as something else is as it was written.

    `written` are the same keys as `read_yaml` gives them as written.
    """
    return {key: _text(value, written.get(key)) if key in _text_keys() else value for key, value in keys.items()}


def _text(value: Any, written: Any) -> Any:
    if isinstance(value, list) and isinstance(written, list):
        return [_text(item, spelled) for item, spelled in zip(value, written, strict=True)]
    return str(written) if isinstance(written, AsWritten) else value


class KeyParser:
    """Reads every key that a recipe of a method may set, as a key or as a flag."""

    def __init__(self, method: str):
        self.method = method
        self.types: list[Any] = [RunArguments, METHODS[method].config, StudentArguments, CacheArguments]
        self._fields = {name: field for kind in self.types for name, field in fields_of(kind).items()}
        self._fields |= {
            name: replace(self._fields[name], bounds=bounds)
            for name, bounds in _BOUNDS.items()
            if name in self._fields
        }

    def field(self, name: str) -> Field:
        """What a key may hold."""
        return self._fields[name]

    @property
    def names(self) -> list[str]:
        """All keys."""
        return list(self._fields)

    @functools.cached_property
    def options(self) -> dict[str, str]:
        """Name of a flag -> its key; no_KEY of every key that is true or false."""
        negated = {f"no_{name}": name for name, field in self._fields.items() if bool in field.kinds}
        return {**negated, **{name: name for name in self._fields}}

    def arity(self, option: str) -> tuple[int, int | None]:
        """How many words stand after a flag: at least, and at most (None: any number)."""
        field = self._fields[self.options[option]]
        if bool in field.kinds:
            return 0, 0 if option != field.name else 1
        return 1, None if list in field.kinds else 1

    def value(self, option: str, words: Sequence[str]) -> Any:
        """What the words after a flag say, as a recipe's YAML would: of none, true or, after no_, false."""
        field = self._fields[self.options[option]]
        if not words:
            return option == field.name
        values = [_value(field, word) for word in words]
        return values[0] if len(values) == 1 else values

    def read(self, keys: Mapping[str, Any]) -> list[Any]:
        """An instance of each of `types`. Raises UserError for values that cannot be."""
        _refuse_fsdp(keys)
        values = {name: self.read_value(name, value) for name, value in keys.items() if name in self._fields}
        missing = [name for kind in self.types for name in missing_fields(kind, values)]
        if missing:
            raise UserError(f"The recipe does not set {' and '.join(missing)}, and no run is possible without.")
        own = [{name: values[name] for name in fields_of(kind) if name in values} for kind in self.types]
        try:
            return [kind(**settings) for kind, settings in zip(self.types, own, strict=True)]
        except UserError:
            raise
        except json.JSONDecodeError as error:
            raise UserError(f"{error.doc!r} is no JSON ({error.msg}): write it as '{{\"name\": 1}}'.") from error
        except FileNotFoundError as error:
            raise UserError(f"A key names the file {error.filename!r}, which does not exist.") from error
        except (ValueError, TypeError) as error:
            # transformers and trl say so of a combination of keys; the values of each have been looked at above.
            raise UserError(f"These settings cannot be: {' '.join(str(error).split())}", because="upstream") from error

    def read_value(self, name: str, value: Any) -> Any:
        """A recipe's value for a key, one value of a list as a list. Raises UserError for one that cannot be."""
        field = self._fields[name]
        if value is None and not field.optional:
            default = self._default(name)
            advice = "" if default is MISSING else f" Leave it out for its default, {default!r}."
            raise UserError(f"{name} is null, and it needs a value.{advice}")
        if value is None or _means_nothing(field, value):
            return None
        if isinstance(value, bool) and name == "resume_from_checkpoint":
            return value
        if name == "data" and isinstance(value, list | dict):
            raise UserError(
                f"data is {shown(value)}, and it takes one source of rows. For files of one layout name their folder "
                'or a glob, such as data: "part-*.jsonl", or list them in a data recipe as '
                "`data_files: {train: [a.jsonl, b.jsonl]}`. To mix sources, write a data recipe with `mixture:`."
            )
        # Where a mapping or nothing can be given to transformers, false may say nothing.
        if value is False and dict in field.kinds and name not in _OURS:
            return value
        return field.read(_number_as_text(value) if field.is_text and name not in _OURS else value)

    def _default(self, name: str) -> Any:
        field = next(field for kind in self.types for field in fields(kind) if field.name == name)
        return field.default if field.default_factory is MISSING else field.default_factory()


@functools.cache
def parser_of(method: str) -> KeyParser:
    """The reader of a method's keys, which stays as it is whatever it reads."""
    return KeyParser(method)


def _number_as_text(value: Any) -> Any:
    if isinstance(value, list):
        return [_number_as_text(item) for item in value]
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


def _value(field: Field, word: str) -> Any:
    """YAML 1.1 itself would read 1e-3 as text and no as false."""
    if _means_nothing(field, word):
        return None
    if (word.startswith("{") and dict in field.kinds) or (word.startswith("[") and list in field.kinds):
        try:
            return json.loads(word)
        except json.JSONDecodeError as error:
            raise UserError(
                f"--{field.name} is no JSON ({error}): write --{field.name} '{_JSON[word[0]]}'."
            ) from error
    if field.is_text and field.name not in _TRUE_TOO:
        return word
    if word.lower() in (TRUTH if bool in field.kinds else ("true", "false")):
        return TRUTH[word.lower()]
    kinds = {*field.kinds, *(() if field.items is None else field.items.kinds)}
    for kind in (kind for kind in (int, float) if not kinds.isdisjoint({int, float})):
        with contextlib.suppress(ValueError):
            return kind(word)
    return word


def _means_nothing(field: Field, value: Any) -> bool:
    if not isinstance(value, str) or value.lower() not in _NOTHING or not field.optional:
        return False
    # What others read as text may give the word a meaning, as report_to does.
    plain = {*field.kinds} <= {int, float, bool, type(None)}
    return field.name in _OURS or plain or value.lower() == "null"


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
        raise UserError(f"env is {shown(variables)}; write a mapping of variables to values under it.")
    for name, value in ((str(name), str(value)) for name, value in variables.items()):
        if not name or "=" in name or "\0" in name + value:
            raise UserError(f"env.{name!r} is {shown(value)}, which no variable of the environment can be.")
        os.environ[name] = value
