"""Keys of every recipe that a method which trains whole models, and not on tokens, does not read."""

from collections.abc import Container
from dataclasses import fields

from mmkd.errors import UserError

from .arguments import RunArguments
from .cache_arguments import CacheArguments

_ADAPTERS = ("use_peft", "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_target_parameters")
_ADAPTERS += ("lora_modules_to_save", "use_rslora", "use_dora")
_QUANTISED = ("load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type", "use_bnb_nested_quant", "bnb_4bit_quant_storage")


def check_read(arguments: RunArguments, read: Container[str], why: str) -> None:
    """Raises UserError for a key that is set and not among those that the method reads; `why` says what to do."""
    for key in fields(RunArguments):
        if key.name not in read and getattr(arguments, key.name) != key.default:
            raise UserError(f"Method {arguments.method} does not read {key.name}; {why}", because="meaning")


def unread_keys(
    read: Container[str], why: str, whole: str, read_of_cache: Container[str] = (), adapters: bool = False
) -> dict[str, str]:
    """The keys that a method has no use for -> why; `whole` is why of those about adapters and quantised weights.

    With `adapters` the method trains adapters too, and reads their keys.
    """
    unread = [key.name for key in fields(RunArguments) if key.name not in read]
    unread += [key.name for key in fields(CacheArguments) if key.name not in read_of_cache]
    return dict.fromkeys(unread, why) | dict.fromkeys((*(() if adapters else _ADAPTERS), *_QUANTISED), whole)
