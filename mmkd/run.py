"""One recipe is one run: what its keys are, and the trainer they describe."""

import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, set_seed
from trl.scripts.utils import TrlParser
from trl.trainer.model_config import ModelConfig
from trl.trainer.utils import get_peft_config, get_quantization_config

from mmkd.data.load import load_data
from mmkd.models.assemble import prune
from mmkd.models.load import load_model, load_processing_class
from mmkd.recipes import find_recipe
from mmkd.trainers import METHODS
from mmkd.trainers.base import DistillationConfig, DistillationTrainer


@dataclass
class RunArguments:
    """What a recipe says besides its method's settings."""

    method: str = field(metadata={"help": "How to distil.", "choices": list(METHODS)})
    data: str = field(metadata={"help": "Data recipe: a name under data_recipes/ or a path to a YAML file."})
    teacher: str | None = field(default=None, metadata={"help": "Teacher: a Hub id or a local folder."})
    student: str | None = field(
        default=None,
        metadata={"help": "Student: a Hub id or a local folder. May be left out with student_init: prune."},
    )
    student_init: str = field(
        default="pretrained",
        metadata={
            "help": "pretrained: the student's own weights. prune: a new student from layers (and optionally narrower "
            "FFN and heads) of `student`, or of the teacher when `student` is not set. random: the student's config "
            "with fresh weights.",
            "choices": ["pretrained", "prune", "random"],
        },
    )
    student_layers: list[int] | None = field(
        default=None,
        metadata={"help": "prune: how many layers to keep (one number, spread evenly) or which (several, from 0)."},
    )
    student_intermediate_size: int | None = field(default=None, metadata={"help": "prune: width of the FFN to keep."})
    student_num_attention_heads: int | None = field(
        default=None, metadata={"help": "prune: query heads to keep; key-value heads follow in proportion."}
    )
    teacher_revision: str | None = field(default=None, metadata={"help": "The teacher's branch, tag or commit."})
    teacher_dtype: str = field(
        default="auto", metadata={"help": "The teacher's type; auto (default) is the one it was saved in."}
    )
    teacher_attn_implementation: str | None = field(
        default=None,
        metadata={"help": "The teacher's attention, e.g. flash_attention_2; default: transformers' choice."},
    )
    teacher_load_in_4bit: bool = field(
        default=False,
        metadata={"help": "Quantise the teacher to 4 bits (nf4) with bitsandbytes, whatever the student is."},
    )
    teacher_load_in_8bit: bool = field(default=False, metadata={"help": "Quantise the teacher to 8 bits."})
    max_train_rows: int | None = field(default=None, metadata={"help": "Use at most so many rows to train."})
    max_eval_rows: int | None = field(default=None, metadata={"help": "Use at most so many rows to evaluate."})
    dry_run: bool = field(
        default=False,
        metadata={
            "help": "Load everything, report parameters, tokens, memory and the first batch, and train nothing."
        },
    )

    def __post_init__(self) -> None:
        if isinstance(self.student_layers, int):
            self.student_layers = [self.student_layers]
        if self.student_init not in ("pretrained", "prune", "random"):
            raise ValueError(f"student_init is {self.student_init!r}; choose pretrained, prune or random.")
        pruned = [self.student_layers, self.student_intermediate_size, self.student_num_attention_heads]
        if self.student is None and (self.student_init != "prune" or self.teacher is None):
            raise ValueError(
                "There is no student: set `student`, or `student_init: prune` to make one of the teacher."
            )
        if (self.student_init == "prune") != any(part is not None for part in pruned):
            raise ValueError(
                "student_init: prune and the sizes to keep (student_layers, student_intermediate_size, "
                "student_num_attention_heads) go together: set both or neither."
            )
        if self.teacher is None and METHODS[self.method].needs_teacher:
            raise ValueError(f"Method {self.method} needs a teacher: set `teacher` to a Hub id or a folder.")
        if self.teacher_load_in_4bit and self.teacher_load_in_8bit:
            raise ValueError("teacher_load_in_4bit and teacher_load_in_8bit exclude each other: keep one.")


