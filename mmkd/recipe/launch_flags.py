"""Which flags of a run are its own, and which those of who launches it."""

from collections.abc import Sequence

from accelerate.commands.launch import launch_command_parser

from mmkd.shipped import find_recipe

from .run import Run, method_of, parse_run, parser_of, read_recipe


def parse_alone(recipe: str, flags: Sequence[str]) -> tuple[Run, str | None]:
    """The run of a recipe in this process alone, and the accelerate_config that training would be launched with."""
    flags, config, ignored = alone(recipe, flags)
    return parse_run(recipe, flags, ignored), config


def alone(recipe: str, flags: Sequence[str]) -> tuple[list[str], str | None, list[str]]:
    """The flags of a run without those that launch it, its accelerate_config, and the keys that launching reads."""
    chosen, flags = split(flags, ["accelerate_config"])
    keys = read_recipe(find_recipe(recipe))
    config = chosen[-1].rpartition("=")[2] if chosen else keys.get("accelerate_config")
    known = launch_keys_of(method_of(keys, flags)) if config is not None else []
    return split(flags, known)[1], config, ["accelerate_config", *known]


def launch_keys_of(method: str) -> list[str]:
    """What accelerate launch reads and a recipe of this method does not."""
    ours = set(parser_of(method).names)
    return [action.dest for action in launch_command_parser()._actions if action.dest not in {*ours, "module", "m"}]


def split(flags: Sequence[str], keys: Sequence[str]) -> tuple[list[str], list[str]]:
    """The flags named in `keys`, with their values, and the others."""
    chosen: tuple[list[str], list[str]] = ([], [])
    target = 1
    for flag in flags:
        if flag.startswith("--"):
            target = 0 if flag[2:].partition("=")[0].replace("-", "_") in keys else 1
        chosen[target].append(flag)
    return chosen
