"""What every method reads from a recipe."""

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

import torch

from mmkd.data.teacher_view import TeacherView
from mmkd.errors import UserError
from mmkd.preparation.checks import without_emulated_bf16
from mmkd.schema import PositiveInt, Range, Share
from mmkd.seams.trainer_seam import take_one_gpu, with_json_keys
from mmkd.teachers.self_teacher import FORMS

from .quantisation_config import QuantisationConfig
from .rollout_config import RolloutConfig


@dataclass
class DistillationConfig(QuantisationConfig):
    """What every method reads, besides everything of trl's SFTConfig."""

    _VALID_DICT_FIELDS: ClassVar[list[str]] = with_json_keys(
        RolloutConfig, "teacher_model_init_kwargs", "teacher_view"
    )

    ce_weight: Share = field(
        default=0.0,
        metadata={
            "help": "Weight of the cross-entropy with the data's own tokens; the divergence from the teacher has "
            "the rest. 0 (default) learns from the teacher alone. Try 0.1 to 0.5 if the data is better "
            "than the teacher. With on_policy_fraction it is of the data's answers, not of the student's own."
        },
    )
    combine: str = field(
        default="weights",
        metadata={
            "help": "How the terms of the loss are added. weights (default): each times its weight. gradmag: each "
            "is first scaled by the norm of its gradient in the last layer, so that weights become shares "
            "of the gradient at any temperature; this costs one more backward pass of the last layer for "
            "each term. Needs at least two terms, such as ce_weight between 0 and 1.",
            "choices": ["weights", "gradmag"],
        },
    )
    chunk_size: PositiveInt = field(
        default=512,
        metadata={
            "help": "Supervised tokens whose logits are computed at a time. Lower it to save memory: each model "
            "takes chunk_size x vocabulary x 2 bytes in bf16, beside about 0.5 GiB on a GPU. A larger one "
            "is slightly faster."
        },
    )
    precise_logits: bool = field(
        default=False,
        metadata={
            "help": "Compute the student's logits in fp32 from bf16 weights, and sum the gradient of the head in "
            "fp32. Rounding errors become several times smaller. Costs little on a GPU and much on a CPU."
        },
    )
    trainable: list[str] | None = field(
        default=None,
        metadata={
            "help": "Parts of a vision-language student to train: vision_tower, connector, language_model. The "
            "others are frozen. Default: all."
        },
    )
    on_bad_row: str = field(
        default="error",
        metadata={
            "help": "What to do with a row whose images are missing, broken or cut by max_length. error (default): "
            "stop and name the row. skip: leave it out, warn, and count it in the logs as unreadable_rows "
            "or overlong_rows.",
            "choices": ["error", "skip"],
        },
    )
    teacher_model_init_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "In Python: keyword arguments of from_pretrained for a teacher that is given by name, such as "
            "dtype."
        },
    )

    teacher_view: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "What the teacher reads in place of the student's prompt; both are compared on the same answer. "
            "{system: text, template: text, columns: [NAME], images_column: NAME}. `template` is the teacher's user "
            "turn: it holds {prompt}, {answer} (the row's own answer) and the names in `columns`, which are columns "
            "of the data. `images_column` names the teacher's images. Default: the teacher reads what the student "
            "reads."
        },
    )
    privileged_dropout: Share = field(
        default=0.0,
        metadata={
            "help": "For teacher_view. Share of rows for which the teacher reads the student's prompt all the same, "
            "so that the student also learns from what the teacher knows without the view. Which rows they are "
            "follows from the seed and the rows. 0 (default): none."
        },
    )
    teacher_max_length: Annotated[int, Range(min=2)] | None = field(
        default=None,
        metadata={
            "help": "For teacher_view. Longest row in tokens of the teacher, its prompt and the answer; longer rows "
            "of text are left out and counted, rows with images are treated as on_bad_row says. max_length is for the "
            "student's rows. Default: any length."
        },
    )
    self_teacher: str | None = field(
        default=None,
        metadata={
            "help": "For teacher: self. Which student teaches. base (default): as it was before training; a student "
            "with an adapter is asked without it, another one keeps a copy of its first weights. live: as it is now. "
            "ema: an average over the steps so far, which keeps a copy of the weights that are trained.",
            "choices": FORMS,
        },
    )
    ema_decay: Share = field(
        default=0.95,
        metadata={
            "help": "For self_teacher: ema. How much of the average is kept at each update; the student's weights of "
            "now have the rest. 0.95 (default) as in TRL's SDFT, an average over about 20 updates. 0 is live, 1 is "
            "base."
        },
    )
    ema_every: PositiveInt = field(
        default=1,
        metadata={"help": "For self_teacher: ema. Optimizer steps between updates of the average. Default: 1."},
    )
    sparse_density: Annotated[float, Range(above=0, below=1)] | None = field(
        default=None,
        metadata={
            "help": "Train only this share of the weights (LT-SFT): those that differ most between the student and "
            "sparse_from. 0.08 as in BiStil. Beside the student, which is an ordinary model, the difference is "
            "written as sparse_difference.safetensors. Default: train all."
        },
    )
    sparse_from: str | None = field(
        default=None,
        metadata={
            "help": "For sparse_density. What a training of all weights made of the same student: the output_dir of "
            "an earlier run."
        },
    )

    emulated_bf16: bool = field(
        init=False,
        default=False,
        metadata={"help": "Whether bf16 was asked for and is computed in fp32, since this CPU would only emulate it."},
    )

    own_tokens: ClassVar[bool] = False
    """Whether teachers read rows in tokens of their own."""
    combinations: ClassVar[tuple[str, ...]] = ("weights",)
    """How the method can combine the terms of its loss."""

    @property
    def term_weights(self) -> dict[str, float]:
        """The weight of each term of the loss, by the term's name in the logs."""
        return {"divergence": 1 - self.ce_weight, "ce": self.ce_weight}

    def __post_init__(self) -> None:
        # transformers wants this said before it allows bf16 on a machine without an accelerator.
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        if self.activation_checkpointing is None:
            # trl still sets its default by the old name, of which transformers warns every run.
            self.activation_checkpointing = self.gradient_checkpointing
        super().__post_init__()
        take_one_gpu(self)
        self.emulated_bf16 = without_emulated_bf16(self)
        if (self.sparse_density is None) != (self.sparse_from is None):
            raise UserError(
                "sparse_density and sparse_from go together: how many weights are trained, and the run that says "
                "which. Set both or neither.",
                because="meaning",
            )
        if self.answers_everything and self.ce_weight:
            raise UserError(
                "ce_weight is the share of the data's own answers, and with on_policy_fraction: 1 the student answers "
                "every prompt itself: it would be trained on what it says anyway. Set ce_weight: 0, or rollout_rows: "
                "add, which keeps the data's answers.",
                because="meaning",
            )
        check_combination(self)
        # Said at once where it is no view, or no format.
        TeacherView.of(self.teacher_view)
        _ = self.quantisation
        if self.loss_type != "nll" or self.label_smoothing_factor:
            raise UserError(
                "loss_type and label_smoothing_factor change SFT's own loss, which distillation replaces. Remove "
                "them.",
                because="meaning",
            )

    def for_teacher(self) -> "DistillationConfig":
        """The settings by which rows become the teacher's tokens: the same, where these are the student's too."""
        return self

    @property
    def teacher_length(self) -> int | None:
        """Tokens of the longest row that a teacher reads; None: any number."""
        return self.max_length if self.teacher_view is None else self.teacher_max_length

    @property
    def view(self) -> TeacherView | None:
        """What a teacher reads that has no view of its own; None: what the student reads."""
        return TeacherView.of(self.teacher_view)

    @property
    def longest_rollout(self) -> int:
        """Tokens of the longest answer that the student may give itself; 0 where it gives none."""
        return self.rollout_max_tokens if self.on_policy_fraction else 0

    @property
    def needs_boundaries(self) -> bool:
        """Whether it matters how probable the teacher finds the end of a word."""
        return False

    @property
    def differentiates_teacher(self) -> bool:
        """Whether a gradient goes through the teacher, to what it reads and not into its weights."""
        return False


def check_combination(config: DistillationConfig) -> None:
    """Raises UserError where the terms of the loss cannot be combined as asked."""
    if config.combine == "gradmag" and config.combinations == ("weights",):
        raise UserError(
            f"combine is gradmag, but the loss of {type(config).__name__} has no terms to balance. Set combine: "
            "weights, or use a method with several terms: kd or taid with ce_weight between 0 and 1, alm or llava_kd. "
            "Rounds of comd take it in round_settings.",
            because="meaning",
        )
    terms = [name for name, weight in config.term_weights.items() if weight]
    if config.combine == "gradmag" and len(terms) < 2:
        raise UserError(
            f"combine is gradmag, but {' and '.join(terms)} is the only term whose weight is not 0, which leaves "
            "nothing to balance. Give another term a weight, such as ce_weight: 0.5, or set combine: weights.",
            because="meaning",
        )
