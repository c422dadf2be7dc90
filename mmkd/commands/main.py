"""mmkd-train and mmkd: find the command, parse, call it."""

import os
import sys
from argparse import ArgumentParser
from collections.abc import Sequence

from mmkd import __version__
from mmkd.errors import UserError
from mmkd.seams.upstream_messages import keep_back_messages

from . import (
    cache_command,
    chat_command,
    compare_command,
    consolidate_command,
    data_command,
    doctor_command,
    env_command,
    eval_command,
    export_command,
    init_command,
    plan_command,
    prepare_command,
    prune_command,
    push_command,
    recipes_command,
    report_command,
    teachers_command,
    train_command,
    transfer_tokenizer_command,
    trim_vocabulary_command,
    ui_command,
)
from .command import Command, CommandGroup
from .said_once import said_once

# In the order of --help.
COMMANDS: tuple[Command | CommandGroup, ...] = (
    init_command.COMMAND,
    train_command.COMMAND,
    cache_command.COMMAND,
    eval_command.COMMAND,
    compare_command.COMMAND,
    report_command.COMMAND,
    chat_command.COMMAND,
    ui_command.COMMAND,
    export_command.COMMAND,
    push_command.COMMAND,
    doctor_command.COMMAND,
    plan_command.COMMAND,
    teachers_command.COMMAND,
    data_command.COMMAND,
    recipes_command.COMMAND,
    transfer_tokenizer_command.COMMAND,
    trim_vocabulary_command.COMMAND,
    prune_command.COMMAND,
    consolidate_command.COMMAND,
    prepare_command.COMMAND,
    env_command.COMMAND,
)

_TRACEBACK = "MMKD_TRACEBACK"
"""Set, an error of another library keeps its traceback."""

_REPORT = (
    "mmkd did not expect this error. If you cannot mend what it names, please report it where you got mmkd from, with "
    "this traceback, the recipe and the output of `mmkd env`."
)


def train_main() -> None:
    """Entry point of mmkd-train."""
    sys.exit(main(["train", *sys.argv[1:]]))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status: 0, 2 for bad input, 130 when interrupted."""
    words = [part for word in (sys.argv[1:] if arguments is None else arguments) for part in _parts(word)]
    options, flags = _parser().parse_known_args(words)
    options.flags = flags
    command: Command = options.chosen
    if flags and command.recipe is None:
        options.parser.error(f"unrecognized arguments: {' '.join(flags)}")
    keep_back_messages()
    _show_long_bars_only()
    try:
        command.check_flags(options, words[options.depth :])
        with said_once():
            return command.run(options)
    except UserError as error:
        print(f"mmkd: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "\nmmkd: interrupted. What was finished is kept, and the same command goes on from there.", file=sys.stderr
        )
        return 130
    except ImportError as error:
        # Libraries name the package that a setting needs in words of their own.
        if _TRACEBACK in os.environ or (error.name or "").startswith("mmkd"):
            raise
        reason = " ".join(str(error).split())
        print(f"mmkd: {reason} ({_TRACEBACK}=1 shows where this was needed)", file=sys.stderr)
        return 2
    except Exception as error:
        error.add_note(_REPORT)
        raise


def _show_long_bars_only() -> None:
    """Keeps the bars of other libraries back until they have lasted some seconds, and takes them away at their end.

    They are of tqdm, which reads this when it is imported; a file gets a state per minute and not a hundred.
    """
    settings = {"DELAY": "5", "LEAVE": ""}
    if not sys.stderr.isatty():
        settings["MININTERVAL"] = "60"
    for name, value in settings.items():
        os.environ.setdefault(f"TQDM_{name}", value)


def _parts(word: str) -> list[str]:
    """A flag as the parsers have it, however its words are joined."""
    if not word.startswith("--"):
        return [word]
    flag, joined, value = word.partition("=")
    flag = f"--{flag[2:].replace('-', '_')}"
    # argparse takes an unknown flag with a space in its value for a value itself.
    return [flag, value] if " " in value else [f"{flag}{joined}{value}"]


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="mmkd", description="Distil large language models into small ones.")
    parser.add_argument("--version", action="version", version=f"mmkd {__version__}")
    _add(COMMANDS, parser, depth=1)
    return parser


def _add(commands: Sequence[Command | CommandGroup], parser: ArgumentParser, depth: int) -> None:
    """Adds commands that are the word of a command line at this place, the first being 1."""
    parsers = parser.add_subparsers(dest="command" if depth == 1 else "action", required=True)
    for command in commands:
        if isinstance(command, CommandGroup):
            _add(command.commands, parsers.add_parser(command.name, help=command.help), depth + 1)
            continue
        own = parsers.add_parser(command.name, help=command.help, **command.of_parser)
        command.add_flags(own)
        own.set_defaults(chosen=command, parser=own, depth=depth)


if __name__ == "__main__":
    sys.exit(main())
