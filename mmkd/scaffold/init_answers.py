"""What `mmkd init` has to know, asked in an order in which each answer suggests the next."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.text import Text

from mmkd.errors import UserError

from .init_tasks import PRUNE, SERVER, TASKS, Task
from .questions import Asker, Question, any_text


@dataclass(frozen=True)
class InitFlags:
    """What flags say; None is asked for."""

    output: str | None = None
    task: str | None = None
    data: str | None = None
    gpu: str | None = None
    teacher: str | None = None
    server: str | None = None
    student: str | None = None
    keep_layers: int | None = None
    output_dir: str | None = None
    force: bool = False


@dataclass(frozen=True)
class Answers:
    """What is to be trained."""

    output: Path
    """Of the recipe."""
    task: Task
    data: str
    device: Any
    """A `mmkd.preflight.hardware.Device`."""
    teacher: str
    student: str | None
    """None where it is made of the teacher's layers."""
    keep_layers: int | None
    server: str | None
    output_dir: str

    @property
    def teacher_folder(self) -> str:
        """Where what the teacher says is kept, beside the run and not in it: other runs can read it too."""
        folder = Path(self.output_dir)
        # In a folder more than a Hub id has, so that it cannot be taken for one.
        return str(folder.parent / "teacher_caches" / folder.name)


def gather(asker: Asker, flags: InitFlags) -> Answers:
    """All answers. Raises UserError for one that cannot be, and for one that is missing without a terminal."""
    # What cannot be written is said before anything is asked; a name that is not given is asked for last.
    early = _output(asker, flags) if flags.output is not None or not asker.interactive else None
    suggestions: dict[str, str] = {}

    def readable(source: str) -> str:
        with asker.console.status(Text(f"Reading {source} ...")):
            from .looking import look_at_data

            suggestions["task"], sentence = look_at_data(source)
        asker.console.print(Text(sentence, style="dim"))
        return source

    data = asker.ask(
        Question(
            "--data",
            "Your data?",
            check=readable,
            hint="A file (jsonl, json, csv, parquet, txt), a folder, a glob, a Hub id, or the name of a data recipe.",
        ),
        flags.data,
    )
    choices = {task.name: task.label for task in TASKS.values()}
    task = TASKS[asker.ask(Question("--task", "What shall be trained?", suggestions["task"], choices), flags.task)]
    from .looking import DeviceChoice, check_model, layers_of

    choice = DeviceChoice()
    device = choice.device(
        asker.ask(
            Question(
                "--gpu",
                "The GPU that trains?",
                choice.here,
                check=choice.check,
                hint="Its memory in GiB, such as 24; a name, such as A100-80GB; or none for a CPU.",
            ),
            flags.gpu,
        )
    )
    # Rounds and rollouts are for models of either kind, and the rows say which.
    sees = suggestions["task"] == "vlm" and task.images == "possible"
    pair = (TASKS["vlm"] if sees else task).pair(0 if device.kind == "cpu" else device.memory / (1 << 30))
    known: Callable[[str], str] = lambda name: check_model(name, "teacher", task)  # noqa: E731
    teacher = asker.ask(Question("--teacher", "The teacher?", pair.teacher, check=known, hint=_MODEL), flags.teacher)
    server = None
    if task.name == "served-teacher" or flags.server is not None:
        server = asker.ask(Question("--server", "The URL of its vLLM server?", SERVER, check=_url), flags.server)
    student, layers = _student(asker, flags, task, teacher, pair.student if teacher == pair.teacher else None)
    keep = _kept(asker, layers_of(teacher), layers) if student is None else None
    output = early or _output(asker, flags)
    output_dir = flags.output_dir or f"runs/{output.stem}"
    return Answers(output, task, data, device, teacher, student, keep, server, output_dir)


_MODEL = "A Hub id or a folder."


def _output(asker: Asker, flags: InitFlags) -> Path:
    """Where the recipe is to stand; a file that is there stays unless it is to be replaced."""

    def free(text: str) -> str:
        path = Path(any_text(text))
        if path.suffix not in (".yaml", ".yml"):
            raise UserError(f"{path} has no suffix that says it is a recipe; name it {path}.yaml.")
        if path.is_dir() or any(part.is_file() for part in path.parents):
            raise UserError(f"{path} cannot be a file: there is a folder of that name, or a file in its path.")
        if path.exists() and not flags.force:
            raise UserError(f"{path} is there already and would be replaced; name another file, or give --force.")
        return text

    question = Question("OUTPUT", "The file of the recipe?", _free_name(), check=free)
    if flags.output is None and not asker.interactive:
        return Path(free("mine.yaml"))
    return Path(asker.ask(question, flags.output))


def _free_name() -> str:
    names = ["mine.yaml", *(f"mine-{number}.yaml" for number in range(2, 1000))]
    return next(name for name in names if not Path(name).exists())


def _student(
    asker: Asker, flags: InitFlags, task: Task, teacher: str, suggestion: str | None
) -> tuple[str | None, int | None]:
    """The student's name, and None for one made of the teacher's layers, of which so many stay."""
    from .looking import check_model

    def known(name: str) -> str:
        if name != PRUNE:
            return check_model(name, "student", task)
        if not task.prunes:
            raise UserError(
                f"{PRUNE} makes the student of the teacher's layers, which task {task.name} has no use for. Name a "
                "student."
            )
        return name

    hint = f"{_MODEL} {PRUNE}: a smaller copy of the teacher, made of some of its layers." if task.prunes else _MODEL
    default = suggestion or (PRUNE if task.prunes else task.pair(0).student)
    given = flags.student if flags.student is not None or flags.keep_layers is None else PRUNE
    answer = asker.ask(Question("--student", "The student?", default, check=known, hint=hint), given)
    if answer != PRUNE and flags.keep_layers is not None:
        raise UserError(f"--keep_layers is for --student {PRUNE}; the student {answer} keeps all of its layers.")
    return (None, flags.keep_layers) if answer == PRUNE else (answer, None)


def _kept(asker: Asker, depth: int, given: int | None) -> int:
    """How many layers of the teacher the student keeps."""
    question = Question(
        "--keep_layers",
        f"How many of the teacher's {depth} layers does the student keep?",
        str(max(1, depth // 2)),
        check=lambda text: _count(text, depth),
    )
    return int(asker.ask(question, None if given is None else str(given)))


def _count(text: str, most: int) -> str:
    if not text.strip().isdecimal() or not 1 <= int(text) <= most:
        raise UserError(f"{text!r} is no number of layers from 1 to {most}.")
    return text.strip()


def _url(text: str) -> str:
    if not text.startswith(("http://", "https://")):
        raise UserError(f"{text!r} is no URL; write {SERVER} or the like.")
    return text.rstrip("/")
