"""Settings of method dho."""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated

import numpy as np
from jaxtyping import Int

from mmkd.data.class_rows import AUGMENTATIONS
from mmkd.data.classification import HIDDEN, hide_labels
from mmkd.errors import UserError
from mmkd.losses.dual_head_losses import ALPHAS, BETAS
from mmkd.schema import NonNegativeInt, PositiveFloat, PositiveInt, Range, Share

from .class_terms_config import ClassTermsConfig

OBJECTIVES = ("dho", "ofa", "pld", "ce", "kd", "single_head")
TEACHER_KINDS = ("zero_shot", "tip_adapter", "question", "classifier", "masked")


@dataclass
class DHOConfig(ClassTermsConfig):
    """Settings of method dho."""

    objective: str = field(
        default="dho",
        metadata={
            "help": "What is trained. dho (default): both heads. ofa, pld: the same with that kd_loss. Baselines to "
            "compare with: ce (labels only; keys about the teacher's logits are not read), kd (teacher only), "
            "single_head (one head with both losses; try several values of ce_weight).",
            "choices": list(OBJECTIVES),
        },
    )
    ce_weight: Share = field(
        default=0.5,
        metadata={
            "help": "Weight of the loss on labels; the loss on the teacher has the rest. 0.5 (default) as in the "
            "paper."
        },
    )
    temperature: PositiveFloat | None = field(
        default=None,
        metadata={
            "help": "Softens the predictions of the teacher and of the distillation head in the loss. Default: 2 for "
            "kd_loss: kl as in DHO's paper, 1 for ofa and pld as in theirs. pld softens the teacher only."
        },
    )
    unlabeled_batch_size: NonNegativeInt = field(
        default=64,
        metadata={
            "help": "Unlabelled rows per step on each device, beside the per_device_train_batch_size labelled ones."
        },
    )
    labels_per_class: PositiveInt | None = field(
        default=None,
        metadata={"help": "Use this many labels of each class and hide the others. Default: all labels."},
    )
    label_fraction: Annotated[float, Range(above=0, max=1)] | None = field(
        default=None,
        metadata={
            "help": "Use this share of each class's labels, such as 0.01, but at least one. Default: all labels."
        },
    )
    label_seed: NonNegativeInt = field(
        default=0,
        metadata={
            "help": "Seed that chooses which labels are used. With the same seed, fewer labels are a part of more."
        },
    )
    alpha: Share | None = field(
        default=None,
        metadata={
            "help": "Weight of the labels' head in the prediction. Default: alpha and beta are chosen on "
            "validation rows."
        },
    )
    beta: PositiveFloat | None = field(
        default=None,
        metadata={"help": "Temperature of the distillation head in the prediction. Set it together with alpha."},
    )
    alphas: list[Share] = field(
        default_factory=lambda: list(ALPHAS),
        metadata={"help": "Values of alpha to choose from. Default: the authors'."},
    )
    betas: list[PositiveFloat] = field(
        default_factory=lambda: list(BETAS),
        metadata={"help": "Values of beta to choose from. Default: the authors'."},
    )
    kd_head: str = field(
        default="linear",
        metadata={
            "help": "Form of the distillation head. linear (default). For a student that is the tower of a "
            "vision-language model: cosine (equation 10 of the paper), or adapter, which leaves the tower as it is "
            "and learns an adapter after it, with prototypes of the classes and the teacher's texts (SgVA-CLIP).",
            "choices": ["linear", "cosine", "adapter"],
        },
    )
    head_init: str = field(
        default="random",
        metadata={
            "help": "How both heads begin. random (default), or text: with the teacher's text embeddings, for "
            "which the student's features must have the teacher's width.",
            "choices": ["random", "text"],
        },
    )
    pooling: str | None = field(
        default=None,
        metadata={
            "help": "How a backbone's features become one vector: pooler, cls, mean or last. Default: what is "
            "usual for the backbone."
        },
    )
    teacher_kind: str = field(
        default="zero_shot",
        metadata={
            "help": "What the teacher is. zero_shot (default): a CLIP-like model with prompts. tip_adapter: the "
            "same, with the labelled images. question: an LLM or VLM that is asked for the class. "
            "classifier: a classifier of the same classes. masked: such a classifier, one layer of which is masked "
            "for a student (MST-Distill).",
            "choices": list(TEACHER_KINDS),
        },
    )
    teacher_question: str | None = field(
        default=None, metadata={"help": "For teacher_kind: question. What is asked before the classes are listed."}
    )
    normalize_prompt_mean: bool = field(
        default=True,
        metadata={"help": "Scale a class's mean text feature to length 1. The authors set false for DFN ViT-H."},
    )
    tip_alpha: float = field(
        default=1.0, metadata={"help": "For teacher_kind: tip_adapter. Weight of the labelled images."}
    )
    tip_beta: float = field(
        default=5.5,
        metadata={"help": "For teacher_kind: tip_adapter. Sharpness of the similarity with labelled images."},
    )
    mask_layer: str | None = field(
        default=None,
        metadata={"help": "For teacher_kind: masked. The module of the teacher whose channels are masked."},
    )
    mask_student: str | None = field(
        default=None,
        metadata={
            "help": "For teacher_kind: masked. The student whose answers the mask brings the teacher near to: a Hub "
            "id or the folder of a trained student, usually `student` itself after a first training."
        },
    )
    mask_epochs: PositiveInt = field(
        default=1, metadata={"help": "For teacher_kind: masked. Passes over the training images. Default: 1."}
    )
    mask_learning_rate: PositiveFloat = field(
        default=1e-4, metadata={"help": "For teacher_kind: masked. Learning rate of the mask. 1e-4 as in the paper."}
    )
    teacher_batch_size: PositiveInt = field(default=64, metadata={"help": "Rows that the teacher reads at a time."})
    augmentation: str = field(
        default="none",
        metadata={
            "help": "How an image is varied for the student. none (default), flip, or crop_flip. The teacher sees "
            "the whole image, once.",
            "choices": list(AUGMENTATIONS),
        },
    )
    keep_rows: bool = field(
        default=False,
        metadata={"help": "Prepare every image once and keep it in memory. For small data sets without augmentation."},
    )
    max_length: PositiveInt = field(default=256, metadata={"help": "Longest text in tokens. Images do not read it."})
    conflict_steps: PositiveInt | None = field(
        default=None,
        metadata={
            "help": "Measure the cosine between the gradients of the two losses after every so many updates. "
            "Default: logging_steps. Not measured under FSDP and DeepSpeed, which shard the heads."
        },
    )
    plot_conflict: bool = field(
        default=False,
        metadata={"help": "Draw gradient_conflict.png at the end. Needs matplotlib (pip install 'mmkd[plot]')."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._settle_loss()
        if self.objective == "dho" and self.ce_weight in (0, 1):
            raise UserError(
                f"ce_weight {self.ce_weight} leaves a head without a loss; use objective kd or ce.", because="meaning"
            )
        if self.unlabeled_batch_size == 0 and self.objective != "ce":
            raise UserError("unlabeled_batch_size is 0; give 1 or more (0 only for objective ce).", because="meaning")
        if self.kd_head == "adapter" and (self.head_init != "random" or self.stage_heads is not None):
            raise UserError(
                "kd_head: adapter begins with the teacher's texts and leaves the tower as it is: head_init and "
                "stage_heads change nothing. Remove them.",
                because="meaning",
            )
        self._check_labels()
        self._check_interpolation()
        rows = self.per_device_train_batch_size + self.unlabeled_batch_size
        self.check_terms(rows * self.gradient_accumulation_steps * self.world_size)
        if self.keep_rows and self.augmentation != "none":
            raise UserError(
                "keep_rows keeps what augmentation has made once; set one of them only.", because="meaning"
            )
        if self.label_smoothing_factor:
            raise UserError(
                "label_smoothing_factor changes the Trainer's own loss, which DHO replaces. Remove it.",
                because="meaning",
            )
        if self.plot_conflict and importlib.util.find_spec("matplotlib") is None:
            raise UserError("plot_conflict needs matplotlib: pip install 'mmkd[plot]', or leave it out.")

    @property
    def distils(self) -> bool:
        """Whether the loss is about the teacher's logits."""
        return self.objective != "ce"

    @property
    def asks_teacher(self) -> bool:
        """Whether the loss is about the teacher's logits or its embeddings."""
        return self.distils or bool(self.term_weights)

    def shown_labels(self, labels: Int[np.ndarray, "row"], class_names: Sequence[str]) -> Int[np.ndarray, "row"]:
        """The labels of training rows, with those hidden that the settings do not show."""
        return hide_labels(labels, class_names, self.labels_per_class, self.label_fraction, self.label_seed)

    def check_unlabeled(self, labels: Int[np.ndarray, "row"]) -> None:
        """Raises UserError when all labels are shown to an objective that learns from rows without one."""
        if self.objective != "ce" and not (labels == HIDDEN).any():
            raise UserError(
                "There is no unlabelled row: every label of train is shown. Hide some with labels_per_class or "
                "label_fraction, add rows labelled -100 (splits.unlabeled of a data recipe), or use objective ce.",
                because="meaning",
            )

    def check_validation(self, validation: bool) -> None:
        """Raises UserError when alpha and beta are to be chosen and there are no rows to choose them on."""
        if self.objective == "dho" and self.alpha is None and not validation:
            raise UserError(
                "alpha and beta are chosen on validation rows, and there are none: add a validation split "
                "(validation_per_class of a data recipe), or set alpha and beta (the paper's 0.5 and 0.5).",
                because="meaning",
            )

    def _settle_loss(self) -> None:
        """Writes out what objective ofa and pld mean, and the usual temperature of a loss."""
        if self.objective in ("ofa", "pld"):
            if self.kd_loss not in ("kl", self.objective):
                raise UserError(
                    f"objective {self.objective} and kd_loss {self.kd_loss} name two losses for one head: keep one.",
                    because="meaning",
                )
            self.objective, self.kd_loss = "dho", self.objective
        if self.temperature is None:
            self.temperature = 2.0 if self.kd_loss == "kl" else 1.0

    def _check_labels(self) -> None:
        if self.labels_per_class is not None and self.label_fraction is not None:
            raise UserError("labels_per_class and label_fraction exclude each other: keep one.", because="meaning")

    def _check_interpolation(self) -> None:
        if (self.alpha is None) != (self.beta is None):
            raise UserError(
                "alpha and beta go together: set both, or neither to choose them on validation rows.",
                because="meaning",
            )
        if self.objective != "dho" and self.alpha is not None:
            raise UserError(
                f"alpha and beta join two heads; objective {self.objective} predicts with one.", because="meaning"
            )
        if not self.alphas or not self.betas:
            raise UserError("alphas and betas hold the values to choose from: give at least one of each.")
