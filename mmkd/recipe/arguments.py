"""What a recipe says, as typed values."""

import json
import re
from dataclasses import dataclass, field, fields
from typing import Any

from trl.trainer.model_config import ModelConfig

from mmkd.data.teacher_view import TeacherView
from mmkd.errors import UserError, nearest
from mmkd.schema import Field, NonNegativeInt, PositiveFloat, PositiveInt, check_fields, fields_of
from mmkd.teachers.cached import TAILS
from mmkd.training.method import METHODS

from .prune_arguments import PRUNE_KEYS, PruneArguments, check_pruning

VIEW = "teacher_view"
"""A key of training that each of several teachers may have for itself."""

MAKING_KEYS = ("student_init", "student_vision_tower", "student_vision_layer", *PRUNE_KEYS)
"""The keys that say how a student is made of saved models."""


@dataclass
class RunArguments(PruneArguments):
    """What a recipe says besides its method's settings."""

    method: str = field(metadata={"help": "How the student learns: the name of a method.", "choices": METHODS})
    data: str = field(
        metadata={
            "help": "The rows: a file, a folder, a glob, owner/name[:config] on the Hub, or a data recipe (a name "
            "under data_recipes/ or the path of a YAML file). `mmkd data preview` shows how they are read."
        }
    )
    teacher: str | None = field(
        default=None,
        metadata={
            "help": "The teacher: a Hub id or a local folder; self for the student itself, in the form that "
            "self_teacher names."
        },
    )
    student: str | None = field(
        default=None,
        metadata={
            "help": "The student: a Hub id or a local folder. Leave it out with student_init: prune to cut the "
            "student out of the teacher."
        },
    )
    student_init: str = field(
        default="pretrained",
        metadata={
            "help": "How the student begins. pretrained (default): with its own weights. prune: with some of the "
            "layers, neurons, heads and channels of `student`, or of the teacher if `student` "
            "is not set. random: with new weights for the student's config. llava: as a new "
            "vision-language model made of student_vision_tower, a new projector and the language model "
            "`student`. inherit: for method clip_kd, with a part of the weights of `student`, or of the teacher if "
            "`student` is not set; see inherit_target.",
            "choices": ["pretrained", "prune", "random", "llava", "inherit"],
        },
    )
    student_vision_tower: str | None = field(
        default=None,
        metadata={"help": "For student_init: llava. Hub id or folder of a CLIP, SigLIP, DINOv2 or ViT model."},
    )
    student_vision_layer: int = field(
        default=-2,
        metadata={
            "help": "For student_init: llava. The layer of the vision tower that is read. -2 (default) is the one "
            "before the last, as in LLaVA-1.5; -1 is the last."
        },
    )
    teacher_revision: str | None = field(
        default=None,
        metadata={
            "help": "Branch, tag or commit of the teacher. Default: the newest. Pin a commit to make a run repeatable."
        },
    )
    teacher_dtype: str = field(
        default="auto",
        metadata={
            "help": "Type of the teacher's weights, such as bfloat16. auto (default) uses the type they were saved "
            "in. A CPU that only emulates that type computes in float32 and says so; set "
            "MMKD_NATIVE_BF16=1 in the environment to prevent that."
        },
    )
    teacher_attn_implementation: str | None = field(
        default=None,
        metadata={"help": "The teacher's attention, such as flash_attention_2. Default: transformers' choice."},
    )
    teacher_load_in_4bit: bool = field(
        default=False,
        metadata={
            "help": "Quantise the teacher to 4 bits (nf4) with bitsandbytes. Takes a quarter of the memory of "
            "bfloat16. Independent of the student's quantisation."
        },
    )
    teacher_load_in_8bit: bool = field(
        default=False,
        metadata={"help": "Quantise the teacher to 8 bits: half the memory of bfloat16."},
    )
    teacher_cache: str | None = field(
        default=None,
        metadata={
            "help": "Folder of the teacher's stored predictions. `mmkd cache build` writes it, and training then "
            "reads it and does not load the teacher. A Hub id of a published cache is read too."
        },
    )
    teacher_tail: str = field(
        default="bucket",
        metadata={
            "help": "What stands for the tokens outside a cached top-k. bucket (default): one outcome with their "
            "total probability, which suits every divergence. unbiased: the random draws of "
            "cache_tail_draws, for forward_kl. renormalise: nothing; the top-k is scaled up to 1, which "
            "biases the student.",
            "choices": list(TAILS),
        },
    )
    teacher_server: list[str] | None = field(
        default=None,
        metadata={
            "help": "URLs of vLLM servers that run the teacher (see scripts/serve_teacher.sh). The teacher is then "
            "not loaded here: caches are built through the servers, and training without a cache asks them "
            "for every batch."
        },
    )
    teacher_server_model: str | None = field(
        default=None, metadata={"help": "The teacher's name on the servers. Needed if they offer several models."}
    )
    teacher_server_signal: str = field(
        default="auto",
        metadata={
            "help": "What the servers are asked for. top_k: the teacher_top_k most likely tokens, from a server that "
            "generates. hidden: the last hidden states, from a server that was started with --runner pooling. Only "
            "the teacher's head is then loaded here, and the student learns from the whole distribution. auto "
            "(default): what the servers run.",
            "choices": ["auto", "top_k", "hidden"],
        },
    )
    teacher_server_dtype: str = field(
        default="auto",
        metadata={
            "help": "For teacher_server_signal: hidden. The type in which hidden states are sent. auto (default): "
            "that of the teacher's weights. bfloat16 halves the traffic of float32 and changes the teacher's "
            "distribution by about 1e-4 nats.",
            "choices": ["auto", "float32", "bfloat16", "float16"],
        },
    )
    teacher_server_recheck: NonNegativeInt = field(
        default=100,
        metadata={
            "help": "For teacher_server_signal: hidden. After so many batches (default 100) one row is asked again "
            "and compared with the first answer, so that a server that was restarted with other weights is noticed. "
            "0: never."
        },
    )
    teacher_api: list[str] | None = field(
        default=None,
        metadata={
            "help": "For job: generate. URL of any server of OpenAI's chat protocol, such as "
            "https://api.openai.com/v1, whose model writes the answers. No weights and no tokenizer are loaded, and "
            "`teacher` is left out."
        },
    )
    teacher_api_model: str | None = field(
        default=None, metadata={"help": "The model's name at teacher_api. Needed if it offers several models."}
    )
    teacher_api_key_env: str = field(
        default="OPENAI_API_KEY",
        metadata={
            "help": "Name of the environment variable that holds the key of teacher_api. Keys are read from the "
            "environment only and never written down."
        },
    )
    teacher_concurrency: PositiveInt = field(
        default=16,
        metadata={
            "help": "Requests to have open at the same time, over all servers. Raise it while the servers have "
            "capacity left."
        },
    )
    teacher_timeout: PositiveFloat = field(
        default=600,
        metadata={
            "help": "Seconds to wait for one request to a server before it is sent again. It is sent up to six times."
        },
    )
    teacher_top_k: NonNegativeInt = field(
        default=64,
        metadata={
            "help": "Number of most likely tokens to keep exactly at each position, in a cache or from a server. "
            "With 64 (default) and the tail's probability, the gradient is within 5 percent of that of the "
            "whole distribution for a strong student."
        },
    )
    teachers: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Several teachers: {NAME: {teacher: ..., teacher_cache: ..., weight: 1, ...}, ...}. Without "
            "teacher_column, every token learns from all of them, weighted by `weight` (default: equal). A "
            "teacher_ key beside `teachers`, such as teacher_dtype, applies to each teacher that does not "
            "set it."
        },
    )
    teacher_column: str | None = field(
        default=None,
        metadata={
            "help": "For several teachers. The column of the rows that holds the NAME of the teacher to ask about "
            "a row."
        },
    )
    max_train_rows: PositiveInt | None = field(
        default=None, metadata={"help": "Train on at most this many rows. Use it for a quick trial. Default: all."}
    )
    max_eval_rows: PositiveInt | None = field(
        default=None, metadata={"help": "Evaluate on at most this many rows. Default: all held-out rows."}
    )
    dry_run: bool = field(
        default=False,
        metadata={
            "help": "Load everything, report parameters, tokens, memory and the first batch, and stop before training."
        },
    )

    def __post_init__(self) -> None:
        for name in ("student_layers", "student_vision_num_hidden_layers"):
            if isinstance(value := getattr(self, name), int):
                setattr(self, name, [value])
        check_fields(self)
        if (self.student_init == "llava") != (self.student_vision_tower is not None):
            raise UserError(
                "student_init: llava and student_vision_tower go together: set both or neither.", because="meaning"
            )
        _check_inherits(self)
        if self.student is None and (self.student_init not in ("prune", "inherit") or self.teacher is None):
            several = "" if self.teachers is None else " With several teachers, prune names its `student` too."
            raise UserError(
                f"There is no student: set `student`, or `student_init: prune` to make one of the teacher.{several}"
            )
        check_pruning(self)
        sources = [self.teacher, self.teacher_cache, self.teacher_server]
        _check_teachers(self, any(sources))
        absent = not any(sources) and self.teachers is None
        _check_api(self, absent)
        if absent and METHODS[self.method].needs_teacher:
            raise UserError(
                f"Method {self.method} needs a teacher: set `teacher` to a Hub id or a folder, or teacher_cache, or "
                "teacher_server."
            )
        if self.teacher_load_in_4bit and self.teacher_load_in_8bit:
            raise UserError(
                "teacher_load_in_4bit and teacher_load_in_8bit exclude each other: keep one.", because="meaning"
            )


