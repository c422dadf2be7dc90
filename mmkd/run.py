"""One recipe is one run: what its keys are, and the trainer they describe."""

import difflib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import DatasetDict
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, set_seed
from trl.scripts.utils import TrlParser
from trl.trainer.model_config import ModelConfig
from trl.trainer.utils import get_peft_config, get_quantization_config

from mmkd.alignment.vocab import shared_vocabulary
from mmkd.capture.arguments import CacheArguments
from mmkd.data.load import load_data
from mmkd.data.recipe import DataRecipe
from mmkd.hub import local_cache
from mmkd.models.assemble import prune
from mmkd.models.llava import assemble_llava, llava_processor
from mmkd.models.load import load_model, load_processing_class, tokenizer_of
from mmkd.recipes import find_recipe
from mmkd.teachers.cached import TAILS, CachedTeacher
from mmkd.teachers.identity import is_same_teacher, weights_sha256
from mmkd.teachers.server import ServerTeacher
from mmkd.teachers.store import Cache
from mmkd.trainers import METHODS
from mmkd.trainers.base import DistillationConfig, DistillationTrainer

STAGE_KEYS = ("stages", "schedule")
"""Keys of a recipe that is trained in stages; `mmkd.stages` reads them."""


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
    teacher_concurrency: int = field(default=16, metadata={"help": "Requests under way at a time, over all servers."})
    teacher_top_k: int = field(
        default=64,
        metadata={
            "help": "Outcomes kept exactly per token, in a cache or asked of a server. 64 (default) with the tail's "
            "mass has a gradient within 5 percent of the whole distribution's on a strong student."
        },
    )
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
        if self.student_init not in ("pretrained", "prune", "random", "llava"):
            raise ValueError(f"student_init is {self.student_init!r}; choose pretrained, prune, random or llava.")
        if (self.student_init == "llava") != (self.student_vision_tower is not None):
            raise ValueError("student_init: llava and student_vision_tower go together: set both or neither.")
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
        sources = [self.teacher, self.teacher_cache, self.teacher_server]
        if not any(sources) and METHODS[self.method].needs_teacher:
            raise ValueError(
                f"Method {self.method} needs a teacher: set `teacher` to a Hub id or a folder, or teacher_cache, or "
                "teacher_server."
            )
        if self.teacher_tail not in TAILS:
            raise ValueError(f"teacher_tail is {self.teacher_tail!r}; choose one of {', '.join(TAILS)}.")
        if self.teacher_top_k < 0:
            raise ValueError(f"teacher_top_k is {self.teacher_top_k}; it is a number of tokens, 0 or more.")
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
    cache: CacheArguments


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
    # Of a recipe in stages, this is what all of them share.
    ignored = [*ignored, *STAGE_KEYS]
    for key in keys:
        if key not in (*known, "env", *ignored):
            raise ValueError(f"{path} sets {key!r}, which method {method} does not know.{_nearest(key, known)}")
    arguments, training, student, cache, unknown = parser.parse_args_and_config(
        ["--config", str(path), *flags], return_remaining_strings=True
    )
    # Keys that somebody else reads come back as flags, with their values.
    skipped = {text for key in ignored if key in keys for text in (f"--{key}", str(keys[key]))}
    for flag in unknown:
        if flag not in skipped:
            word = flag.lstrip("-").partition("=")[0]
            advice = "." if flag.startswith("--") else "; write --key value."
            raise ValueError(f"{flag} is no flag of method {method}{advice}{_nearest(word, known)}")
    return Run(arguments, training, student, cache)


def parser_of(method: str) -> TrlParser:
    """The parser of every key that a recipe of this method may set."""
    types: list[Any] = [RunArguments, METHODS[method].config_class, StudentArguments, CacheArguments]
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
    data = load_rows_of(run)
    model = None
    if arguments.teacher is not None and (_reads_teacher(arguments) or arguments.student is None):
        model = load_teacher(run, arguments.teacher)
    student = _load_student(run, model)
    teacher: Any = model if _reads_teacher(arguments) else None
    if arguments.teacher_cache is not None:
        teacher = CachedTeacher(local_cache(arguments.teacher_cache), arguments.teacher_tail)
        check_cache(run, teacher.cache)
        data = without_unreadable(data, teacher.cache)
    elif arguments.teacher_server is not None:
        teacher = _server_teacher(run, arguments.teacher_server)
    return METHODS[arguments.method](
        model=student,
        teacher=teacher,
        args=training,
        train_dataset=data["train"],
        eval_dataset=data.get("eval"),
        processing_class=student_processing_class(run),
        peft_config=get_peft_config(run.student),
    )


