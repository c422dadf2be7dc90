"""Student and teacher of a run as models and tokenizers: the one place where the keys of a recipe load them."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.trainer_utils import set_seed
from trl.trainer.utils import get_quantization_config

from mmkd.errors import UserError
from mmkd.models.llava import assemble_llava, llava_processor
from mmkd.models.load import load_model, load_processing_class, quantised_to
from mmkd.models.quantised_students import load_as_trained
from mmkd.precision import product_dtype, say_float32
from mmkd.seams.deepspeed_seam import is_partitioned, without_zero3

from .new_base import new_base
from .recipe import Run
from .run_pruning import Pruning, prune_for


def check_student(run: Run) -> None:
    """Raises UserError for a student that could not be trained, or not be saved."""
    quantised = run.student.load_in_4bit or run.student.load_in_8bit
    if quantised and not run.student.use_peft:
        raise UserError(
            "A quantised student has no weights to train: set use_peft: true, or do not quantise it.",
            because="upstream",
        )
    if quantised and run.training.quantisation is not None:
        raise UserError(
            "load_in_4bit and load_in_8bit round the weights when they are loaded, and student_quantization rounds "
            "them while they are trained. Remove one of the two. With load_in_4bit (QLoRA) the base stays rounded as "
            "bitsandbytes does it, and the adapter is not rounded.",
            because="meaning",
        )


def load_student(run: Run, teacher: PreTrainedModel | None = None) -> PreTrainedModel:
    """The student of a run, loaded or made as `student_init` says; of `teacher` where the run names no student.

    The seed of the run is set first, since some students begin with random weights. Raises UserError when it cannot
    be loaded.
    """
    # The Trainer sets it again when it has its model.
    set_seed(run.training.seed)
    if run.arguments.student_init == "pretrained":
        return saved_student(run, get_quantization_config(run.student))
    if not run.student.use_peft:
        return _made_student(run, teacher)
    folder = new_base(run, lambda: _made_student(run, teacher), lambda: student_processing_class(run))
    # Some processes have drawn weights and others have not, and an adapter is to begin the same on all.
    set_seed(run.training.seed)
    attention, quantization = run.student.attn_implementation, get_quantization_config(run.student)
    settings = {"dtype": "auto", "attn_implementation": attention, "quantization_config": quantization}
    trust = run.training.trust_remote_code
    return load_model(str(folder), "student", device=run.training.device, trust_remote_code=trust, **settings)


def _made_student(run: Run, teacher: PreTrainedModel | None) -> PreTrainedModel:
    init = run.arguments.student_init
    if init == "random":
        return _new_student(run)
    if init == "llava":
        return _joined_student(run)
    # Every process copies what stays out of a whole model.
    with without_zero3():
        source = teacher if run.arguments.student is None else saved_student(run)
        assert source is not None
        if is_partitioned(next(source.parameters())):
            assert run.arguments.teacher is not None
            source = load_teacher(run, run.arguments.teacher)
        return _pruned(run, source)


def saved_student(run: Run, quantization: Any = None) -> PreTrainedModel:
    """The model that a run names as its student, as it was saved."""
    init = run.training.model_init_kwargs or {}
    assert isinstance(init, dict)
    settings = {
        "dtype": run.student.dtype,
        "attn_implementation": run.student.attn_implementation,
        "quantization_config": quantization,
        **run.hub(run.student.model_revision),
        **init,
    }
    assert run.arguments.student is not None
    return load_model(run.arguments.student, "student", device=run.training.device, **settings)


def _new_student(run: Run) -> PreTrainedModel:
    """A student of the config of another, with random weights."""
    student = run.student
    assert run.arguments.student is not None
    config = AutoConfig.from_pretrained(run.arguments.student, **run.hub(student.model_revision))
    attention = {"attn_implementation": student.attn_implementation} if student.attn_implementation else {}
    return AutoModelForCausalLM.from_config(config, dtype=_made_dtype(run, torch.float32), **attention)


def _joined_student(run: Run) -> PreTrainedModel:
    """A vision tower and a language model with a new projector between them."""
    arguments = run.arguments
    assert arguments.student is not None
    assert arguments.student_vision_tower is not None
    return assemble_llava(
        arguments.student_vision_tower,
        arguments.student,
        vision_feature_layer=arguments.student_vision_layer,
        dtype=_made_dtype(run, torch.float32),
        trust_remote_code=run.training.trust_remote_code,
    )


def _pruned(run: Run, source: PreTrainedModel) -> PreTrainedModel:
    return pruned_student(run, source)[1]


def pruned_student(run: Run, source: PreTrainedModel) -> tuple[Pruning, PreTrainedModel]:
    """What pruning makes of a model, and the student as the run trains it: its type and its attention."""
    pruning = prune_for(run, source, lambda: student_processing_class(run))
    pruned: Any = pruning.student
    if run.student.attn_implementation is not None:
        pruned.set_attn_implementation(run.student.attn_implementation)
    return pruning, pruned.to(_made_dtype(run, source.dtype))


def _made_dtype(run: Run, source: torch.dtype) -> torch.dtype:
    """The type of a student that is made here: that of its source for auto, and one that the device multiplies."""
    name = run.student.dtype
    requested = source if name == "auto" else getattr(torch, name or "float32")
    computed = product_dtype(requested, run.training.device)
    if computed != requested:
        say_float32()
    return computed


def load_teacher(run: Run, name: str, dtype: str | None = None) -> PreTrainedModel:
    """The teacher's model as the run says, in a type that the run's device multiplies, or in the given one.

    Raises UserError when it cannot be loaded.
    """
    arguments, device = run.arguments, run.training.device
    bits = 4 if arguments.teacher_load_in_4bit else 8 if arguments.teacher_load_in_8bit else None
    return load_as_trained(
        name,
        "teacher",
        device=device if dtype is None else None,
        dtype=dtype or arguments.teacher_dtype,
        attn_implementation=arguments.teacher_attn_implementation,
        quantization_config=quantised_to(bits, device),
        **run.hub(arguments.teacher_revision),
    )


def student_processing_class(run: Run) -> Any:
    """The tokenizer or processor of a run's student, which may be made of the teacher."""
    arguments = run.arguments
    if arguments.student_init == "llava":
        assert arguments.student is not None
        assert arguments.student_vision_tower is not None
        trust = run.training.trust_remote_code
        return llava_processor(arguments.student_vision_tower, arguments.student, trust_remote_code=trust)
    if arguments.student is not None:
        return load_processing_class(arguments.student, "student", **run.hub(run.student.model_revision))
    return teacher_processing_class(run)


def teacher_processing_class(run: Run) -> Any:
    """The tokenizer or processor of the teacher that a run names."""
    arguments = run.arguments
    assert arguments.teacher is not None
    return load_processing_class(arguments.teacher, "teacher", **run.hub(arguments.teacher_revision))
