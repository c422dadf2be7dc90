"""Both halves of the quickstart at once, each on a core of its own, with their progress in one screen.

    python scripts/quickstart.py [--output runs/quickstart] [--minutes 9] [any flag of the text half's recipes]

The text half trains students of SmolLM2-135M-Instruct by SFT, KD and TAID; the vision-language half is
scripts/quickstart_vlm.py. The machine is measured first: where it multiplies slowly, the text half is smaller, and the
table says by how much. All that the halves print is in OUTPUT/text.log and OUTPUT/easy_vqa.log. What is finished is
kept, so that the command can be repeated after Ctrl-C, which ends both halves.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn

from mmkd.files import write_file
from mmkd.precision import name_of_dtype, native_dtype
from mmkd.results.tables import show

ROOT = Path(__file__).resolve().parents[1]
BACKBONE, VOCABULARY, WIDTH, FEED_FORWARD = 134_515_008, 49_152, 576, 1536
"""Parameters of the teacher, and the widths of its largest products."""

STUDENT = 81_420_480
ROW_TOKENS, EVAL_TOKENS = 256, 250
"""Tokens of a training row, and about as many of a held-out page."""

EFFICIENCY = 1.1
"""Speed of the half over the probe's: 1.05 to 1.07 was measured in steps, in both types, 1.2 to 1.7 in evaluation."""

START, EACH = 60.0, 8.0
"""Seconds to fetch and convert the teacher, and to load what one model of the table needs."""

VISION = 330.0
"""Seconds of the vision-language half on the machine of the README, whose small models no unit for bf16 speeds up."""

_REFRESH, _LINES = 0.5, 10.0
"""Seconds between two looks at the halves, and between two lines where there is no screen."""


@dataclass(frozen=True)
class TextSize:
    """How much the text half trains and evaluates."""

    methods: tuple[str, ...]
    steps: int
    batch: int
    eval_rows: int

    @property
    def flops(self) -> float:
        """Of all products: 2 per parameter and token forward, 4 backward."""
        teachers = sum(method != "sft" for method in self.methods)
        tokens = self.steps * self.batch * ROW_TOKENS
        training = tokens * (6 * STUDENT * len(self.methods) + 2 * BACKBONE * teachers)
        # The teacher beside itself, the untrained student, and every trained one beside the teacher.
        evaluations = 4 * BACKBONE + (1 + len(self.methods)) * 2 * (STUDENT + BACKBONE)
        return training + evaluations * self.eval_rows * EVAL_TOKENS

    def seconds(self, speed: float) -> float:
        """What it takes where training steps reach so many products per second."""
        return START + EACH * (2 + len(self.methods)) + self.flops / speed

    @property
    def flags(self) -> list[str]:
        """Of the recipes."""
        return [
            *("--max_steps", str(self.steps)),
            *("--per_device_train_batch_size", str(self.batch)),
            *("--max_eval_rows", str(self.eval_rows)),
        ]


SIZES = (
    TextSize(("sft", "kd", "taid"), 30, 4, 18),
    TextSize(("sft", "kd", "taid"), 20, 4, 12),
    TextSize(("sft", "kd"), 30, 2, 6),
    TextSize(("sft", "kd"), 20, 2, 6),
    TextSize(("sft", "kd"), 14, 2, 4),
    TextSize(("sft", "kd"), 8, 2, 4),
)
"""From the one of the README's table down; the last is for whatever is slower still."""


def choose_size(speed: float, seconds: float) -> TextSize:
    """The largest text half that ends in so many seconds, or the smallest."""
    return next((size for size in SIZES if size.seconds(speed) <= seconds), SIZES[-1])