def _server_teacher(run: Run, urls: list[str]) -> ServerTeacher:
    arguments = run.arguments
    student: Any = tokenizer_of(student_processing_class(run))
    # Without the teacher's own tokenizer the servers are asked whether theirs is the student's.
    tokenizer: Any = student
    tokens = len(student)
    if arguments.teacher is not None:
        name, hub = arguments.teacher, _hub(run, arguments.teacher_revision)
        tokenizer = tokenizer_of(load_processing_class(name, "teacher", **hub))
        added = {*student.get_added_vocab(), *tokenizer.get_added_vocab()}
        tokens = shared_vocabulary(student.get_vocab(), tokenizer.get_vocab(), added)
    return ServerTeacher(
        urls,
        k=arguments.teacher_top_k,
        model=arguments.teacher_server_model,
        # What the student does not know, a padding row of the teacher's say, is left in the tail.
        vocab_size=tokens,
        teacher=arguments.teacher,
        tokenizer=tokenizer,
        max_length=run.training.max_length,
        concurrency=arguments.teacher_concurrency,
    )


def load_rows_of(run: Run) -> DatasetDict:
    """The rows of a run's data recipe."""
    arguments = run.arguments
    return load_data(arguments.data, max_train_rows=arguments.max_train_rows, max_eval_rows=arguments.max_eval_rows)


def student_processing_class(run: Run) -> Any:
    """The tokenizer or processor of a run's student, which may be made of the teacher."""
    arguments = run.arguments
    if arguments.student_init == "llava":
        assert arguments.student is not None
        assert arguments.student_vision_tower is not None
        trust = run.training.trust_remote_code
        return llava_processor(arguments.student_vision_tower, arguments.student, trust_remote_code=trust)
    if arguments.student is not None:
        return load_processing_class(arguments.student, "student", **_hub(run, run.student.model_revision))
    assert arguments.teacher is not None
    return load_processing_class(arguments.teacher, "teacher", **_hub(run, arguments.teacher_revision))


def teacher_identity(run: Run, download: bool = True) -> dict[str, Any]:
    """Which teacher a run names, by name and weights; those of a Hub id only where they may be downloaded for it."""
    arguments = run.arguments
    assert arguments.teacher is not None
    name, revision = arguments.teacher, arguments.teacher_revision
    here = Path(name).is_dir() or (download and arguments.teacher_server is None)
    return {"name": name, "revision": revision, "weights": weights_sha256(name, revision) if here else None}


def check_cache(run: Run, cache: Cache) -> None:
    """Raises ValueError when a cache was built of another teacher, or on other data, than the run names."""
    identity, arguments = cache.manifest.identity, run.arguments
    if arguments.teacher is not None:
        ours = teacher_identity(run, download=False)
        if not is_same_teacher(ours, identity["teacher"]):
            raise ValueError(
                f"The cache {cache.folder} is of the teacher {identity['teacher']['name']!r} (weights "
                f"{identity['teacher']['weights']}), the recipe names {ours['name']!r} ({ours['weights']}). Correct "
                "`teacher`, or build a cache of it."
            )
    fingerprint = DataRecipe.load(arguments.data).fingerprint
    if fingerprint != identity["data"]["fingerprint"]:
        raise ValueError(
            f"The cache {cache.folder} was built on the data {identity['data']['name']!r} with the fingerprint "
            f"{identity['data']['fingerprint']}, the recipe's data has {fingerprint}. Use that data, or build a cache "
            "with this recipe."
        )


def without_unreadable(data: DatasetDict, cache: Cache) -> DatasetDict:
    """The rows without those that nobody could read when the cache was built."""
    for split, rows in cache.manifest.skipped.items():
        unreadable = {row for row, entry in rows.items() if entry.key is None}
        if unreadable and split in data:
            if len(data[split]) != cache.manifest.total_rows[split]:
                raise ValueError(
                    f"The cache {cache.folder} leaves out rows that could not be read, by their number among "
                    f"{cache.manifest.total_rows[split]} rows of {split}; the run has {len(data[split])}. Give the "
                    "same max_train_rows and max_eval_rows as for the build."
                )
            print(f"Left out of {split}: {len(unreadable)} rows that could not be read.", file=sys.stderr)
            data[split] = data[split].select([row for row in range(len(data[split])) if row not in unreadable])
    return data


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


def load_teacher(run: Run, name: str) -> PreTrainedModel:
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
    if arguments.student_init == "llava":
        assert arguments.student is not None
        assert arguments.student_vision_tower is not None
        return assemble_llava(
            arguments.student_vision_tower,
            arguments.student,
            vision_feature_layer=arguments.student_vision_layer,
            dtype=_dtype(student, torch.float32),
            trust_remote_code=run.training.trust_remote_code,
        )
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


def _reads_teacher(arguments: RunArguments) -> bool:
    return arguments.teacher_cache is None and arguments.teacher_server is None


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
