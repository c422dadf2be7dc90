"""`mmkd chat`: talk to a student and its teacher side by side."""

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmkd.errors import UserError

from .command import Command, add_trust

if TYPE_CHECKING:
    from mmkd.publish.run_sides import RunSide

QUIT, CLEAR, IMAGE = "/quit", "/clear", "/image"


def add_flags(parser: ArgumentParser) -> None:
    """Whom to ask, what, and how it answers."""
    add = parser.add_argument
    add("model", metavar="RUN_OR_MODEL", help="a run's folder, the folder of a model, or a Hub id")
    add("--side", choices=("both", "student", "teacher"), default="both", help="who answers (default: both)")
    add(
        "--exported",
        nargs="+",
        default=[],
        metavar="NAME_OR_FILE",
        help="files of `mmkd export` that answer in the teacher's place: gguf-q4_k_m, a folder, a GGUF file",
    )
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
    from mmkd.generation.generator import Sampling
    from mmkd.ui.conversation import LoadedModels, sides_named, silent_side

    sides = sides_named(options.model, options.trust_remote_code)
    silent = silent_side(options.model) if options.side != "student" and not options.exported else ""
    if silent:
        print(silent, file=sys.stderr)
    sides = _with_exported(options, sides) if options.exported else _chosen(sides, options.side)
    images = [_picture(path, "--image") for path in options.image]
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
            # A prompt may be empty.
            if question.split()[:1] == [IMAGE]:
                images = _with_picture(images, question, talks)
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


def _with_picture(images: list[Any], line: str, talks: Mapping[str, Sequence[Any]]) -> list[Any]:
    """The pictures with that of a line `/image PATH`; a picture that cannot be read is said, and the talk goes on.

    Pictures stand before the first question, so that one in the middle of a conversation would change its beginning.
    """
    path = line.removeprefix(IMAGE).strip()
    if not path:
        print(f"Write {IMAGE} PATH.", file=sys.stderr)
    elif any(message["role"] == "user" for talk in talks.values() for message in talk):
        print(f"Pictures belong to the first question: {CLEAR} begins a new conversation.", file=sys.stderr)
    else:
        try:
            return [*images, _picture(Path(path), IMAGE)]
        except UserError as error:
            print(error, file=sys.stderr)
    return images


def _picture(path: Path, asked: str) -> Any:
    """Raises UserError for a file that is no picture."""
    from mmkd.data.images import UnreadableImage, read_image

    try:
        return read_image(path)
    except UnreadableImage as error:
        raise UserError(f"{asked} cannot be read: {error}") from error


def _with_exported(options: Namespace, sides: "dict[str, RunSide]") -> "dict[str, RunSide]":
    """The exported students, beside the student itself unless the teacher was asked for."""
    from mmkd.publish.run_sides import exported_side

    if options.side == "teacher":
        raise UserError(
            "--exported names files of the student, and --side teacher leaves the student out.", because="meaning"
        )
    own = dict(list(sides.items())[:1]) if options.side == "both" else {}
    asked = [exported_side(options.model, wanted, options.trust_remote_code) for wanted in options.exported]
    return {**own, **{side.name: side for side in asked}}


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
        print(f"{QUIT} ends, {CLEAR} begins a new conversation, {IMAGE} PATH shows a picture.", file=sys.stderr)
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
