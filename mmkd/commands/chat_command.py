"""`mmkd chat`: talk to a student and its teacher side by side."""

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmkd.errors import UserError

from .command import Command, add_trust

if TYPE_CHECKING:
    from mmkd.publish.run_sides import RunSide

QUIT, CLEAR = "/quit", "/clear"


def add_flags(parser: ArgumentParser) -> None:
    """Whom to ask, what, and how it answers."""
    add = parser.add_argument
    add("model", metavar="RUN_OR_MODEL", help="a run's folder, the folder of a model, or a Hub id")
    add("--side", choices=("both", "student", "teacher"), default="both", help="who answers (default: both)")
    add("--prompt", help="ask this, print the answers and end (default: ask for questions until /quit)")
    add("--system", help="system message at the start of the conversation")
    add("--image", type=Path, action="append", default=[], help="picture of the first question; may be repeated")
    add("--max_new_tokens", type=int, default=256, help="longest answer in tokens (default: 256)")
    add("--temperature", type=float, default=0.0, help="0 always takes the likeliest token (default: 0)")
    add("--top_p", type=float, default=1.0, help="share of the probability that is sampled from (default: 1)")
    add("--seed", type=int, default=0, help="of sampling (default: 0)")
    add_trust(parser)


def run(options: Namespace) -> int:
    """Asks and prints the answers as they are generated."""
    from mmkd.data.images import UnreadableImage, read_image
    from mmkd.generation.generator import Sampling
    from mmkd.ui.conversation import LoadedModels, sides_named, silent_side

    sides = sides_named(options.model, options.trust_remote_code)
    silent = silent_side(options.model) if options.side != "student" else ""
    if silent:
        print(silent, file=sys.stderr)
    sides = _chosen(sides, options.side)
    try:
        images = [read_image(path) for path in options.image]
    except UnreadableImage as error:
        raise UserError(f"--image cannot be read: {error}") from error
    sampling = Sampling(options.max_new_tokens, options.temperature, options.top_p, options.seed)
    models = LoadedModels()
    start: list[dict[str, Any]] = [] if options.system is None else [{"role": "system", "content": options.system}]
    talks = {name: list(start) for name in sides}
    asked = iter([options.prompt]) if options.prompt is not None else _questions()
    try:
        for question in asked:
            if question == CLEAR:
                talks, images = {name: list(start) for name in sides}, []
                continue
            for name, side in sides.items():
                if len(sides) > 1:
                    print(f"{name}: ", end="", flush=True)
                talk = talks[name]
                talk.append({"role": "user", "content": question})
                answer = _printed(models.reply(side, list(talk), images, sampling))
                talk.append({"role": "assistant", "content": answer})
    except KeyboardInterrupt:
        print()
        return 130
    return 0


def _printed(pieces: Iterator[str]) -> str:
    """The whole answer, printed as it comes."""
    answer = ""
    for piece in pieces:
        print(piece, end="", flush=True)
        answer += piece
    print(flush=True)
    return answer


def _chosen(sides: "dict[str, RunSide]", wanted: str) -> "dict[str, RunSide]":
    """The sides of a name that answer. Raises UserError where there is none of the wanted kind."""
    chosen = {name: side for name, side in sides.items() if wanted == "both" or name.split()[0] == wanted}
    if not chosen:
        raise UserError(f"There is no {wanted} here that can answer, only {', '.join(sides)}. Leave --side out.")
    return chosen


def _questions() -> Iterator[str]:
    """The lines that are typed, or piped in, up to /quit."""
    talking = sys.stdin.isatty()
    if talking:
        print(f"{QUIT} ends, {CLEAR} begins a new conversation.", file=sys.stderr)
    while True:
        if talking:
            print("you: ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line or line.strip() == QUIT:
            return
        if line.strip():
            yield line.strip()


COMMAND = Command(
    "chat",
    "talk to a student and its teacher side by side",
    run,
    add_flags,
    "Asks the student of a run and its teacher, or any one model, and prints the answers as they are generated. "
    "Questions are typed, piped in line by line, or given with --prompt.",
)
