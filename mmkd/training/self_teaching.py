"""The part of a training in which the student is its own teacher: what it tells the teacher, and saves of it."""

from pathlib import Path
from typing import Any, ClassVar

from accelerate.utils import broadcast_object_list
from transformers.trainer_callback import TrainerCallback
from transformers.utils import logging

from mmkd.errors import UserError
from mmkd.models.sharded_weights import is_sharded
from mmkd.results.own_teacher import SELF
from mmkd.seams.trainer_seam import HookedTrainer
from mmkd.teachers.cached import CachedTeacher
from mmkd.teachers.self_teacher import SelfTeacher
from mmkd.teachers.several import SeveralTeachers, parts_of
from mmkd.teachers.teacher import Teacher

from .config import DistillationConfig

logger = logging.get_logger(__name__)

AVERAGE = "self_teacher.safetensors"
"""The file of a checkpoint with the averaged weights."""


def taught_by_itself(teacher: Any, args: DistillationConfig | None) -> Any:
    """The teacher that a trainer is given, with a `SelfTeacher` of the settings in the place of the name `self`.

    Raises UserError where the settings say how the student teaches itself, and another teaches.
    """
    form = None if args is None else args.self_teacher
    if isinstance(teacher, SeveralTeachers):
        named = {name: _self_or(part, args) for name, part in teacher.teachers.items()}
        teacher = teacher.replaced_by(named)
    else:
        teacher = _self_or(teacher, args)
    parts, own = parts_of(teacher), itself_in(teacher)
    other = next((part.form for part in own if form not in (None, part.form)), None)
    if other is not None:
        raise UserError(
            f"self_teacher is {form}, and the teacher is SelfTeacher({other!r}). Pass teacher='self', which takes all "
            "from the settings, or remove self_teacher.",
            because="meaning",
        )
    if form is not None and not own:
        # A cache or a server may well be of the student as it was before training.
        asked = any(isinstance(part, CachedTeacher) or (isinstance(part, Teacher) and part.served) for part in parts)
        if form != "base" or not asked:
            raise UserError(
                f"self_teacher is {form}, but the student is not its own teacher. Set teacher: self, or remove "
                "self_teacher.",
                because="meaning",
            )
    return teacher


def nothing_to_learn(args: DistillationConfig) -> str | None:
    """Why a student whose only teacher it is itself would learn nothing; None where it would."""
    if args.teacher_view is not None or args.term_weights.get("ce") or args.learns_from_reward:
        return None
    if args.student_quantization is not None and (args.self_teacher or "base") == "base":
        return None
    return (
        "Student and teacher are the same model and read the same text, so that their divergence is 0 from the first "
        "step on and nothing is learnt. Set teacher_view, so that the teacher reads more than the student, ce_weight "
        "above 0, or a reward with a reward_weight above 0."
    )


def itself_in(teacher: Any) -> list[SelfTeacher]:
    """Those of the teachers that are the student itself."""
    return [part for part in parts_of(teacher) if isinstance(part, SelfTeacher)]


def _self_or(teacher: Any, args: DistillationConfig | None) -> Any:
    if teacher != SELF:
        return teacher
    return SelfTeacher() if args is None else SelfTeacher(args.self_teacher or "base", args.ema_decay, args.ema_every)


class SelfTaughtTrainer(HookedTrainer):
    """transformers' Trainer with a student that may be its own teacher."""

    # transformers types these as unions with None, for trainers that are still without them.
    args: Any
    model: Any
    needs_teacher: ClassVar[bool]
    _own: SelfTeacher | None = None
    """The student as a teacher."""
    _first_weights: str | None = None
    """What the student's first weights are known by, where a copy of them teaches."""
    _restored_from: Path | None = None

    def bind_self(self, teacher: Any) -> None:
        """Gives the student to the teacher that it is, if it is one; raises UserError where it is several."""
        own = itself_in(teacher)
        if not own:
            return
        if len(own) > 1:
            raise UserError(
                "Several of the teachers are the student itself. Keep one of them; self_teacher says in which form.",
                because="not built",
            )
        self._own = own[0]
        missing = nothing_to_learn(self.args) if teacher is self._own and self.needs_teacher else None
        if missing is not None:
            logger.warning(missing)
        self._own.bind(self.model, self.accelerator)
        if self._own.copies and self.is_deepspeed_enabled and is_sharded(self.accelerator):
            raise UserError(
                f"self_teacher: {self._own.form} keeps copies of the student's weights, which ZeRO-3 has cut in a way "
                "of its own. Use accelerate_config fsdp2, zero2 or ddp; or self_teacher: live; or train an adapter "
                "(use_peft: true) with self_teacher: base, which keeps no copy.",
                because="not built",
            )
        if self._own.form == "base" and self._own.copies:
            # Where only the first rank has read the weights, it knows them for the others.
            known = [self._own.weights.sample() if self.accelerator.is_main_process else None]
            self._first_weights = broadcast_object_list(known)[0] if self.args.world_size > 1 else known[0]
        self.add_callback(_SelfTeaching(self))

    @property
    def asks_itself_before_training(self) -> bool:
        """Whether the student can be asked before a training has placed it on its ranks."""
        return self._own is None or not (self.is_fsdp_enabled or self.is_deepspeed_enabled)

    def before_restoring(self, checkpoint: Path) -> None:
        """Keeps the first weights, which the checkpoint replaces."""
        super().before_restoring(checkpoint)
        self._restored_from = checkpoint
        if self._own is not None:
            self._own.training_changes()

    def state_to_save(self) -> dict[str, Any]:
        """By what the student's first weights are known, too."""
        first = {} if self._first_weights is None else {"self_teacher_base": self._first_weights}
        return super().state_to_save() | first

    def state_restored(self, state: dict[str, Any] | None) -> None:
        """Raises UserError where the student began with other weights than that of the checkpoint."""
        super().state_restored(state)
        known = (state or {}).get("self_teacher_base")
        if None not in (known, self._first_weights) and known != self._first_weights:
            raise UserError(
                "The teacher of this run is the student before training (self_teacher: base), and the student that is "
                "loaded now is not the one that the checkpoint was trained from. Name the student that the run began "
                "with, or begin again in another output_dir.",
                because="meaning",
            )

    def checkpoint_to_save(self, folder: Path) -> None:
        """Saves the averaged weights beside the student's."""
        super().checkpoint_to_save(folder)
        if self._own is not None:
            self._own.save(folder / AVERAGE, self.args.should_save)

    def training_begins(self) -> None:
        """Called when all weights are in place: those of a checkpoint, where one is resumed."""
        assert self._own is not None
        resumed, self._restored_from = self._restored_from, None
        saved = None if resumed is None or self.state.global_step == 0 else resumed / AVERAGE
        if self._own.form == "ema" and saved is not None and not saved.is_file():
            raise UserError(
                f"{resumed} has no averaged weights ({AVERAGE}), since its run had another teacher or saved the model "
                "alone (save_only_model). Resume with the keys that the run was started with, or begin again in "
                "another output_dir."
            )
        self._own.training_begins(saved)

    def step_of_self_ended(self) -> None:
        """Called after an optimizer step."""
        assert self._own is not None
        self._own.step_ended(self.state.global_step)


class _SelfTeaching(TrainerCallback):
    """Tells the student as a teacher when training begins, and when a step has ended."""

    def __init__(self, trainer: SelfTaughtTrainer):
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.training_begins()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.step_of_self_ended()
