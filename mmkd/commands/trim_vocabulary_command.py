"""`mmkd trim-vocabulary`: a model without the tokens that texts do not use."""

from argparse import ArgumentParser, Namespace

from .command import Command


def add_flags(parser: ArgumentParser) -> None:
    """The model, the texts, and which tokens stay."""
    add = parser.add_argument
    add("model", help="Hub id or folder of a language model, a VLM or an encoder")
    add("--texts", nargs="+", required=True, help="files or data recipes with texts like those the model will read")
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument(
        "--min_frequency", type=float, help="keep tokens that make up at least this share of one of the texts: 1e-6"
    )
    size.add_argument(
        "--keep", type=int, help="keep this many tokens: the most frequent ones and those that must stay"
    )
    add("--output", required=True, help="the folder to write")
    add("--held_out", help="a file or data recipe to measure with (default: what --texts hold out, or 1 text in 20)")
    add("--pad_to_multiple_of", type=int, default=1, help="pad the vocabulary, for speed on GPUs (default: 1)")


def run(options: Namespace) -> int:
    """Writes the model's folder."""
    from rich.console import Console

    from mmkd.models.trim_vocabulary import Trimming, trim_command

    trimming = Trimming(options.min_frequency, options.keep, options.pad_to_multiple_of)
    trim_command(options.model, options.texts, options.output, trimming, options.held_out, Console())
    return 0


COMMAND = Command("trim-vocabulary", "remove the tokens that your texts do not use", run, add_flags)
