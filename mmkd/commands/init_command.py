"""`mmkd init`: a recipe from a few questions."""

from argparse import ArgumentParser, Namespace

from mmkd.scaffold.init_tasks import PRUNE, SERVER, TASKS, named

from .command import Command


def add_flags(parser: ArgumentParser) -> None:
    """Each answers a question, which is then not asked."""
    add = parser.add_argument
    add("output", nargs="?", metavar="OUTPUT.yaml", help="file of the recipe (default: mine.yaml)")
    add("--data", metavar="SOURCE", help="your data: a file, a folder, a glob, a Hub id, or a data recipe")
    add("--task", help=f"what is trained: {named(list(TASKS))}")
    add("--gpu", help="the GPU that trains: its memory in GiB, such as 24, a name such as A100-80GB, or none")
    add("--teacher", metavar="MODEL", help="a Hub id or a folder")
    add("--student", metavar="MODEL", help=f"a Hub id or a folder, or {PRUNE}: some of the teacher's layers")
    add("--keep_layers", type=int, metavar="N", help=f"student {PRUNE}: how many layers it keeps (default: half)")
    add("--server", metavar="URL", help=f"the vLLM server that runs the teacher, such as {SERVER}")
    add("--output_dir", metavar="FOLDER", help="folder of the run (default: runs/ and the name of the recipe)")
    add("--yes", action="store_true", help="take the suggestion for every question that no flag answers")
    add("--force", action="store_true", help="replace OUTPUT.yaml if it is there")


def run(options: Namespace) -> int:
    """Asks, writes, checks."""
    from rich.console import Console

    from mmkd.scaffold.init import init
    from mmkd.scaffold.init_answers import InitFlags
    from mmkd.scaffold.questions import Asker, edit_lines, is_terminal

    names = ("output", "task", "data", "gpu", "teacher", "server", "student", "keep_layers", "output_dir", "force")
    interactive = is_terminal() and not options.yes
    if interactive:
        edit_lines()
    asker = Asker(Console(highlight=False), options.yes, interactive)
    return init(InitFlags(**{name: getattr(options, name) for name in names}), asker)


COMMAND = Command(
    "init",
    "write a recipe for your own data and models",
    run,
    add_flags,
    "Asks for data, task, GPU, teacher and student, suggests an answer to each, and writes a recipe with a comment on "
    "every choice: batch size, checkpointing and quantisation are those that `mmkd plan` finds to fit. Then doctor "
    "checks it. Loads no weights.",
)
