"""`mmkd push`: a finished student on the Hub."""

import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

from mmkd.errors import UserError

from .command import Command


def add_flags(parser: ArgumentParser) -> None:
    """Which run, where to, and what its folder does not say."""
    add = parser.add_argument
    add("run_folder", metavar="RUN", help="output_dir of a finished training")
    add("--repo", required=True, metavar="ORG/NAME", help="the model repository to write")
    add("--public", action="store_true", help="everyone can read it (default: only you and your organisation)")
    add("--dry_run", action="store_true", help="write the folder that would be pushed, and push nothing")
    add("--output", type=Path, help="folder of --dry_run (default: push/ in the run's)")
    add("--collection", metavar="TITLE", help="put the student, and its teacher's cache, in this collection")
    add("--cache", metavar="ORG/NAME", help="the cache on the Hub (default: the recipe's teacher_cache)")
    add("--license", help="of the student (default: that of the models it began with)")
    add("--base_model", nargs="+", default=[], metavar="ORG/NAME", help="what the student's folder is on the Hub")
    add("--teacher", metavar="ORG/NAME", help="what the teacher's folder is on the Hub")
    add("--recipe", help="the recipe of a run that has no run.json")
    add(
        "--exported",
        nargs="+",
        default=[],
        metavar="NAME",
        help="also publish these of `mmkd export`, with their own numbers on the card: gguf-q4_k_m",
    )
    add("--comparison", type=Path, help="of `mmkd compare` (default: the run's, or one that names it)")


def run(options: Namespace) -> int:
    """Publishes a run, or with --dry_run writes the folder, and prints where it is."""
    from huggingface_hub.utils import get_token

    from mmkd.publish.push import cache_of, check_name, push
    from mmkd.publish.push_folder import PushOptions, prepare

    wanted = PushOptions(
        options.repo,
        license=options.license,
        base_model=options.base_model,
        teacher=options.teacher,
        recipe=options.recipe,
        comparison=options.comparison,
        exported=options.exported,
    )
    check_name(options.repo)
    if not options.dry_run and not get_token():
        raise UserError("There is no token of the Hub here. Log in with `hf auth login`, or set HF_TOKEN.")
    published = prepare(Path(options.run_folder), wanted)
    for warning in published.student.warnings:
        print(f"Mind: {warning}", file=sys.stderr)
    if options.dry_run:
        output = options.output or Path(options.run_folder) / "push"
        published.write(output)
        print(output)
        return 0
    cache = options.cache or cache_of(published)
    print(push(published, public=options.public, collection=options.collection, cache=cache))
    return 0


COMMAND = Command(
    "push",
    "publish a finished student on the Hub, with a card",
    run,
    add_flags,
    "Uploads weights, processor, recipe, results and a model card in one commit, private by default.",
)