def measured_speed(dtype: torch.dtype, tokens: int = 256, repeats: int = 2) -> float:
    """Operations per second that one core reaches in the largest products of a step, forward and backward."""
    torch.set_num_threads(1)
    layers = torch.nn.Sequential(
        torch.nn.Linear(WIDTH, FEED_FORWARD), torch.nn.Linear(FEED_FORWARD, WIDTH), torch.nn.Linear(WIDTH, VOCABULARY)
    )
    hidden = torch.randn(tokens, WIDTH)
    best = float("inf")
    for _ in range(repeats):
        begun = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            layers(hidden).mean().backward()
        best = min(best, time.perf_counter() - begun)
    # The gradient of the input, which nothing asks for here, is left out.
    products = sum(layer.weight.numel() * (6 if number else 4) for number, layer in enumerate(layers))  # pyright: ignore
    return tokens * products / best


State = Callable[[], tuple[float, str]]
"""How far something is, from 0 to 1, and words for it."""


@dataclass
class Phase:
    """A part of a half, and about how long it takes."""

    name: str
    seconds: float
    done: State


@dataclass
class Half:
    """Commands that run one after the other; what they print goes to `log`."""

    name: str
    commands: list[list[str]]
    log: Path
    phases: list[Phase]
    begun: float = field(default_factory=time.monotonic)
    process: subprocess.Popen[bytes] | None = None
    status: int | None = None
    """Of the command that failed, or 0 once all are done."""
    kept: float | None = None
    """The share that was done before."""

    def advance(self) -> None:
        """Starts the next command where one has ended."""
        if self.status is not None or (self.process is not None and self.process.poll() is None):
            return
        if self.process is not None and self.process.returncode:
            self.status = self.process.returncode
        elif not self.commands:
            self.status = 0
        else:
            first = self.process is None
            with self.log.open("wb" if first else "ab") as file:
                # A group of its own: Ctrl-C reaches this script, which ends both halves in the same way.
                self.process = subprocess.Popen(
                    self.commands.pop(0), cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
                )

    def progress(self) -> tuple[float, str, float]:
        """The share that is done, what is being done, and the seconds that are left."""
        if self.status == 0:
            return 1.0, "done", 0.0
        total, passed = sum(phase.seconds for phase in self.phases), 0.0
        what = self.phases[-1].name
        for phase in self.phases:
            share, words = phase.done()
            passed += share * phase.seconds
            if share < 1:
                what = ": ".join(filter(None, (phase.name, words)))
                break
        share, elapsed = passed / total, time.monotonic() - self.begun
        if self.kept is None:
            self.kept = share
        new = share - self.kept
        # The estimate counts until a tenth is done, and then what this machine really takes.
        left = (1 - share) * total if new < 0.1 else elapsed * (1 - share) / new
        return min(share, 0.99), what, max(left, 1.0)

    def interrupt(self) -> None:
        """As Ctrl-C does."""
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGINT)

    def end(self, seconds: float = 20) -> None:
        """Waits for what was interrupted, and kills it where it does not end in so many seconds."""
        if self.process is None:
            return
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def exists(path: Path) -> State:
    """Done once a path is there."""
    return lambda: (float(path.exists()), "")


def matches(folder: Path, pattern: str) -> State:
    """Done once a path of the folder matches."""
    return lambda: (float(any(folder.glob(pattern))), "")


def measured(folder: Path, count: int) -> State:
    """Done once so many models of a comparison are evaluated."""
    return lambda: (float(len(list(folder.glob("*.json"))) >= count), "")


def trained(finished: State, folder: Path, log: str, since: float) -> State:
    """Done once `finished` is; until then how far the training is whose log matches, from the steps it has logged."""

    def done() -> tuple[float, str]:
        if finished()[0] == 1:
            return finished()
        logs = [path for path in folder.glob(log) if path.stat().st_mtime >= since]
        lines = logs[0].read_text(encoding="utf-8").splitlines() if logs else []
        # The last line may still be being written.
        entries = [json.loads(line) for line in lines if line.endswith("}")]
        if not entries:
            return 0.0, ""
        step, steps = entries[-1]["step"], entries[-1]["max_steps"]
        # Its evaluation is still to come.
        return 0.9 * step / steps, f"step {step} of {steps}"

    return done


