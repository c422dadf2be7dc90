"""What can be set in a recipe, key by key, as `--help_keys`, the JSON Schema and the documentation tell it."""

import functools
import inspect
from dataclasses import fields, replace
from typing import Any

from mmkd.schema import Field
from mmkd.training.config import DistillationConfig
from mmkd.training.method import METHODS, Method
from mmkd.training.rollout_config import ROLLOUT_KEYS

from .arguments import RunArguments, StudentArguments
from .cache_arguments import CacheArguments
from .key_format import Key
from .key_groups import GROUPS, HELP, UNUSED, group_of, rank_of
from .key_parser import parser_of
from .prune_arguments import PruneArguments

# Besides the fields of dataclasses: what `Recipe` itself reads.
_OF_RECIPES = {
    "stages": "Several trainings in one recipe: {NAME: {keys of that stage alone}, ...}. Each stage begins with the "
    "student that the stage before it left. On the command line, `--stages NAME ...` chooses some of them.",
    "schedule": "The names of the stages to train, in their order. Default: all, as they are written.",
    "accelerate_config": "Train in several processes: single_gpu, ddp, fsdp2, zero2, zero3, or the path of an "
    "accelerate configuration. Options of `accelerate launch`, such as num_processes, can then be set too.",
    "env": "Environment variables of the run: {NAME: 'value', ...}. Put values in quotes.",
}


@functools.cache
def keys_of(method: str) -> tuple[Key, ...]:
    """The keys of a method's recipes: by group, mmkd's own before those of transformers and trl."""
    value, parser = METHODS[method], parser_of(method)
    unused = {**UNUSED, **_unused_by(value)}
    keys = [Key(name, "training", None, text, None) for name, text in _OF_RECIPES.items()]
    for kind in parser.types:
        for field in fields(kind):
            if field.init:
                keys.append(_key(field, kind, value, parser.field(field.name)))
    keys = [replace(key, unused=unused.get(key.name, "")) for key in keys]
    return tuple(sorted(keys, key=_place))


def keys_of_all() -> tuple[Key, ...]:
    """The keys of all methods; those that several declare are there for each, and what all have is there once."""
    keys: dict[tuple[str, str], Key] = {}
    for method in METHODS:
        for key in keys_of(method):
            known = keys.setdefault((key.name, key.method), key)
            if known.unused and not key.unused:
                keys[key.name, key.method] = key
    methods = ["", *METHODS]
    return tuple(sorted(keys.values(), key=lambda key: (_place(key)[:2], methods.index(key.method), _place(key)[2])))


def _place(key: Key) -> tuple[int, bool, int]:
    """Where it stands in a list: mmkd's own before those of others, what a method declares behind its name."""
    rank = -1 if key.name == "method" else 0 if key.method else rank_of(key.name, key.group, key.is_own)
    return list(GROUPS).index(key.group), not key.is_own, rank


def _key(field: Any, kind: type, method: Method, checked: Field) -> Key:
    declared = _declared_in(kind, field.name)
    own = not declared.__module__.startswith(("transformers.", "trl."))
    kinds = (RunArguments, PruneArguments, StudentArguments, CacheArguments, *DistillationConfig.__mro__)
    shared = declared in kinds
    group = "method" if own and not shared else group_of(field.name, own)
    assert group is not None, f"OWN_KEYS has no group for {field.name}"
    key = Key.of(field, checked, group)
    text = key.help if own else HELP.get(key.name, key.help)
    return replace(key, help=text, is_own=own, method=method.name if own and not shared else "")


def _declared_in(kind: type, name: str) -> type:
    return next(part for part in kind.__mro__ if name in inspect.get_annotations(part))


def _unused_by(method: Method) -> dict[str, str]:
    """Why a recipe of a method has no use for some of the keys that every method has."""
    unused: dict[str, str] = {}
    config = method.config
    of_tokens = issubclass(config, DistillationConfig)
    if not of_tokens or not config.learns_from_rollouts:
        reason = f"Method {method.name} learns from the data's answers only."
        unused |= dict.fromkeys(ROLLOUT_KEYS, reason)
    elif not config.weighs_tokens:
        names = ["rollout_token_weights", "importance_gamma", "rollout_prefix"]
        unused |= dict.fromkeys(names, f"Method {method.name} compares chunks of text, and weighs no tokens.")
    if not method.takes_several:
        unused |= dict.fromkeys(["teachers", "teacher_column"], f"Method {method.name} learns from one teacher.")
    if of_tokens and config.combinations == ("weights",):
        unused["combine"] = f"The loss of method {method.name} has no terms to balance."
    return {**unused, **method.unused}