@dataclass
class StudentArguments(ModelConfig):
    """trl's ModelConfig for the student: type, attention, quantisation and LoRA. The model itself is `student`."""

    model_name_or_path: str | None = field(default=None, init=False)


@dataclass
class Run:
    """A parsed recipe."""

    arguments: RunArguments
    training: DistillationConfig
    student: StudentArguments


def parse_run(recipe: str, flags: Sequence[str] = (), ignored: Sequence[str] = ()) -> Run:
    """The run that a recipe and the flags after it describe; flags win.

    `ignored` are keys of the recipe that somebody else reads. Raises ValueError for an unknown key or flag, naming the
    nearest real one, and for values that cannot be.
    """
    path = find_recipe(recipe)
    keys = read_recipe(path)
    method = method_of(keys, flags)
    parser = parser_of(method)
    known = [action.dest for action in parser._actions if action.dest != "help"]
    for key in keys:
        if key not in (*known, "env", *ignored):
            raise ValueError(f"{path} sets {key!r}, which method {method} does not know.{_nearest(key, known)}")
    arguments, training, student, unknown = parser.parse_args_and_config(
        ["--config", str(path), *flags], return_remaining_strings=True
    )
    # Keys that somebody else reads come back as flags, with their values.
    skipped = {text for key in ignored if key in keys for text in (f"--{key}", str(keys[key]))}
    for flag in unknown:
        if flag not in skipped:
            word = flag.lstrip("-").partition("=")[0]
            advice = "." if flag.startswith("--") else "; write --key value."
            raise ValueError(f"{flag} is no flag of method {method}{advice}{_nearest(word, known)}")
    return Run(arguments, training, student)


def parser_of(method: str) -> TrlParser:
    """The parser of every key that a recipe of this method may set."""
    types: list[Any] = [RunArguments, METHODS[method].config_class, StudentArguments]
    return TrlParser(types, prog=f"mmkd-train ({method})", allow_abbrev=False)


def read_recipe(path: Path) -> dict[str, Any]:
    """The keys of a recipe. Raises ValueError when the file is not a YAML mapping."""
    try:
        keys = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(keys, dict):
        raise ValueError(f"{path} is no recipe: it must hold `key: value` lines, with at least method and data.")
    return keys


def build_trainer(run: Run) -> DistillationTrainer:
    """The trainer of a run, with student, teacher and data loaded and checked."""
    arguments, training = run.arguments, run.training
    data = load_data(arguments.data, max_train_rows=arguments.max_train_rows, max_eval_rows=arguments.max_eval_rows)
    teacher = None if arguments.teacher is None else _load_teacher(run, arguments.teacher)
    student = _load_student(run, teacher)
    name = arguments.student or arguments.teacher
    assert name is not None
    return METHODS[arguments.method](
        model=student,
        teacher=teacher,
        args=training,
        train_dataset=data["train"],
        eval_dataset=data.get("eval"),
        processing_class=load_processing_class(name, "student", **_hub(run, run.student.model_revision)),
        peft_config=get_peft_config(run.student),
    )


def last_checkpoint(output_dir: str | Path) -> Path | None:
    """The newest complete checkpoint: its trainer_state.json, written last, can be read. None if there is none."""
    complete: list[tuple[int, Path]] = []
    for folder in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        if _is_complete(folder):
            complete.append((int(folder.name.rpartition("-")[2]), folder))
    return max(complete, default=(0, None))[1]


def resume_point(training: DistillationConfig) -> str | None:
    """The checkpoint to go on from, None to start afresh.

    `resume_from_checkpoint: true` is the newest complete one, if any. Raises ValueError when a fresh start would mix
    with an earlier run's checkpoints, or when the named checkpoint is not complete.
    """
    output_dir, wanted = training.output_dir or "", training.resume_from_checkpoint
    newest = last_checkpoint(output_dir)
    if not wanted or str(wanted).lower() == "false":
        if newest is not None:
            raise ValueError(
                f"{output_dir} holds the checkpoint {newest.name} of an earlier run. Go on from it with "
                "--resume_from_checkpoint true, or name another output_dir, or delete the folder."
            )
        return None
    if str(wanted).lower() == "true":
        return None if newest is None else str(newest)
    if not _is_complete(Path(wanted)):
        raise ValueError(f"{wanted} is no complete checkpoint: it has no readable trainer_state.json.")
    return str(wanted)


