"""`mmkd consolidate`: one student of a checkpoint in shards."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from .command import Command


def add_flags(parser: ArgumentParser) -> None:
    """From where to where."""
    parser.add_argument("checkpoint", type=Path, help="a checkpoint-N folder of a run under fsdp2 or zero3")
    parser.add_argument("output", type=Path, help="the folder to write")


def run(options: Namespace) -> int:
    """Writes the student."""
    from mmkd.models.consolidate import consolidate

    consolidate(options.checkpoint, options.output)
    return 0


COMMAND = Command("consolidate", "make one student of a checkpoint that was written in shards", run, add_flags)
