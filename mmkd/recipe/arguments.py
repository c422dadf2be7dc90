"""What a recipe says, as typed values."""

import json
import re
from dataclasses import dataclass, field, fields
from typing import Any

from trl.trainer.model_config import ModelConfig

from mmkd.errors import UserError, nearest
from mmkd.schema import Field, NonNegativeInt, PositiveFloat, PositiveInt, check_fields, fields_of
from mmkd.teachers.cached import TAILS
from mmkd.training.method import METHODS


@dataclass
class RunArguments:
    """What a recipe says besides its method's settings."""

    method: str = field(metadata={"help": "How to distil.", "choices": METHODS})
    data: str = field(
        metadata={
            "help": "The rows: a file, a folder, a glob, owner/name[:config] on the Hub, or a data recipe (a name "
            "under data_recipes/ or the path of a YAML file). `mmkd data preview` shows how they are read."
        }
    )
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
            "with fresh weights. llava: a vision-language model of student_vision_tower, a fresh projector and the "
            "language model `student`.",
            "choices": ["pretrained", "prune", "random", "llava"],
        },
    )
    student_vision_tower: str | None = field(
        default=None,
        metadata={"help": "llava: the vision tower, a Hub id or a folder of CLIP, SigLIP, DINOv2 or ViT."},
    )
    student_vision_layer: int = field(
        default=-2,
        metadata={"help": "llava: which layer of the tower is read: -2 (default, as in LLaVA-1.5), -1 is the last."},
    )
    student_layers: list[NonNegativeInt] | None = field(
        default=None,
        metadata={"help": "prune: how many layers to keep (one number, spread evenly) or which (several, from 0)."},
    )
    student_intermediate_size: PositiveInt | None = field(
        default=None, metadata={"help": "prune: width of the FFN to keep."}
    )
    student_num_attention_heads: PositiveInt | None = field(
        default=None, metadata={"help": "prune: query heads to keep; key-value heads follow in proportion."}
    )
    teacher_revision: str | None = field(default=None, metadata={"help": "The teacher's branch, tag or commit."})
    teacher_dtype: str = field(
        default="auto",
        metadata={
            "help": "The teacher's type; auto (default) is the one it was saved in. A CPU without instructions for it "
            "computes in float32, and says so; MMKD_NATIVE_BF16=1 in the environment insists."
        },
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
    teacher_cache: str | None = field(
        default=None,
        metadata={
            "help": "The teacher on disk: the folder that `mmkd cache build` writes and training reads, or a Hub id "
            "to read it from. The teacher itself is then not loaded."
        },
    )
    teacher_tail: str = field(
        default="bucket",
        metadata={
            "help": "What stands for the tokens outside of a cached top-k. bucket (default): one outcome with their "
            "mass, for any divergence. unbiased: the draws of cache_tail_draws, for forward_kl. renormalise: nothing.",
            "choices": list(TAILS),
        },
    )
    teacher_server: list[str] | None = field(
        default=None,
        metadata={
            "help": "Base URLs of vLLM servers with the teacher (scripts/serve_teacher.sh), which is then not loaded "
            "here: to build a cache through them, or to train with their live top-k."
        },
    )
    teacher_server_model: str | None = field(
        default=None, metadata={"help": "The teacher's name on the servers, where they offer several models."}
    )
    teacher_concurrency: PositiveInt = field(
        default=16, metadata={"help": "Requests under way at a time, over all servers."}
    )
    teacher_timeout: PositiveFloat = field(
        default=600,
        metadata={"help": "Seconds that a server may take over one request before it is asked again (six times)."},
    )
    teacher_top_k: NonNegativeInt = field(
        default=64,
        metadata={
            "help": "Outcomes kept exactly per token, in a cache or asked of a server. 64 (default) with the tail's "
            "mass has a gradient within 5 percent of the whole distribution's on a strong student."
        },
    )
    teachers: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Several teachers: {NAME: {teacher: ..., teacher_cache: ..., weight: 1, any teacher_ key}, ...}. "
            "All teach every token by their weights (default: equal), or each its own rows (teacher_column). Keys "
            "beside `teachers`, such as teacher_dtype, are for all that do not set them."
        },
    )
    teacher_column: str | None = field(
        default=None,
        metadata={"help": "Of several teachers: the rows' column that holds the NAME of the one to ask about a row."},
    )
    max_train_rows: PositiveInt | None = field(default=None, metadata={"help": "Use at most so many rows to train."})
    max_eval_rows: PositiveInt | None = field(default=None, metadata={"help": "Use at most so many rows to evaluate."})
    dry_run: bool = field(
        default=False,
        metadata={
            "help": "Load everything, report parameters, tokens, memory and the first batch, and train nothing."
        },
    )

    def __post_init__(self) -> None:
        if isinstance(self.student_layers, int):
            self.student_layers = [self.student_layers]
        check_fields(self)
        if (self.student_init == "llava") != (self.student_vision_tower is not None):
            raise UserError(
                "student_init: llava and student_vision_tower go together: set both or neither.", because="meaning"
            )
        pruned = [self.student_layers, self.student_intermediate_size, self.student_num_attention_heads]
        if self.student is None and (self.student_init != "prune" or self.teacher is None):
            several = "" if self.teachers is None else " With several teachers, prune names its `student` too."
            raise UserError(
                f"There is no student: set `student`, or `student_init: prune` to make one of the teacher.{several}"
            )
        if (self.student_init == "prune") != any(part is not None for part in pruned):
            raise UserError(
                "student_init: prune and the sizes to keep (student_layers, student_intermediate_size, "
                "student_num_attention_heads) go together: set both or neither.",
                because="meaning",
            )
        sources = [self.teacher, self.teacher_cache, self.teacher_server]
        self._check_teachers(any(sources))
        if not any(sources) and self.teachers is None and METHODS[self.method].needs_teacher:
            raise UserError(
                f"Method {self.method} needs a teacher: set `teacher` to a Hub id or a folder, or teacher_cache, or "
                "teacher_server."
            )
        if self.teacher_load_in_4bit and self.teacher_load_in_8bit:
            raise UserError(
                "teacher_load_in_4bit and teacher_load_in_8bit exclude each other: keep one.", because="meaning"
            )

    def _check_teachers(self, one_too: bool) -> None:
        teachers = self.teachers = self._read_teachers()
        if teachers is None:
            if self.teacher_column is not None:
                raise UserError(
                    f"teacher_column is {self.teacher_column!r}, but there are no `teachers` to choose.",
                    because="meaning",
                )
            return
        if not isinstance(teachers, dict) or not all(isinstance(keys, dict) for keys in teachers.values()):
            raise UserError("teachers is no mapping of names to keys; write {NAME: {teacher: ...}, ...}.")
        teachers = self.teachers = dict(teachers)
        if len(teachers) < 2:
            raise UserError(f"teachers holds {len(teachers)}; name two or more, or set `teacher` to the only one.")
        if one_too:
            raise UserError(
                "teacher, teacher_cache and teacher_server say who teaches, and so does `teachers`.", because="meaning"
            )
        if not METHODS[self.method].takes_several:
            several = ", ".join(name for name, method in METHODS.items() if method.takes_several)
            raise UserError(
                f"Method {self.method} learns from one teacher; `teachers` are for {several}.", because="not built"
            )
        known = [part.name for part in fields(self) if part.name.startswith("teacher_")]
        known = ["teacher", "weight", *(name for name in known if name != "teacher_column")]
        allowed = {**fields_of(RunArguments), "weight": Field.of("weight", PositiveFloat)}
        for name, keys in list(teachers.items()):
            unknown = next((key for key in keys if key not in known), None)
            if unknown is not None:
                near = nearest(unknown, known)
                raise UserError(f"teachers.{name} sets {unknown!r}, which no teacher has; did you mean {near!r}?")
            read = {key: allowed[key].read(value, f"teachers.{name}.") for key, value in keys.items()}
            teachers[name] = read
            if not any(read.get(source) for source in ("teacher", "teacher_cache", "teacher_server")):
                raise UserError(f"teachers.{name} names nobody: set its teacher, teacher_cache or teacher_server.")
        if self.teacher_column is not None and any("weight" in keys for keys in teachers.values()):
            raise UserError(
                "teacher_column gives each row to one teacher, so that a weight says nothing: keep one.",
                because="meaning",
            )

    def _read_teachers(self) -> Any:
        if not isinstance(self.teachers, str):
            return self.teachers
        try:
            return json.loads(self.teachers)
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