def text_half(output: Path, size: TextSize, speed: float, flags: Sequence[str]) -> Half:
    """Teacher, data, and the comparison of the text students."""
    python, since, known = sys.executable, time.time(), output / "measured"
    recipes = [f"{method}/quickstart" for method in size.methods]
    commands = [[python, "scripts/get_teacher.py"], [python, "scripts/make_python_docs.py"]]
    compare = [python, "-m", "mmkd.commands.main", "compare", *recipes, "--output", str(output), *size.flags]
    teacher = TextSize((), 0, 0, size.eval_rows).flops / speed
    phases = [
        Phase("fetching the teacher", START, exists(ROOT / ".cache/mmkd/SmolLM2-135M-Instruct")),
        Phase("evaluating the teacher", EACH + 0.6 * teacher, measured(known, 1)),
        Phase("evaluating the student", EACH + 0.4 * teacher, measured(known, 2)),
    ]
    for number, method in enumerate(size.methods, 3):
        seconds = TextSize((method,), size.steps, size.batch, size.eval_rows).flops / speed - teacher
        state = trained(measured(known, number), output, f"{method}-trained-*/log.jsonl", since)
        phases.append(Phase(method, EACH + seconds, state))
    return Half("text", [*commands, [*compare, *flags]], output / "text.log", phases)


def vision_half(output: Path) -> Half:
    """The vision-language students; see scripts/quickstart_vlm.py."""
    since, models, place = time.time(), ROOT / ".cache/mmkd/easy_vqa/models", output / "easy_vqa"

    def stage(title: str, share: float, root: Path, folder: str) -> Phase:
        state = trained(matches(root, f"{folder}/model.safetensors"), root, f"{folder}/log.jsonl", since)
        return Phase(title, share * VISION, state)

    names = {"tower": "vision tower", "large": "teacher's language model", "small": "student's language model"}
    phases = [Phase(f"making the {name}", 0.1 * VISION, exists(models / folder)) for folder, name in names.items()]
    teacher = ROOT / "runs/easy_vqa/teacher"
    phases += [stage("teacher, stage 1", 0.06, teacher, "1-PT"), stage("teacher, stage 2", 0.26, teacher, "2-SFT")]
    for method, schedule, share in (("sft", "PT-SFT-SFT", 0.14), ("llava_kd", "DPT-SFT-DFT", 0.18)):
        phases += [
            stage(f"{schedule}, stage {number}", share / 3, place, f"{method}-{schedule}-*/{number}-{name}")
            for number, name in enumerate(schedule.split("-"), 1)
        ]
    phases.append(Phase("answering the test questions", 0.06 * VISION, exists(place / "answers.png")))
    command = [sys.executable, "-m", "scripts.quickstart_vlm", "--output", str(place), "--disable_tqdm", "true"]
    return Half("vision and language", [command], output / "easy_vqa.log", phases)


def run_halves(halves: Sequence[Half], console: Console) -> int:
    """Runs them side by side and shows where they are: 0, the status of the one that failed, or 130 after Ctrl-C.

    Nothing is left running behind it.
    """
    # `kill` ends the halves too.
    previous = signal.signal(signal.SIGTERM, _interrupted)
    name = TextColumn("{task.fields[half]:<19}")
    columns = [name, BarColumn(), TaskProgressColumn(), TextColumn("{task.description}")]
    screen = Progress(*columns, console=console)
    tasks = [screen.add_task("starting", total=1.0, half=half.name) for half in halves]
    if console.is_terminal:
        screen.start()
    try:
        return _until_done(halves, tasks, screen, console)
    except KeyboardInterrupt:
        return 130
    finally:
        if console.is_terminal:
            screen.stop()
        for half in halves:
            half.interrupt()
        for half in halves:
            half.end()
        signal.signal(signal.SIGTERM, previous)


