"""`mmkd cache`: build, info, verify, push and merge."""

from argparse import Action, ArgumentParser, Namespace
from typing import Any

from .command import Command, CommandGroup


class _HelpWithKeys(Action):
    """Prints the help of a command, and the keys of a recipe that are about caches."""

    def __call__(self, parser: ArgumentParser, *unused: Any) -> None:
        from dataclasses import fields

        from rich.console import Console

        from mmkd.recipe.cache_arguments import CacheArguments
        from mmkd.recipe.key_format import Key, print_key
        from mmkd.schema import fields_of

        parser.print_help()
        console = Console(highlight=False)
        console.print("\nkeys of a cache, in the recipe or as flags:")
        checked = fields_of(CacheArguments)
        for field in fields(CacheArguments):
            print_key(console, Key.of(field, checked[field.name], "cache"), whole=True)
        parser.exit()


def add_build_flags(parser: ArgumentParser) -> None:
    """Of `mmkd cache build`."""
    parser.add_argument("-h", "--help", nargs=0, action=_HelpWithKeys, help="show this help message and exit")
    parser.add_argument("recipe", help="path of a YAML file, or name of a shipped recipe")


def build(options: Namespace) -> int:
    """Builds the cache of a recipe."""
    from mmkd.recipe.flags import recipe_of

    from . import cache_actions

    return cache_actions.build_cache(recipe_of(options.recipe, options.flags))


def add_info_flags(parser: ArgumentParser) -> None:
    """Of `mmkd cache info`."""
    parser.add_argument("cache", help="folder or Hub id")


def info(options: Namespace) -> int:
    """Prints what a cache is."""
    from .cache_actions import describe_cache

    return describe_cache(options.cache)


def add_verify_flags(parser: ArgumentParser) -> None:
    """Of `mmkd cache verify`."""
    parser.add_argument("target", help="folder, Hub id, or the recipe (.yaml) that made it")
    _add_rows(parser)


def verify(options: Namespace) -> int:
    """Checks a cache."""
    from .cache_actions import CacheTarget, verify_cache

    return verify_cache(CacheTarget.of(options.target, options.flags, ["--rows"]), options.rows)


def add_push_flags(parser: ArgumentParser) -> None:
    """Of `mmkd cache push`."""
    parser.add_argument("target", help="folder, or the recipe (.yaml) that made it, to measure it for the card")
    parser.add_argument("repo_id", help="user/name of the data set to write")
    parser.add_argument("--private", action="store_true", help="only you and your organisation can read it")
    _add_rows(parser)


def push(options: Namespace) -> int:
    """Publishes a cache."""
    from .cache_actions import CacheTarget, publish_cache

    target = CacheTarget.of(options.target, options.flags, ["--rows", "--private"])
    return publish_cache(target, options.repo_id, options.private, options.rows)


def add_merge_flags(parser: ArgumentParser) -> None:
    """Of `mmkd cache merge`."""
    parser.add_argument("cache", help="the folder to write")
    parser.add_argument("parts", nargs="*", help="folders of the parts (default: CACHE.part-*-of-* beside it)")


def merge(options: Namespace) -> int:
    """Joins the parts of a build."""
    from .cache_actions import merge_cache

    return merge_cache(options.cache, options.parts)


def _add_rows(parser: ArgumentParser) -> None:
    parser.add_argument("--rows", type=int, default=64, help="sequences to ask the live teacher about (default: 64)")


COMMAND = CommandGroup(
    "cache",
    "write what a teacher says to disk, once, and look after it",
    (
        Command(
            "build",
            "run the teacher of a recipe over its data; run it again to go on",
            build,
            add_build_flags,
            "Runs the teacher of a recipe over its data and writes what it says to the recipe's teacher_cache, or "
            "with job: generate its answers. Every key of the recipe can be given as a flag, such as --dry_run or "
            "--teacher_top_k 32. Besides the keys below, teacher, teacher_*, data and max_length decide what is "
            "written; `mmkd-train RECIPE --help_keys teacher` describes them.",
            recipe="recipe",
            add_help=False,
        ),
        Command("info", "what a cache holds, its size, the mass it keeps, what it cost", info, add_info_flags),
        Command(
            "verify",
            "check a cache's checksums; with its recipe, also against the live teacher",
            verify,
            add_verify_flags,
            recipe="target",
        ),
        Command("push", "publish a cache on the Hub, with a card", push, add_push_flags, recipe="target"),
        Command("merge", "join the parts of a build with shard: i/n", merge, add_merge_flags),
    ),
)