def _load_teacher(run: Run, name: str) -> PreTrainedModel:
    arguments = run.arguments
    quantization = None
    if arguments.teacher_load_in_4bit or arguments.teacher_load_in_8bit:
        quantization = BitsAndBytesConfig(
            load_in_4bit=arguments.teacher_load_in_4bit,
            load_in_8bit=arguments.teacher_load_in_8bit,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    return load_model(
        name,
        "teacher",
        dtype=arguments.teacher_dtype,
        attn_implementation=arguments.teacher_attn_implementation,
        quantization_config=quantization,
        **_hub(run, arguments.teacher_revision),
    )


def _load_student(run: Run, teacher: PreTrainedModel | None) -> PreTrainedModel:
    arguments, student = run.arguments, run.student
    # Before anything random; the Trainer sets it again when it has its model.
    set_seed(run.training.seed)
    quantization = get_quantization_config(student)
    if quantization is not None and arguments.student_init != "pretrained":
        raise ValueError(f"student_init: {arguments.student_init} makes new weights, which cannot be quantised yet.")
    init = run.training.model_init_kwargs or {}
    assert isinstance(init, dict)
    run.training.model_init_kwargs = None
    settings = {
        "dtype": student.dtype,
        "attn_implementation": student.attn_implementation,
        **_hub(run, student.model_revision),
        **init,
    }
    if arguments.student_init == "random":
        assert arguments.student is not None
        config = AutoConfig.from_pretrained(arguments.student, **_hub(run, student.model_revision))
        attention = {"attn_implementation": student.attn_implementation} if student.attn_implementation else {}
        return AutoModelForCausalLM.from_config(config, dtype=_dtype(student, torch.float32), **attention)
    if arguments.student_init == "pretrained":
        assert arguments.student is not None
        return load_model(arguments.student, "student", quantization_config=quantization, **settings)
    source = teacher if arguments.student is None else load_model(arguments.student, "student", **settings)
    assert source is not None
    layers = arguments.student_layers
    pruned: Any = prune(
        source,
        layers=layers[0] if layers is not None and len(layers) == 1 else layers,
        intermediate_size=arguments.student_intermediate_size,
        num_attention_heads=arguments.student_num_attention_heads,
    )
    if student.attn_implementation is not None:
        pruned.set_attn_implementation(student.attn_implementation)
    return pruned.to(_dtype(student, source.dtype))


def _dtype(student: StudentArguments, source: torch.dtype) -> torch.dtype:
    """The type of a student that is made here: that of its source for auto."""
    if student.dtype == "auto":
        return source
    return getattr(torch, student.dtype or "float32")


def _hub(run: Run, revision: str | None) -> dict[str, Any]:
    return {"revision": revision, "trust_remote_code": run.training.trust_remote_code}


def method_of(keys: dict[str, Any], flags: Sequence[str]) -> str:
    """The method of a recipe, or of the flags after it. Raises ValueError when it is none of METHODS."""
    method = keys.get("method")
    for flag, value in zip(flags, [*flags[1:], ""], strict=False):
        if flag == "--method":
            method = value
        elif flag.startswith("--method="):
            method = flag.partition("=")[2]
    if method not in METHODS:
        raise ValueError(
            f"method is {method!r}; set it to one of {', '.join(METHODS)}.{_nearest(str(method), METHODS)}"
        )
    return method


def _nearest(word: str, choices: Any) -> str:
    close = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else " `mmkd-train --help` lists all."


def _is_complete(checkpoint: Path) -> bool:
    state = checkpoint / "trainer_state.json"
    try:
        return state.is_file() and isinstance(json.loads(state.read_text(encoding="utf-8")), dict)
    except json.JSONDecodeError:
        return False