def _until_done(halves: Sequence[Half], tasks: Sequence[TaskID], screen: Progress, console: Console) -> int:
    told = -_LINES
    while True:
        for half, task in zip(halves, tasks, strict=True):
            half.advance()
            share, what, left = half.progress()
            words = what if half.status == 0 else f"{what}, about {left / 60:.0f} min left"
            screen.update(task, completed=share, description=words)
        if not console.is_terminal and time.monotonic() - told >= _LINES:
            told = time.monotonic()
            lines = (f"{half.name}: {half.progress()[0]:.0%}, {screen.tasks[task].description}" for half, task in
                     zip(halves, tasks, strict=True))  # fmt: skip
            console.print("; ".join(lines), highlight=False, soft_wrap=True)
        failed = next((half for half in halves if half.status), None)
        if failed is not None:
            console.print(f"The {failed.name} half has failed. The end of {failed.log}:", highlight=False)
            console.print("\n".join(tail(failed.log, 25)), highlight=False, markup=False, soft_wrap=True)
            return failed.status or 1
        if all(half.status == 0 for half in halves):
            return 0
        time.sleep(_REFRESH)


def _interrupted(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def tail(log: Path, lines: int) -> list[str]:
    """The last lines of a log, of a progress bar its last state only."""
    text = log.read_bytes().decode("utf-8", "replace").rstrip("\n")
    return [line.rpartition("\r")[2] for line in text.split("\n")[-lines:]]


def results(output: Path, size: TextSize, dtype: str, console: Console) -> None:
    """Prints both tables."""
    # The vision half ends in its table and where its picture is.
    lines = tail(output / "easy_vqa.log", 40)
    start = max((number for number, line in enumerate(lines) if line.startswith("┏")), default=0)
    console.print("\n".join(lines[start:]), highlight=False, markup=False, soft_wrap=True)
    show(json.loads((output / "comparison.json").read_text(encoding="utf-8")), console)
    if size != SIZES[0]:
        console.print(smaller(size), highlight=False, soft_wrap=True)
    console.print(f"Products in {dtype}. {output / 'comparison.md'}", highlight=False, soft_wrap=True)


def smaller(size: TextSize) -> str:
    """In which way a text half is less than that of the README's first table."""
    full = SIZES[0]
    dropped = [method for method in full.methods if method not in size.methods]
    without = f", without {', '.join(dropped)}" if dropped else ""
    return (
        f"A smaller text half, for this machine: {size.steps} steps of {size.batch} x {ROW_TOKENS} tokens in place of "
        f"{full.steps} of {full.batch} x {ROW_TOKENS}, {size.eval_rows} held-out pages in place of {full.eval_rows}"
        f"{without}."
    )


def size_of(path: Path, speed: float, options: argparse.Namespace) -> TextSize:
    """The one asked for, else that of an earlier run, so that what is finished fits, else what the time allows."""
    if options.size is not None:
        number = options.size
    elif path.is_file():
        number = json.loads(path.read_text(encoding="utf-8"))
    else:
        number = SIZES.index(choose_size(speed, 60 * options.minutes))
    write_file(path, json.dumps(number))
    return SIZES[number]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--minutes", type=float, default=9, help="what the text half may take (default: 9)")
    parser.add_argument("--size", type=int, choices=range(len(SIZES)), help="of the text half, instead of measuring")
    options, flags = parser.parse_known_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    console, dtype = Console(width=None if sys.stdout.isatty() else 120), native_dtype("cpu")
    speed = EFFICIENCY * measured_speed(dtype)
    size = size_of(options.output / "size.json", speed, options)
    text = text_half(options.output, size, speed, flags)
    seconds = max(size.seconds(speed), VISION)
    console.print(
        f"One core of this machine trains at {speed / 1e9:.0f} GFLOP/s in {name_of_dtype(dtype)}: about "
        f"{seconds / 60:.0f} minutes for both halves.",
        highlight=False,
        soft_wrap=True,
    )
    if size != SIZES[0]:
        console.print(smaller(size), highlight=False, soft_wrap=True)
    vision = vision_half(options.output)
    console.print(f"Everything they print: {text.log}, {vision.log}. Ctrl-C ends both.", highlight=False)
    status = run_halves([text, vision], console)
    if status == 130:
        console.print("Interrupted. What is finished is kept: the same command goes on.")
    elif status == 0:
        results(options.output, size, name_of_dtype(dtype), console)
    return status


if __name__ == "__main__":
    raise SystemExit(main())