def _check_inherits(arguments: RunArguments) -> None:
    """Raises UserError for student_init: inherit with a method whose students are cut in another way."""
    if arguments.student_init == "inherit" and not METHODS[arguments.method].inherits:
        raise UserError(
            f"student_init: inherit is for dual encoders (method clip_kd). For method {arguments.method} use "
            "student_init: prune, which cuts a student out of a larger model.",
            because="not built",
        )


def _check_api(arguments: RunArguments, absent: bool) -> None:
    """Raises UserError where teacher_api is not the only one who answers, and where a method needs more than text."""
    if arguments.teacher_api is None:
        return
    if arguments.teacher or arguments.teacher_server or arguments.teachers:
        raise UserError(
            "teacher_api says who answers, and so do `teacher`, `teachers` and teacher_server: keep one. The name of "
            "the model at the API is teacher_api_model.",
            because="meaning",
        )
    if absent and METHODS[arguments.method].needs_teacher:
        raise UserError(
            f"teacher_api writes text and no probabilities of given tokens, from which {arguments.method} learns. "
            "Generate answers with method: sft and job: generate, and train on them.",
            because="upstream",
        )


def _check_teachers(arguments: RunArguments, one_too: bool) -> None:
    """Reads `teachers`, and raises UserError where it makes no several teachers."""
    teachers = arguments.teachers = _read_teachers(arguments.teachers)
    if teachers is None:
        if arguments.teacher_column is not None:
            raise UserError(
                f"teacher_column is {arguments.teacher_column!r}, but there are no `teachers` to choose.",
                because="meaning",
            )
        return
    if not isinstance(teachers, dict) or not all(isinstance(keys, dict) for keys in teachers.values()):
        raise UserError("teachers is no mapping of names to keys; write {NAME: {teacher: ...}, ...}.")
    teachers = arguments.teachers = dict(teachers)
    if len(teachers) < 2:
        raise UserError(f"teachers holds {len(teachers)}; name two or more, or set `teacher` to the only one.")
    if one_too:
        raise UserError(
            "teacher, teacher_cache and teacher_server say who teaches, and so does `teachers`.", because="meaning"
        )
    if not METHODS[arguments.method].takes_several:
        several = ", ".join(name for name, method in METHODS.items() if method.takes_several)
        raise UserError(
            f"Method {arguments.method} learns from one teacher; `teachers` are for {several}.", because="not built"
        )
    if any("teacher_api" in keys for keys in teachers.values()):
        raise UserError(
            "teacher_api is for one teacher, which writes answers (job: generate). Generate those of several teachers "
            "one after the other, and train on a mixture of their data.",
            because="not built",
        )
    known = [part.name for part in fields(arguments) if part.name.startswith("teacher_")]
    method = METHODS[arguments.method]
    known = ["teacher", "weight", VIEW, *(name for name in known if name != "teacher_column"), *method.teacher_keys]
    allowed = {**fields_of(RunArguments), "weight": Field.of("weight", PositiveFloat)}
    own = fields_of(method.config) if method.teacher_keys else {}
    allowed |= {name: own[name] for name in method.teacher_keys}
    allowed[VIEW] = Field.of(VIEW, dict[str, Any] | str | None)
    for name, keys in list(teachers.items()):
        unknown = next((key for key in keys if key not in known), None)
        if unknown is not None:
            near = nearest(unknown, known)
            raise UserError(f"teachers.{name} sets {unknown!r}, which no teacher has; did you mean {near!r}?")
        read = {key: allowed[key].read(value, f"teachers.{name}.") for key, value in keys.items()}
        try:
            TeacherView.of(read.get(VIEW))
        except UserError as error:
            raise UserError(f"teachers.{name}: {error}", because=error.because) from error
        teachers[name] = read
        if not any(read.get(source) for source in ("teacher", "teacher_cache", "teacher_server")):
            raise UserError(f"teachers.{name} names nobody: set its teacher, teacher_cache or teacher_server.")
    if arguments.teacher_column is not None and any("weight" in keys for keys in teachers.values()):
        raise UserError(
            "teacher_column gives each row to one teacher, so that a weight says nothing: keep one.",
            because="meaning",
        )


def _read_teachers(teachers: Any) -> Any:
    if not isinstance(teachers, str):
        return teachers
    try:
        return json.loads(teachers)
    except json.JSONDecodeError as error:
        raise UserError(
            f'--teachers is no JSON ({error}): write --teachers \'{{"NAME": {{"teacher": "..."}}, ...}}\'.'
        ) from error


@dataclass
class StudentArguments(ModelConfig):
    """trl's ModelConfig for the student: type, attention, quantisation and LoRA. The model itself is `student`."""

    model_name_or_path: str | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        # trl unpacks a list of one, and PEFT reads text as a pattern of whole names, which one name alone never is.
        if isinstance(self.lora_target_modules, str) and re.fullmatch(r"[\w.]+", self.lora_target_modules):
            self.lora_target_modules = [self.lora_target_modules]
