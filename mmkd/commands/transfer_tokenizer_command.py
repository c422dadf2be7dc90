"""`mmkd transfer-tokenizer`: a model with another tokenizer."""

from argparse import ArgumentParser, Namespace

from .command import Command


def add_flags(parser: ArgumentParser) -> None:
    """The model, the tokenizer, and the shape of the new rows."""
    add = parser.add_argument
    add("model", help="Hub id or folder")
    add("tokenizer", help="Hub id or folder of the tokenizer, or the word bytes")
    add("output_dir", help="the folder to write")
    add("--untie", action="store_true", help="give embeddings and head weights of their own")
    add("--pad_to_multiple_of", type=int, default=1, help="pad the vocabulary, for speed on GPUs (default: 1)")


def run(options: Namespace) -> int:
    """Writes the model's folder."""
    from mmkd.models.transfer import transfer_command

    return transfer_command(
        options.model, options.tokenizer, options.output_dir, options.untie, options.pad_to_multiple_of
    )


COMMAND = Command("transfer-tokenizer", "give a model another tokenizer, or one of bytes", run, add_flags)
